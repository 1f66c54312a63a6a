"""Where a device's shard of a KV cache has what the whole one has elsewhere.

The kernels get whole buffers with offsets and strides (`paged_cache`). Cut by heads, a
buffer keeps its dimensions and loses elements, so those numbers change: they are taken
apart into steps along the buffer's dimensions and put together with the shard's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .lazy import torch
from .places import dense_strides
from .sharding import Rule

# Of a whole tensor or of a shard.
Shape = Sequence[int]

# (cache's argument, offset or stride in it) -> the same in one device's shard
Move = Callable[[str, int], int]


def layout(shape: Shape, head_stride: int, num_heads: int) -> str:
    """Returns the layout of a buffer whose heads may be split, for a `sharding.Rule`.

    One dimension must be that of heads: its elements are those of all heads, of a page
    or block. A cache without one (keys and values in one row, say) must be whole.
    """
    words = [f"!dimension{i}" for i in range(len(shape))]
    strides = dense_strides(torch.Size(shape))
    for i, (size, stride) in enumerate(zip(shape, strides, strict=True)):
        is_all = num_heads > 0 and stride * size == head_stride * num_heads
        if is_all and size % num_heads == 0 and head_stride % stride == 0:
            words[i] = f"heads*{size // num_heads}"
            break
    return " ".join(words)


def block_layout(shape: Shape, block_size: int) -> str:
    """The same of a buffer of dense blocks, whose inner dimensions may be split."""
    strides = dense_strides(torch.Size(shape))
    inner = strides.index(block_size) + 1 if block_size in strides else len(shape)
    return " ".join(
        f"part{i - inner}" if i >= inner else f"!dimension{i}"
        for i in range(len(shape))
    )


def moved(number: int, whole: Shape, shard: Shape) -> int:
    """Returns an offset or a stride in a whole buffer as it is in a shard."""
    result = 0
    strides = zip(
        dense_strides(torch.Size(whole)), dense_strides(torch.Size(shard)), strict=True
    )
    for old, new in strides:
        steps, number = divmod(number, old) if old else (0, number)
        result += steps * new
    return result


def shrunk(whole: Shape, shard: Shape) -> int:
    """Returns into how many pieces a tensor is cut."""
    return math.prod(whole) // max(math.prod(shard), 1) if 0 not in whole else 1


def require_split(
    op: str, name: str, whole: torch.Tensor, shard: torch.Tensor, pieces: int
) -> None:
    """Raises where heads are split but those of a cache are not."""
    if shrunk(whole.shape, shard.shape) != pieces:
        raise ValueError(
            f"{op}: {name} must have a dimension of heads alone where heads are split,"
            f" got one that lies in a tensor of shape {list(whole.shape)}"
        )


def written_rule(
    op: str,
    args: Mapping[str, Any],
    caches: Mapping[str, int],
    geometry: Callable[[Move, int], list[int]],
) -> Rule:
    """Makes the rule of an op that writes rows of keys and values into caches.

    Args:
        caches: the caches' arguments, in the order of results -> elements from one head
            to the next.
        geometry: (function that moves a number in a cache, number of pieces) -> the
            geometry of one device.
    """
    layouts = {
        name: layout(args[name].shape, head_stride, args["key"].shape[1])
        for name, head_stride in caches.items()
    }
    rows = dict.fromkeys(("key", "value"), "!tokens heads !head_dim")

    def localize(local: Mapping[str, Any], whole: Mapping[str, Any]) -> dict[str, Any]:
        pieces = shrunk(whole["key"].shape, local["key"].shape)
        for name in caches:
            require_split(op, name, whole[name], local[name], pieces)

        def move(name: str, number: int) -> int:
            return moved(number, whole[name].shape, local[name].shape)

        return {"geometry": geometry(move, pieces)}

    return Rule({**rows, **layouts}, tuple(layouts.values()), localize)
