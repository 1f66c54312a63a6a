"""Where keys and values lie, for the ops that read or write them.

A cache is [num_blocks, page_size, num_kv_heads, head_dim], dense in its last dimension.
Other layouts are views of that shape: HND is a permuted
[num_blocks, num_kv_heads, page_size, head_dim], a stacked cache is [2, ...] or
[num_blocks, 2, ...] taken apart. The kernels get whole buffers plus offset and strides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from . import in_place
from .checks import Checker
from .foreign import Foreign
from .lazy import torch
from .places import Located, dense_strides


class PagedCache(NamedTuple):
    """K and V caches, located in their buffers.

    Attributes:
        key_buffer, value_buffer: the buffers; one and the same for a stacked cache.
        num_blocks, page_size, num_kv_heads, head_dim: the shape of both caches.
        block_stride, page_stride, head_stride: elements from one block, offset in a
            page and head to the next, in both.
        key_offset, value_offset: elements before block 0 in each buffer.
    """

    key_buffer: torch.Tensor
    value_buffer: torch.Tensor
    num_blocks: int
    page_size: int
    num_kv_heads: int
    head_dim: int
    block_stride: int
    page_stride: int
    head_stride: int
    key_offset: int
    value_offset: int

    @property
    def is_stacked(self) -> bool:
        return self.key_buffer is self.value_buffer

    @property
    def geometry(self) -> list[int]:
        """The integers as the functional ops' `geometry` argument has them."""
        _, _, *integers = self
        return integers


# What those integers are called as attributes.
ATTRIBUTES = PagedCache._fields[2:]


# Element types of fp8 caches by vLLM's names for them.
FP8 = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


def convert(
    rows: torch.Tensor, scale: torch.Tensor | None, kv_cache_dtype: str
) -> torch.Tensor:
    """Returns rows as a cache stores them, in plain torch: for the references."""
    if kv_cache_dtype == "auto":
        return rows
    dtype = FP8[kv_cache_dtype]
    limit = torch.finfo(dtype).max
    scaled = rows.float() if scale is None else rows.float() / scale.reshape(())
    return scaled.clamp(-limit, limit).to(dtype)  # clamp keeps NaN


def cast_rows(args: Mapping[str, Any], dtype: torch.dtype) -> dict[str, torch.dtype]:
    """What torch.autocast means for an op that writes into a cache: new rows to the
    cache's dtype, or where that is fp8 to one dtype."""
    caches = (args[name] for name in ("key_cache", "kv_cache") if name in args)
    auto = args["kv_cache_dtype"] == "auto"
    rows = next(caches).dtype if auto else args["key"].dtype
    return {
        **dict.fromkeys(("key", "value"), rows),
        **dict.fromkeys(("k_scale", "v_scale", "scale"), torch.float32),
    }


# What error texts call the two caches, unless the op has other names for them.
NAMES = ("key_cache", "value_cache")
Names = tuple[str, str]


def dtypes(
    check: Checker, rows: torch.Tensor, kv_cache_dtype: str
) -> list[torch.dtype]:
    """Returns the element types that a cache of `rows` may have."""
    check.require(
        kv_cache_dtype == "auto" or kv_cache_dtype in FP8,
        "kv_cache_dtype",
        "be auto, fp8, fp8_e4m3 or fp8_e5m2",
        kv_cache_dtype,
    )
    if kv_cache_dtype == "auto":
        return [rows.dtype]
    return [FP8[kv_cache_dtype], torch.uint8]


def check_caches(
    check: Checker,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    names: Names = NAMES,
) -> None:
    """Checks the two caches against each other."""
    key, value = names
    check.rank(key, key_cache, "[num_blocks, page_size, num_kv_heads, head_dim]")
    check.shape(value, value_cache, key_cache.shape)
    check.dtype(value, value_cache, [key_cache.dtype])
    check.require(key_cache.shape[1] > 0, "page_size", "be at least 1", 0)


