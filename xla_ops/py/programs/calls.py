"""What the ways to call a program share: its hash, a call by that, and which buffer is
which."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
import torch_xla
import torch_xla.debug.metrics as met
import torch_xla.runtime as xr
from torch_xla._dynamo import dynamo_bridge

from ..core import ownership
from . import kept, small_buffers

_xlac = torch_xla._XLAC

# What torch_xla's _run_cached_graph says of an argument that is not computed yet, and
# of one whose program failed.
_PENDING = "can not be a pending ir"
_FAILED = "handle->HasValue()"


def run_cached(
    program: bytes, inputs: Callable, args: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Runs a compiled program by its hash.

    No argument is asked whether work is pending on it: the program refuses one that is,
    before it runs, and only then is it computed.

    Args:
        program: hash of a program that torch_xla has compiled.
        inputs: makes the program's inputs, in its order, of `args`.
    """
    try:
        return torch_xla._XLAC._run_cached_graph(program, inputs(args))
    except RuntimeError as error:
        if _FAILED in str(error):
            raise _failed(args, inputs) from error
        if _PENDING not in str(error):
            raise
    finish(args)
    return torch_xla._XLAC._run_cached_graph(program, inputs(args))


def _failed(args: Sequence[torch.Tensor], inputs: Callable) -> RuntimeError:
    """Of a program of which an input has no value any more."""
    tensors = [t for t in args if t.device.type == "xla"]
    shapes = _lost(tensors)  # as a program failed that was to compute or update them
    if shapes:
        return RuntimeError(
            "xla_ops: an argument must have a value, got one that was lost in a program"
            f" that failed, of shape {shapes}; make it anew"
        )
    # torch_xla gives the buffer of what torch's own operations update away.
    return RuntimeError(
        "xla_ops: a tensor that a compiled function closes over must stay as it is, got"
        f" one that was updated in place, of shape {_lost(inputs(args))}; give it as an"
        " argument, or name it in replay's `state`"
    )


def _lost(tensors: Sequence[torch.Tensor]) -> str:
    lost = [t for t in tensors if _xlac._is_placecholder(t)]
    return ", ".join(str(list(t.shape)) for t in lost)


def buffer_of(value: torch.Tensor) -> int:
    """What tells the buffer of a tensor that has been computed from all others.

    0 of an empty one.
    """
    if not value.numel():
        return 0
    if xr.is_spmd():  # a buffer on each device
        return torch_xla._XLAC._get_tensors_handle([value])[0]
    return torch_xla._XLAC._unsafe_buffer_pointer(value)


def finish(args: Sequence[torch.Tensor]) -> None:
    """Computes the arguments that are pending, and all that waits beside them."""
    tensors = [t for t in args if t.device.type == "xla"]
    if any(torch_xla._XLAC._check_tensor_need_materialization(tensors)):
        ownership.compute(tensors)


# What each program that was compiled here computes, by its hash in torch_xla.
_computes: dict[bytes, str] = {}


def compile_graph(computed: list[torch.Tensor], donated: str) -> bytes | None:
    """Compiles the graph of `computed`; returns its hash, None where it is empty.

    A program that torch_xla has already under that hash is taken only if it is known to
    be of the same HLO. Otherwise the graph gets a further result, of no element, until
    its hash is its own.

    Args:
        computed: the results; further ones are added behind them.
        donated: what tells the buffers that it overwrites.
    """
    if not computed:
        return None
    small_buffers.keep_apart(computed[0].device)
    hlo = _xlac._get_xla_tensors_hlo(computed)
    computes = hashlib.sha256(f"{donated}\n{hlo}".encode()).hexdigest()
    for attempt in range(1, 10):
        with dynamo_bridge.alias_with_buffer_donor_config():
            program = _xlac._get_graph_hash(computed)
            known = _computes.get(program) or kept.recall(program)
            if known in (None, computes):
                compiled_before = met.counter_value("UncachedCompile") or 0
                _xlac._xla_warm_up_cache(computed, [])
                is_new = (met.counter_value("UncachedCompile") or 0) > compiled_before
                if is_new or known == computes:
                    _computes[program] = computes
                    if is_new:
                        kept.remember(program, computes)
                    return program
        computed.append(torch.empty((attempt, 0), device=computed[0].device))
    raise RuntimeError(
        "replay: the graph's hash must be its own, got one of another program ten times"
    )
