"""Writes new keys and values into a paged KV cache of vLLM's first layout, in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..core import debug, front, in_place, paged_cache, sharded_cache, sharding
from ..core.checks import Checker
from ..core.custom_call import CustomCall, OptionalOperand
from ..core.dtypes import FLOAT_DTYPES
from ..core.foreign import Foreign
from ..core.hlo import AttributeValue, Spec
from ..core.lazy import torch
from ..core.op import NAMESPACE, Op
from ..core.places import Located, dense_strides

_check = Checker("reshape_and_cache")


def reshape_and_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_cache_dtype: str = "auto",
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """Writes `key` and `value` into the caches at the slots of `slot_mapping`.

    As `reshape_and_cache_flash`, for the layout of vLLM's first paged attention, in
    which the tokens of a page lie side by side. Token t goes to page
    slot // page_size at offset slot % page_size, where slot = slot_mapping[t]:
    key_cache[page, h, d // x, offset, d % x] and value_cache[page, h, d, offset].
    A negative slot skips its token (padding), and so does one past the cache;
    `set_debug(True)` reports the latter. Tokens should have slots of their own: where
    several share one, each element of it is that of any of them (of the last, by the
    CPU's custom call); pad with -1, not with a slot. With an fp8 cache the value stored
    is fp8(float(x) / scale), rounded to nearest even and saturated; NaN stays NaN.

    In place: lazily, under torch.compile(backend="openxla"), and through views such as
    those of one stacked cache, which is written by one kernel; separate K and V caches
    take, on XLA, two.

    Under torch.autocast, key and value are cast to the caches' dtype with
    kv_cache_dtype "auto", else value to key's, and the scales to float32.

    Args:
        key, value: [num_key_tokens, num_kv_heads, head_dim], float32, float16 or
            bfloat16; rows past slot_mapping's length are ignored.
        key_cache: [num_blocks, num_kv_heads, head_dim / x, page_size, x]; vLLM's x is
            16 bytes. Of key's dtype with kv_cache_dtype "auto", else uint8 or the fp8
            type. Every block is dense.
        value_cache: [num_blocks, num_kv_heads, head_dim, page_size], likewise.
        slot_mapping: [num_tokens], int64, num_tokens <= num_key_tokens.
        kv_cache_dtype: "auto", "fp8", "fp8_e4m3" (the same) or "fp8_e5m2".
        k_scale, v_scale: one float32 element each (default 1); read for fp8 caches.

    Raises:
        ValueError: an argument breaks one of the rules above.

    Semantics: vLLM's `_C_cache_ops.reshape_and_cache`.

    Example:
        >>> rows = torch.arange(4.0).reshape(1, 1, 4)
        >>> keys, values = torch.zeros(1, 1, 2, 3, 2), torch.zeros(1, 1, 4, 3)
        >>> reshape_and_cache(rows, rows, keys, values, torch.tensor([1]))
        >>> keys[0, 0, :, 1], values[0, 0, :, 1]
        (tensor([[0., 1.],
                [2., 3.]]), tensor([0., 1., 2., 3.]))
    """
    for name, t in (
        ("key", key),
        ("value", value),
        ("key_cache", key_cache),
        ("value_cache", value_cache),
        ("slot_mapping", slot_mapping),
    ):
        _check.tensor(name, t)
    _check.text("kv_cache_dtype", kv_cache_dtype)
    _check.optional_tensors(k_scale=k_scale, v_scale=v_scale)
    is_foreign = isinstance(key, Foreign)
    op = _front if is_foreign else torch.ops.xla_ops.reshape_and_cache
    op(
        key,
        value,
        key_cache,
        value_cache,
        slot_mapping,
        kv_cache_dtype,
        k_scale,
        v_scale,
    )


class _Place(NamedTuple):
    """Where a cache's blocks lie in a buffer, in elements."""

    buffer: torch.Tensor
    block_stride: int
    offset: int


def _front(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_cache_dtype: str,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> None:
    _check_rows(key, slot_mapping, value)
    _check_caches(key, key_cache, value_cache, kv_cache_dtype)
    _check_scales(key, k_scale, v_scale)
    _check.same_device(
        "key",
        key,
        value=value,
        key_cache=key_cache,
        value_cache=value_cache,
        slot_mapping=slot_mapping,
    )
    caches = {"key_cache": key_cache, "value_cache": value_cache}
    located = {
        name: (t, in_place.locate(t, to_write=True)) for name, t in caches.items()
    }
    in_place.check_writable(_check.op, located)
    k, v = (_place(name, *found) for name, found in located.items())
    num_blocks, _, _, page_size, x = key_cache.shape
    pages = [num_blocks, page_size]
    both = [*pages, x, *k[1:], *v[1:]]
    tail = (slot_mapping, k_scale, v_scale, kv_cache_dtype, both, debug.enabled())
    if not in_place.is_value(key_cache):
        _both.update_at_once(key, value, k.buffer, v.buffer, *tail)
    elif k.buffer is v.buffer:
        in_place.update(
            _stacked, k.buffer, key, value, *tail, views=[key_cache, value_cache]
        )
    else:
        # Two calls, not one with two results, as reshape_and_cache_flash does it.
        for rows, cache, place, x_of, scale in (
            (key, key_cache, k, x, k_scale),
            (value, value_cache, v, 1, v_scale),
        ):
            in_place.update(
                _one,
                place.buffer,
                rows,
                slot_mapping,
                scale,
                kv_cache_dtype,
                [*pages, x_of, *place[1:]],
                debug.enabled(),
                views=[cache],
            )


def _place(name: str, cache: torch.Tensor, located: Located) -> _Place:
    dense = dense_strides(cache.shape)
    buffer, offset, strides = located
    blocks_are_dense = all(
        stride == wanted or size <= 1
        for stride, wanted, size in zip(
            strides[1:], dense[1:], cache.shape[1:], strict=True
        )
    )
    if blocks_are_dense and (strides[0] > 0 or cache.shape[0] <= 1):
        return _Place(buffer, strides[0], offset)
    _check.require(
        in_place.may_be_dense(cache, to_write=True),
        name,
        "have dense blocks",
        f"strides {list(strides)}",
    )
    return _Place(cache, dense[0], 0)  # an odd view is written as a dense value


def _check_rows(
    key: torch.Tensor, slot_mapping: torch.Tensor, value: torch.Tensor | None = None
) -> None:
    _check.dtype("key", key, FLOAT_DTYPES)
    _check.rank("key", key, "[num_tokens, num_kv_heads, head_dim]")
    if value is not None:
        _check.same_as("value", value, key)
    paged_cache.check_slots(_check, key, slot_mapping)


def _check_caches(
    key: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    kv_cache_dtype: str,
) -> None:
    dtypes = paged_cache.dtypes(_check, key, kv_cache_dtype)
    _check.dtype("key_cache", key_cache, dtypes)
    _check.dtype("value_cache", value_cache, [key_cache.dtype])
    _check.rank(
        "key_cache",
        key_cache,
        "[num_blocks, num_kv_heads, head_dim / x, page_size, x]",
    )
    num_blocks, heads, chunks, page_size, x = key_cache.shape
    _check.require(
        [heads, chunks * x] == list(key.shape[1:]) and x > 0,
        "key_cache",
        f"have heads and head_dim {list(key.shape[1:])}",
        [heads, chunks * x],
    )
    _check.require(page_size > 0, "page_size", "be at least 1", 0)
    _check.shape("value_cache", value_cache, [num_blocks, *key.shape[1:], page_size])


def _check_scales(
    key: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None = None,
) -> None:
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is not None:
            _check.scale(name, scale)
            _check.same_device("key", key, **{name: scale})


def _lower_both(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    *rest: Any,
) -> CustomCall:
    caches = {"key_cache": key_cache, "value_cache": value_cache}
    return _lower_pair("xla_ops.reshape_and_cache", key, value, caches, *rest)


def _lower_stacked(
    kv_cache: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any
) -> CustomCall:
    caches = {"kv_cache": kv_cache}
    return _lower_pair("xla_ops.reshape_and_cache_stacked", key, value, caches, *rest)


def _lower_pair(
    target: str,
    key: torch.Tensor,
    value: torch.Tensor,
    caches: dict[str, torch.Tensor],
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    kv_cache_dtype: str,
    geometry: list[int],
    debug_mode: bool,
) -> CustomCall:
    """Writes keys and values into `caches`, by name: a buffer for each, or one."""
    _check_rows(key, slot_mapping, value)
    _check_scales(key, k_scale, v_scale)
    return CustomCall(
        target,
        (
            "key",
            "value",
            *caches,
            "slot_mapping",
            OptionalOperand("k_scale", torch.float32),  # absent, it is 1
            OptionalOperand("v_scale", torch.float32),
        ),
        tuple(Spec.of(cache) for cache in caches.values()),
        _attributes(kv_cache_dtype, geometry, debug_mode),
        dict(enumerate(caches)),
        nothing_to_do=slot_mapping.numel() == 0 or key.numel() == 0,
    )


def _lower_one(
    key_cache: torch.Tensor,
    key: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None,
    kv_cache_dtype: str,
    geometry: list[int],
    debug_mode: bool,
) -> CustomCall:
    _check_rows(key, slot_mapping)
    _check_scales(key, k_scale)
    return CustomCall(
        "xla_ops.reshape_and_cache_one",
        (
            "key",
            "key_cache",
            "slot_mapping",
            OptionalOperand("k_scale", torch.float32),
        ),
        (Spec.of(key_cache),),
        _attributes(kv_cache_dtype, geometry, debug_mode),
        {0: "key_cache"},
        nothing_to_do=slot_mapping.numel() == 0 or key.numel() == 0,
    )


_ATTRIBUTES = (
    "num_blocks",
    "page_size",
    "key_x",
    "key_block_stride",
    "key_offset",
    "value_block_stride",
    "value_offset",
)


def _attributes(
    kv_cache_dtype: str, geometry: list[int], debug_mode: bool
) -> dict[str, AttributeValue]:
    values = dict(zip(_ATTRIBUTES, geometry, strict=False))
    return {"kv_cache_dtype": kv_cache_dtype, **values, "debug": debug_mode}


def _reference_one(
    key_cache: torch.Tensor,
    key: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None,
    kv_cache_dtype: str,
    geometry: list[int],
    _: bool,
) -> torch.Tensor:
    return _write(key_cache, key, slot_mapping, k_scale, kv_cache_dtype, *geometry)


def _reference_stacked(
    kv_cache: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    kv_cache_dtype: str,
    geometry: list[int],
    _: bool,
) -> torch.Tensor:
    num_blocks, page_size, x, *places = geometry
    for rows, scale, x_of, place in (
        (key, k_scale, x, places[:2]),
        (value, v_scale, 1, places[2:]),
    ):
        geometry = [num_blocks, page_size, x_of, *place]
        kv_cache = _write(
            kv_cache, rows, slot_mapping, scale, kv_cache_dtype, *geometry
        )
    return kv_cache


def _reference_both(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    kv_cache_dtype: str,
    geometry: list[int],
    _: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    num_blocks, page_size, x, *places = geometry
    keys = [num_blocks, page_size, x, *places[:2]]
    values = [num_blocks, page_size, 1, *places[2:]]
    return (
        _write(key_cache, key, slot_mapping, k_scale, kv_cache_dtype, *keys),
        _write(value_cache, value, slot_mapping, v_scale, kv_cache_dtype, *values),
    )


def _write(
    buffer: torch.Tensor,
    rows: torch.Tensor,
    slot_mapping: torch.Tensor,
    scale: torch.Tensor | None,
    kv_cache_dtype: str,
    num_blocks: int,
    page_size: int,
    x: int,
    block_stride: int,
    offset: int,
) -> torch.Tensor:
    """Returns `buffer` with the rows written into the cache that lies in it."""
    _, num_kv_heads, head_dim = rows.shape
    stored = paged_cache.convert(rows[: slot_mapping.shape[0]], scale, kv_cache_dtype)
    # fp8 arithmetic is rare: move the bits as bytes.
    bits = buffer.view(torch.uint8) if buffer.element_size() == 1 else buffer
    stored = stored.view(torch.uint8) if buffer.element_size() == 1 else stored
    valid = (slot_mapping >= 0) & (slot_mapping < num_blocks * page_size)
    block = torch.div(slot_mapping, page_size, rounding_mode="floor")
    start = offset + block * block_stride + (slot_mapping - block * page_size) * x
    d = torch.arange(num_kv_heads * head_dim, device=rows.device)
    lanes = (d - d % x) * page_size + d % x
    index = start[:, None] + lanes
    # Skipped rows land in one spare element past the end.
    flat = torch.cat([bits.reshape(-1), bits.new_zeros(1)])
    index = torch.where(valid[:, None], index, flat.numel() - 1)
    flat = flat.index_put((index,), stored.reshape(index.shape))
    return flat[:-1].reshape(buffer.shape).view(buffer.dtype)


_COMMON = "str kv_cache_dtype, SymInt[] geometry, bool debug"


def _splits(args: Mapping[str, Any]) -> sharding.Rule:
    """Heads of keys, values and caches; every device sees all tokens and slots."""
    num_blocks, page_size, x, *places = args["geometry"]
    names = [n for n in ("key_cache", "value_cache", "kv_cache") if n in args]
    owners = names if len(names) == len(places) // 2 else names * 2

    def local(move: sharded_cache.Move, pieces: int) -> list[int]:
        del pieces  # heads are not in the geometry
        owner_of = [name for name in owners for _ in ("block_stride", "offset")]
        moved = [move(n, i) for n, i in zip(owner_of, places, strict=True)]
        return [num_blocks, page_size, x, *moved]

    heads = dict.fromkeys(names, args["key"].shape[2] * page_size)
    return sharded_cache.written_rule(_check.op, args, heads, local)


_both = Op(
    "reshape_and_cache_both",
    "(Tensor key, Tensor value, Tensor key_cache, Tensor value_cache,"
    " Tensor slot_mapping, Tensor? k_scale, Tensor? v_scale,"
    f" {_COMMON}) -> (Tensor, Tensor)",
    _lower_both,
    _reference_both,
    autocast=paged_cache.cast_rows,
    splits=_splits,
    public_name="reshape_and_cache",
)
_stacked = Op(
    "reshape_and_cache_stacked",
    "(Tensor kv_cache, Tensor key, Tensor value, Tensor slot_mapping,"
    f" Tensor? k_scale, Tensor? v_scale, {_COMMON}, Tensor? donor) -> Tensor",
    _lower_stacked,
    _reference_stacked,
    autocast=paged_cache.cast_rows,
    splits=_splits,
    public_name="reshape_and_cache",
)
_one = Op(
    "reshape_and_cache_one",
    "(Tensor key_cache, Tensor key, Tensor slot_mapping, Tensor? k_scale,"
    f" {_COMMON}, Tensor? donor) -> Tensor",
    _lower_one,
    _reference_one,
    autocast=paged_cache.cast_rows,
    splits=_splits,
    public_name="reshape_and_cache",
)

front.define(
    NAMESPACE,
    "reshape_and_cache(Tensor key, Tensor value, Tensor(a!) key_cache,"
    " Tensor(b!) value_cache, Tensor slot_mapping, str kv_cache_dtype,"
    " Tensor? k_scale, Tensor? v_scale) -> ()",
    _front,
    autocast=paged_cache.cast_rows,
)
