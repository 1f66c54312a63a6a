"""Copies blocks of paged caches to other blocks, in place."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..core import autocast, debug, front, in_place, sharded_cache, sharding
from ..core.checks import Checker
from ..core.custom_call import CustomCall
from ..core.dtypes import FLOAT_DTYPES, FP8_DTYPES
from ..core.foreign import Foreign
from ..core.hlo import Spec
from ..core.lazy import torch
from ..core.op import NAMESPACE, Op
from ..core.places import Located

_check = Checker("copy_blocks")
_DTYPES = (*FLOAT_DTYPES, *FP8_DTYPES, torch.int8, torch.uint8)
_ATTRIBUTES = (
    "num_blocks",
    "page_size",
    "num_kv_heads",
    "head_dim",
    "block_stride",
    "page_stride",
    "head_stride",
    "offset",
)


def copy_blocks(
    key_caches: Sequence[torch.Tensor],
    value_caches: Sequence[torch.Tensor],
    block_mapping: torch.Tensor,
) -> None:
    """Copies blocks inside each of the caches, in place.

    Each cache gets the result of copying block source to block destination for one pair
    (source, destination) of `block_mapping` after the other, also where a block occurs
    in several pairs, which vLLM leaves to chance. A pair with a negative number is
    padding and is skipped; so is one with a number past the cache, which
    `set_debug(True)` reports.

    In place: lazily, under torch.compile(backend="openxla"), and through views such as
    `kv.unbind(0)`. Every cache takes one kernel.

    torch.autocast changes nothing.

    Args:
        key_caches, value_caches: the caches of all layers, as many keys as values. A
            cache is [num_blocks, ...], of any rank from 1 on and any layout, float32,
            float16, bfloat16, fp8, int8 or uint8; they need not be alike.
        block_mapping: [num_pairs, 2], int64, on the caches' device.

    Raises:
        ValueError: an argument breaks one of the rules above.

    Semantics: vLLM's `_C_cache_ops.copy_blocks`.
    """
    _check.tensor("block_mapping", block_mapping)
    for name, caches in (("key_caches", key_caches), ("value_caches", value_caches)):
        if not isinstance(caches, (list, tuple)):
            got = type(caches).__name__
            raise TypeError(f"copy_blocks: {name} must be a list, got {got}")
        for i, cache in enumerate(caches):
            _check.tensor(f"{name}[{i}]", cache)
    is_foreign = isinstance(block_mapping, Foreign)
    op = _front if is_foreign else torch.ops.xla_ops.copy_blocks
    op(list(key_caches), list(value_caches), block_mapping)


def _front(
    key_caches: list[torch.Tensor],
    value_caches: list[torch.Tensor],
    block_mapping: torch.Tensor,
) -> None:
    _check.require(
        len(value_caches) == len(key_caches),
        "value_caches",
        f"have key_caches' length {len(key_caches)}",
        len(value_caches),
    )
    caches = {f"key_caches[{i}]": t for i, t in enumerate(key_caches)}
    caches |= {f"value_caches[{i}]": t for i, t in enumerate(value_caches)}
    _check_mapping(block_mapping)
    for name, cache in caches.items():
        _check.dtype(name, cache, _DTYPES)
        _check.require(cache.dim() > 0, name, "have rank 1 or more", "shape []")
        _check.same_device(name, cache, block_mapping=block_mapping)
    places = {
        name: (cache, in_place.locate(cache, to_write=True))
        for name, cache in caches.items()
        if cache.numel()
    }
    in_place.check_writable(_check.op, places)
    for name, found in places.items():
        _check.require(  # of all, before the first is written
            can_copy_within(*found),
            name,
            "be free of overlaps and, in a block, of more than two gaps",
            f"strides {list(found[1].strides)}",
        )
    for cache, place in places.values():
        copy_within(cache, place, block_mapping)


def can_copy_within(cache: torch.Tensor, place: Located) -> bool:
    """Whether `copy_within` can write a cache of these strides where it lies."""
    return (
        in_place.may_be_dense(cache, to_write=True)
        or _geometry(cache.shape, place.strides) is not None
    )


def copy_within(
    cache: torch.Tensor, place: Located, block_mapping: torch.Tensor
) -> None:
    """Copies blocks inside one cache, of one element or more, after all checks."""
    buffer, offset, strides = place
    geometry = _geometry(cache.shape, strides)
    is_value = in_place.is_value(cache)
    if geometry is None:
        # An odd view: as a dense value.
        buffer, offset = cache, 0
        geometry = _dense_geometry(cache.shape)
    args = (buffer, block_mapping, [*geometry, offset], debug.enabled())
    if is_value:
        in_place.update(_op, *args, views=[cache])
    else:
        _op.update_at_once(*args, None)


def _geometry(shape: torch.Size, strides: tuple[int, ...]) -> list[int] | None:
    """Describes blocks by three inner dimensions, the last one dense.

    The order of a block's elements does not matter, so its dimensions are sorted by
    stride and joined where one continues the other. None where three are not enough.
    """
    dims = [
        (stride, size) for stride, size in zip(strides, shape, strict=True) if size != 1
    ]
    if any(stride <= 0 for stride, size in dims if size):
        return None
    inner: list[tuple[int, int]] = []
    for stride, size in sorted(zip(strides[1:], shape[1:], strict=True), reverse=True):
        if size == 1:
            continue
        if inner and inner[-1][0] == stride * size:
            inner[-1] = (stride, inner[-1][1] * size)
        else:
            inner.append((stride, size))
    if not inner or inner[-1][0] != 1:
        inner.append((1, 1))
    if len(inner) > 3:
        return None
    inner = [(0, 1)] * (3 - len(inner)) + inner
    (page_stride, page), (head_stride, heads), (_, dim) = inner
    return [shape[0], page, heads, dim, strides[0], page_stride, head_stride]


def _dense_geometry(shape: torch.Size) -> list[int]:
    """The same of a dense cache, whose blocks are one dimension."""
    size = math.prod(shape[1:])
    return [shape[0], 1, 1, size, size, 0, 0]


def _check_mapping(block_mapping: torch.Tensor) -> None:
    _check.dtype("block_mapping", block_mapping, [torch.int64])
    _check.require(
        block_mapping.dim() == 2 and block_mapping.shape[1] == 2,
        "block_mapping",
        "have shape [num_pairs, 2]",
        list(block_mapping.shape),
    )


def _lower(
    cache: torch.Tensor,
    block_mapping: torch.Tensor,
    geometry: list[int],
    debug_mode: bool,
) -> CustomCall:
    _check.dtype("cache", cache, _DTYPES)
    _check_mapping(block_mapping)
    _check.same_device("cache", cache, block_mapping=block_mapping)
    values = dict(zip(_ATTRIBUTES, geometry, strict=True))
    return CustomCall(
        "xla_ops.copy_blocks",
        ("cache", "block_mapping"),
        (Spec.of(cache),),
        {**values, "debug": debug_mode},
        {0: "cache"},
        nothing_to_do=block_mapping.numel() == 0 or cache.numel() == 0,
    )


def _reference(
    cache: torch.Tensor, block_mapping: torch.Tensor, geometry: list[int], _: bool
) -> torch.Tensor:
    num_blocks, page, heads, dim, *strides, offset = geometry
    if 0 in (num_blocks, page * heads * dim, block_mapping.shape[0]):
        return cache.clone()
    block_stride, page_stride, head_stride = strides
    lanes = (
        (torch.arange(page, device=cache.device) * page_stride)[:, None, None]
        + (torch.arange(heads, device=cache.device) * head_stride)[:, None]
        + torch.arange(dim, device=cache.device)
    ).reshape(-1)
    origin, target, final = _settle(block_mapping, num_blocks)
    # fp8 arithmetic is rare: move the bits as bytes.
    bits = cache.view(torch.uint8) if cache.element_size() == 1 else cache
    # What is not written lands in one spare element past the end.
    flat = torch.cat([bits.reshape(-1), bits.new_zeros(1)])
    moved = flat[offset + block_stride * origin[:, None] + lanes]
    index = offset + block_stride * target[:, None] + lanes
    index = torch.where(final[:, None], index, flat.numel() - 1)
    flat = flat.index_put((index,), moved)
    return flat[:-1].reshape(cache.shape).view(cache.dtype)


def _settle(block_mapping: torch.Tensor, num_blocks: int) -> tuple[torch.Tensor, ...]:
    """Says what copying pair after pair comes to.

    Returns:
        Of each pair: the block whose old content it copies, the block that it copies
        to, and whether that is the last content which that block gets.
    """
    source, target = (t.squeeze(1) for t in block_mapping.split(1, dim=1))
    legal = [(t >= 0) & (t < num_blocks) for t in (source, target)]
    valid = legal[0] & legal[1]
    source, target = (torch.where(valid, t, 0) for t in (source, target))
    pair = torch.arange(source.shape[0], device=source.device)
    earlier = valid & (pair < pair[:, None])
    # The last pair before this one that copied to this one's source; itself if none.
    writer = torch.where(earlier & (target == source[:, None]), pair, -1).amax(1)
    writer = torch.where(writer >= 0, writer, pair)
    for _ in range(source.shape[0].bit_length()):  # twice as far back each time
        writer = writer[writer]
    later = valid & (pair > pair[:, None])
    final = valid & ~(later & (target == target[:, None])).any(1)
    return source[writer], target, final


def _splits(args: Mapping[str, Any]) -> sharding.Rule:
    """The dimensions inside a block, where blocks have no gaps."""
    num_blocks, page, heads, size, block_stride, *strides, offset = args["geometry"]
    if page * heads != 1:
        return sharding.Rule({}, ("",))
    words = sharded_cache.block_layout(args["cache"].shape, size)

    def localize(local: Mapping[str, Any], whole: Mapping[str, Any]) -> dict[str, Any]:
        old, new = whole["cache"].shape, local["cache"].shape
        inner = size // sharded_cache.shrunk(old, new)
        stride, start = (
            sharded_cache.moved(n, old, new) for n in (block_stride, offset)
        )
        return {"geometry": [num_blocks, 1, 1, inner, stride, *strides, start]}

    return sharding.Rule({"cache": words}, (words,), localize)


_op = Op(
    "copy_blocks_one",
    "(Tensor cache, Tensor block_mapping, SymInt[] geometry, bool debug,"
    " Tensor? donor) -> Tensor",
    _lower,
    _reference,
    autocast=autocast.unchanged,
    splits=_splits,
    public_name="copy_blocks",
)

front.define(
    NAMESPACE,
    "copy_blocks(Tensor(a!)[] key_caches, Tensor(b!)[] value_caches,"
    " Tensor block_mapping) -> ()",
    _front,
    autocast=autocast.unchanged,
)
