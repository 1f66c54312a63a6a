"""Where tensors lie in buffers, in numbers; `in_place` finds it out of torch's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .lazy import torch


class Located(NamedTuple):
    """Where a tensor lies: `buffer` and, in elements, offset and strides in it."""

    buffer: torch.Tensor
    offset: int
    strides: tuple[int, ...]


def dense_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Returns the strides of a row-major tensor of `shape`."""
    strides = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))