def check_slots(check: Checker, rows: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Checks the slots of the first tokens of `rows`."""
    check.dtype("slot_mapping", slot_mapping, [torch.int64])
    check.rank("slot_mapping", slot_mapping, "[num_tokens]")
    check.require(
        slot_mapping.shape[0] <= rows.shape[0],
        "slot_mapping",
        f"have at most {rows.shape[0]} elements",
        slot_mapping.shape[0],
    )


def locate(
    check: Checker,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    names: Names = NAMES,
    *,
    to_write: bool = False,
) -> PagedCache | None:
    """Locates both caches; None where their strides differ or are not dense enough.

    The caller then works on dense copies (reading) or on one cache at a time (writing).
    """
    if isinstance(key_cache, Foreign) and isinstance(value_cache, Foreign):
        key, value = key_cache.locate(), value_cache.locate()
        return _cache(key, value, key_cache.shape, key.strides)
    key = in_place.locate(key_cache, to_write=to_write)
    value = in_place.locate(value_cache, to_write=to_write)
    if to_write:
        places = {names[0]: (key_cache, key), names[1]: (value_cache, value)}
        in_place.check_writable(check.op, places)
    if not _alike(key, value, key_cache.shape):
        if in_place.may_be_dense(key_cache, to_write=to_write):
            return None
        check.require(
            _usable(key.strides, key_cache.shape),
            names[0],
            "be dense in its last dimension and free of overlaps",
            f"strides {list(key.strides)}",
        )
        check.require(
            False,
            names[1],
            f"have {names[0]}'s strides {list(key.strides)}",
            list(value.strides),
        )
    return _cache(key, value, key_cache.shape, key.strides)


def dense(key_cache: torch.Tensor, value_cache: torch.Tensor) -> PagedCache:
    """Takes the caches as dense values, without looking for a buffer below them."""
    strides = dense_strides(key_cache.shape)
    key = Located(key_cache, 0, strides)
    value = Located(value_cache, 0, strides)
    return _cache(key, value, key_cache.shape, strides)


def locate_to_read(
    check: Checker,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    names: Names = NAMES,
) -> PagedCache:
    """Locates both caches, or takes them as dense values where that cannot be done."""
    cache = locate(check, key_cache, value_cache, names)
    return dense(key_cache, value_cache) if cache is None else cache


def locate_rows(
    keys: torch.Tensor, values: torch.Tensor, *, dense: bool = False
) -> PagedCache:
    """Takes keys and values [num_kv_tokens, num_kv_heads, head_dim] as one page each.

    Views of one packed projection are located in it, unless they are asked for as
    dense values. Odd strides cost a copy.
    """
    if isinstance(keys, Foreign) and isinstance(values, Foreign):
        key, value = keys.locate(), values.locate()
    else:
        key, value = in_place.locate(keys), in_place.locate(values)
    if dense or not _alike(key, value, keys.shape):
        strides = dense_strides(keys.shape)
        key = Located(keys.contiguous(), 0, strides)
        value = Located(values.contiguous(), 0, strides)
    # A stride from one block to the next has no meaning.
    return _cache(key, value, (1, *keys.shape), (0, *key.strides))


def _cache(
    key: Located,
    value: Located,
    shape: Sequence[int],
    strides: Sequence[int],
) -> PagedCache:
    num_blocks, page_size, num_kv_heads, head_dim = shape
    block_stride, page_stride, head_stride, _ = strides
    return PagedCache(
        key.buffer,
        value.buffer,
        num_blocks,
        page_size,
        num_kv_heads,
        head_dim,
        block_stride,
        page_stride,
        head_stride,
        key.offset,
        value.offset,
    )


def _alike(key: Located, value: Located, shape: torch.Size) -> bool:
    """Whether one set of strides does for both, and the kernels can take it.

    The stride of a dimension of one element has no meaning, and torch none to prefer.
    """
    same = all(
        k == v or size <= 1
        for k, v, size in zip(key.strides, value.strides, shape, strict=True)
    )
    return same and _usable(key.strides, shape)


def _usable(strides: tuple[int, ...], shape: torch.Size) -> bool:
    *outer, last = strides
    return (last == 1 or shape[-1] == 1) and all(
        stride > 0 or size <= 1 for stride, size in zip(outer, shape[:-1], strict=True)
    )
