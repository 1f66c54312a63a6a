"""What the ways to call a program share: one call by hash, which buffer is which, the
lock of tracing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch
import torch_xla
import torch_xla.runtime as xr

from ..core import ownership

# Tracing clears and runs the lazy graph of the device: one at a time.
EXTRACTING = threading.RLock()
# What torch_xla's _run_cached_graph says of an argument that is not computed yet.
_PENDING = "can not be a pending ir"


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
        if _PENDING not in str(error):
            raise
    finish(args)
    return torch_xla._XLAC._run_cached_graph(program, inputs(args))


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
    pending = torch_xla._XLAC._check_tensor_need_materialization(list(args))
    for t, is_pending in zip(args, pending, strict=True):
        if is_pending:
            ownership.compute_all(t.device)
            return
