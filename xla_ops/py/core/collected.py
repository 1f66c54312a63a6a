"""What a replayed function updates, while its program is traced by lazy tensors.

Tested by tests/programs/test_replay.py and test_replay_updates.py.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from .lazy import torch


class _Collected(threading.local):
    """The tensors that updates may overwrite.

    Attributes:
        allowed: by id; None where nothing is traced.
        storages: of those, which views, detach() and .data of one have in common.
        begin: torch_xla's number of the newest tensor before the trace.
        updated: those that were updated so far.
    """

    allowed: dict[int, torch.Tensor] | None = None
    storages: set[int]
    begin: int
    updated: dict[int, torch.Tensor]


_collected = _Collected()


def is_collecting() -> bool:
    """Whether this thread traces a program by lazy tensors."""
    return _collected.allowed is not None


@contextmanager
def collecting(
    tensors: Iterable[torch.Tensor], newest: torch.Tensor
) -> Iterator[Iterable[torch.Tensor]]:
    """While a program is traced: flags the buffers that it overwrites as donated.

    The caller protects them at each call of the program (`ownership.protect`), and
    takes the flags off.

    Args:
        tensors: those that the program may update.
        newest: a tensor, after whose making the trace begins.

    Yields:
        Those that it has updated so far.
    """
    allowed = {id(t): t for t in tensors}
    updated: dict[int, torch.Tensor] = {}
    _collected.allowed, _collected.updated = allowed, updated
    _collected.storages = {storage_of(t) for t in allowed.values()}
    _collected.begin = _number(newest)
    try:
        yield updated.values()
    finally:
        _collected.allowed, _collected.updated = None, {}


def collect(op: str, buffer: torch.Tensor) -> None:
    """Has the program overwrite a whole tensor, if it is one that it is given."""
    import torch_xla

    check(op, buffer)
    assert _collected.allowed is not None
    is_new = id(buffer) not in _collected.updated
    if is_new and id(buffer) in _collected.allowed and not is_pending(buffer):
        torch_xla._XLAC._set_buffer_donation(buffer, True)
        _collected.updated[id(buffer)] = buffer


def check(op: str, t: torch.Tensor) -> None:
    """Raises ValueError where a replayed function updates what it is not given.

    Further calls of its program would leave that as it is. What the function made
    itself is pending, or a clone, which is no computation.
    """
    if _collected.allowed is None:
        return
    t = _below_transforms(t)
    if storage_of(t) in _collected.storages:
        return
    base = t._base if t._base is not None else t
    if not is_pending(base) and _number(base) <= _collected.begin:
        raise ValueError(
            f"{op}: a tensor that a replayed function updates must be one of its"
            f" arguments or in its state, got another of shape {list(t.shape)}"
        )


def _below_transforms(t: torch.Tensor) -> torch.Tensor:
    """The tensor in memory of one that torch.func's transforms have wrapped."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(t):
        t = functorch.get_unwrapped(t)
    return t


def storage_of(t: torch.Tensor) -> int:
    """Identifies what views, detach() and .data have in common with their tensor."""
    return t.untyped_storage()._cdata


def is_pending(t: torch.Tensor) -> bool:
    """Whether the tensor's value is yet to be computed."""
    import torch_xla

    (pending,) = torch_xla._XLAC._check_tensor_need_materialization([t])
    return bool(pending)


def _number(t: torch.Tensor) -> int:
    """Torch_xla's number of the tensor below `t`, which grows from each to the next."""
    import torch_xla

    number: int = torch_xla._XLAC._xla_get_tensor_id(torch._from_functional_tensor(t))
    return number
