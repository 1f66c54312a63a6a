"""What xs.mark_sharding returns is refused: ops take the tensor that it was given.

Tested by tests/sharding/test_sharding.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .lazy import torch


def refuse(op: str, args: Iterable[tuple[str, object]]) -> None:
    """Raises ValueError for what xs.mark_sharding returns: a tensor around a tensor.

    Torch takes ops apart below it where torch_xla's tensors cannot be written.
    """
    for name, value in args:
        # Its module is there only where torch_xla is, and is slow to import.
        if type(value).__name__ == "XLAShardedTensor":
            raise _wrapped(op, name)


def _wrapped(op: str, name: str) -> ValueError:
    return ValueError(
        f"{op}: {name} must be the tensor that was given to xs.mark_sharding, got the"
        " XLAShardedTensor that it returned: pass its global_tensor"
    )


def check(op: str, names: Sequence[str], tensors: Sequence[torch.Tensor]) -> None:
    """The same as `refuse`, in the kernel for XLA, which gets what was around it."""
    for name, t in zip(names, tensors, strict=True):
        if torch._is_functional_tensor(t):
            raise _wrapped(op, name)
