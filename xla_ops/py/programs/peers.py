"""Collectives between processes of one host by a custom call, through GPUs' memory.

A decode step's collectives are of few rows. XLA launches NCCL's by themselves, between
the graphs of what lies between, so that a step of 64 of them is bound by launches. The
call here (xla_ops/cc/ops/peer_collective) is part of the step's graph like any other.

Tested by tests/programs/test_peers.py, and tests/gpu/check_peers.py on GPUs.
"""

from __future__ import annotations

import os
import warnings

import torch
import torch.distributed as dist

from .. import _runtime
from ..core import handlers, paths, tracing
from ..core.custom_call import CustomCall, OptionalOperand, call_in_graph
from ..core.environment import boolean
from ..core.errors import BadValue
from ..core.hlo import Spec
from . import collective

VARIABLE = "XLA_OPS_PEER_COLLECTIVES"
MAX_RANKS = 8
# That a rank sends at most, to all others together: beyond it NCCL is as fast.
_MOST_BYTES = 1 << 20

_OP = "peer_collective"
_HANDLE_WORDS = 8  # XLA_OPS_PEER_HANDLE_WORDS
_UNIT_BYTES = 8

_call = collective.define(_OP, handlers.CUDA, "group")

_NORM_OP = "peer_add_rms_norm"
_MOST_ROW_BYTES = 16384
_library = torch.library.Library("xla_ops", "FRAGMENT")
_library.define(
    f"{_NORM_OP}(Tensor input, Tensor? after, Tensor residual, Tensor weight,"
    " int group, float eps) -> (Tensor, Tensor)"
)


def most_bytes(size: int) -> int:
    """Of an input, where there are `size` ranks."""
    return _MOST_BYTES // (size - 1)


def can_sum(x: torch.Tensor, size: int) -> bool:
    """Whether the sum over `size` ranks can be such a call."""
    count = x.numel() * x.element_size()
    is_whole = count % _UNIT_BYTES == 0
    return x.dtype in collective.SUMMED and is_whole and 0 < count <= most_bytes(size)


def can_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, size: int
) -> bool:
    """Whether the norm of the sum and a residual can be part of such a call."""
    alike = x.shape == residual.shape and x.dtype == residual.dtype == weight.dtype
    if not alike or x.shape[-1:] != weight.shape or not can_sum(x, size):
        return False
    row = x.shape[-1] * x.element_size()
    return row % _UNIT_BYTES == 0 and row <= _MOST_ROW_BYTES


def can_gather(x: torch.Tensor, size: int) -> bool:
    """Whether the gather of `size` ranks' can be such a call."""
    count = x.numel() * x.element_size() + _UNIT_BYTES
    return not x.is_complex() and 0 < x.numel() and count <= most_bytes(size)


def can_be(size: int, local_size: int) -> bool:
    """Whether processes can use it: 2 to 8, all of one host."""
    return 2 <= size <= MAX_RANKS and size == local_size


def open_group(cpu_group: dist.ProcessGroup, device: int) -> int | None:
    """Has each process reach the others' memory; all of `cpu_group` have to call this.

    Args:
        device: this process's, as CUDA counts.

    Returns:
        the group's number, or None, on all of them, where one cannot, and a warning
        says why there, or is not to, by the variable.

    Raises:
        BadValue: the variable is neither true nor false, of this process or another.
    """
    rank, size = dist.get_rank(cpu_group), dist.get_world_size(cpu_group)
    why, group = "", -1
    handle: list[int] = []
    # The others wait for whatever comes of it here, an error too.
    wrong: BadValue | None = None
    try:
        if boolean(os.environ, VARIABLE) is not False:
            most, timeout = most_bytes(size), collective.TIMEOUT_MS
            request = (device, rank, size, most, timeout)
            group, *handle = _ask("make", request, 1 + _HANDLE_WORDS)
    except BadValue as error:
        wrong = error
    except (OSError, RuntimeError, ValueError) as error:
        why = str(error)
    found: list = [None] * size
    dist.all_gather_object(found, wrong or handle, group=cpu_group)
    for one in (wrong, *found):
        if isinstance(one, BadValue):
            raise one
    if all(found):
        words = [word for others in found for word in others]
        words += [0] * (MAX_RANKS * _HANDLE_WORDS - len(words))
        try:
            _ask("open", (group, *words), 1)
        except (OSError, RuntimeError, ValueError) as error:
            why = str(error)
    opened: list = [None] * size
    # Also keeps each from a call before the others are there.
    dist.all_gather_object(opened, all(found) and not why, group=cpu_group)
    if all(opened):
        return group
    if why:
        warnings.warn(
            "xla_ops: collectives of few rows between these processes are NCCL's,"
            f" slower, since their GPUs cannot reach each other's memory: {why}."
            f" {VARIABLE}=0 says that this is meant",
            stacklevel=2,
        )
    return None


def _ask(what: str, request: tuple[int, ...], num_results: int) -> list[int]:
    path = paths.op_library(_OP, "cuda")
    return list(_runtime.plan(path, f"xla_ops_peer_group_{what}", request, num_results))


def all_reduce(
    x: torch.Tensor, after: torch.Tensor | None, group: int, size: int
) -> torch.Tensor:
    """The sum of what the processes give.

    Args:
        x: that `can_sum` takes.
        after: what the call before gave; calls have to run one after the other.
        group: of `open_group`.
        size: how many processes they are.
    """
    return _call(x, after, size, False, group)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    after: torch.Tensor | None,
    group: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """fused_add_rms_norm of the sum of what the processes give, and of a residual.

    Args:
        x, residual, weight: that `can_norm` takes.
        eps: added to the mean square.
        after, group: as all_reduce's.
    """
    call = torch.ops.xla_ops.peer_add_rms_norm.default
    out, total = call(x, after, residual, weight, group, eps)
    return out, total


def _in_graph(
    x: torch.Tensor,
    after: torch.Tensor | None,
    residual: torch.Tensor,
    weight: torch.Tensor,
    group: int,
    eps: float,
) -> tuple[torch.Tensor, ...]:
    target = f"xla_ops.{_NORM_OP}"
    handlers.available(handlers.CUDA, target)
    custom_call = CustomCall(
        target,
        ("input", OptionalOperand("after", torch.float32), "residual", "weight"),
        (Spec.of(x), Spec.of(x)),
        {"group": group, "eps": eps},
    )
    given = {"input": x, "after": after, "residual": residual, "weight": weight}
    return tuple(call_in_graph(custom_call.bind(given)))


_library.impl(_NORM_OP, tracing.untraced(_in_graph), "XLA")
torch.library.register_fake(
    f"xla_ops::{_NORM_OP}",
    lambda x, *rest: (torch.empty_like(x), torch.empty_like(x)),
    lib=_library,
)


def all_gather(
    x: torch.Tensor, after: torch.Tensor | None, group: int, size: int
) -> torch.Tensor:
    """What the processes give, [size, *x.shape]; `x` one that `can_gather` takes."""
    flat = x.flatten()
    rest = -flat.numel() % max(_UNIT_BYTES // x.element_size(), 1)
    padded = torch.nn.functional.pad(flat, (0, rest)) if rest else flat
    gathered = _call(padded, after, size, True, group)
    return gathered[:, : flat.numel()].unflatten(1, x.shape)
