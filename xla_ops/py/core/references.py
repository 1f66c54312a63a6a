"""Runs an op's reference, plain torch that its user wrote, where no handler runs.

Plain torch writes tensors, its arguments and views of its results among them. The op's
kernel is no place for that: it holds the tensors of the caller, and below the layer of
torch that keeps XLA tensors' views together, a write to a view is lost without a word.

Tested by tests/extend/test_reference.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch


def run(reference: Callable[..., Any], args: Sequence[Any]) -> Any:
    """Calls a reference with tensors of its own, on which views work as everywhere."""
    tensors = [t for a in args for t in _tensors(a)]
    with _views(any(t.device.type == "xla" for t in tensors)):
        found = reference(*map(_copy, args))
        if isinstance(found, tuple):
            return tuple(map(_value, found))
        return _value(found)


def _tensors(arg: Any) -> list[torch.Tensor]:
    items = arg if isinstance(arg, list | tuple) else [arg]
    return [t for t in items if isinstance(t, torch.Tensor)]


def _copy(arg: Any) -> Any:
    if isinstance(arg, torch.Tensor):
        return arg.clone()
    if isinstance(arg, list | tuple):
        return [_copy(item) for item in arg]
    return arg


@contextmanager
def _views(are_lost: bool) -> Iterator[None]:
    """Turns on what torch turns off around a kernel of an XLA device."""
    key = torch._C.DispatchKey.Functionalize
    if not (are_lost and torch._C._dispatch_tls_is_dispatch_key_excluded(key)):
        yield
        return
    torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
    try:
        yield
    finally:
        torch._C._dispatch_tls_set_dispatch_key_excluded(key, True)


def _value(found: Any) -> Any:
    """What a kernel returns: torch_xla's own tensor."""
    if isinstance(found, torch.Tensor) and torch._is_functional_tensor(found):
        torch._functionalize_sync(found)
        return torch._from_functional_tensor(found)
    return found
