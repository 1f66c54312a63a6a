"""Writes new keys and values into a paged KV cache, in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..core import debug, front, in_place, paged_cache, sharded_cache, sharding
from ..core.checks import Checker
from ..core.custom_call import CustomCall, OptionalOperand
from ..core.dtypes import FLOAT_DTYPES
from ..core.foreign import Foreign
from ..core.hlo import AttributeValue, Spec
from ..core.lazy import torch
from ..core.op import NAMESPACE, Op

_check = Checker("reshape_and_cache_flash")


def reshape_and_cache_flash(
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

    Token t goes to page slot // page_size at offset slot % page_size, where
    slot = slot_mapping[t]. A negative slot skips its token (padding), and so does one
    past the cache; `set_debug(True)` reports the latter. Tokens should have slots of
    their own: where several share one, each element of it is that of any of them (of
    the last, by the CPU's custom call), so a head may be a mixture; pad with -1, not
    with a slot. With an fp8 cache the value stored is fp8(float(x) / scale), rounded to
    nearest even and saturated; NaN stays NaN.

    In place: lazily, under torch.compile(backend="openxla"), and through views such as
    `kv.unbind(0)`. A stacked cache ([2, ...]) is written by one kernel, separate K and
    V caches, on XLA, by two.

    Under torch.autocast, key and value are cast to the caches' dtype or, for an fp8
    cache, value to key's, and the scales to float32.

    Args:
        key, value: [num_key_tokens, num_kv_heads, head_dim], float32, float16 or
            bfloat16; rows past slot_mapping's length are ignored.
        key_cache, value_cache: [num_blocks, page_size, num_kv_heads, head_dim], the
            last dimension dense; permuted views give other layouts. Of key's dtype with
            kv_cache_dtype "auto", else uint8 or the fp8 type.
        slot_mapping: [num_tokens], int64, num_tokens <= num_key_tokens.
        kv_cache_dtype: "auto", "fp8", "fp8_e4m3" (the same) or "fp8_e5m2".
        k_scale, v_scale: one float32 element each (default 1); read for fp8 caches.

    Raises:
        ValueError: an argument breaks one of the rules above.

    Semantics: vLLM's `_C_cache_ops.reshape_and_cache_flash`.
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
    op = _front if is_foreign else torch.ops.xla_ops.reshape_and_cache_flash
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
    paged_cache.check_caches(_check, key_cache, value_cache)
    _check_tensors(
        key, value, key_cache, slot_mapping, kv_cache_dtype, k_scale, v_scale
    )
    _check.same_device("key", key, value_cache=value_cache)
    tail = (slot_mapping, k_scale, v_scale, kv_cache_dtype)
    cache = paged_cache.locate(_check, key_cache, value_cache, to_write=True)
    if cache is None:
        for rows, one, scale in (
            (key, key_cache, k_scale),
            (value, value_cache, v_scale),
        ):
            # An odd view is written as a dense value.
            place = paged_cache.locate_to_read(_check, one, one)
            buffer, geometry = place.key_buffer, place.geometry[:-1]
            _write_one(rows, one, buffer, geometry, slot_mapping, scale, kv_cache_dtype)
    elif not in_place.is_value(key_cache):
        buffers = (cache.key_buffer, cache.value_buffer)
        _both.update_at_once(
            key, value, *buffers, *tail, cache.geometry, debug.enabled()
        )
    elif cache.is_stacked:
        in_place.update(
            _stacked,
            cache.key_buffer,
            key,
            value,
            *tail,
            cache.geometry,
            debug.enabled(),
            views=[key_cache, value_cache],
        )
    else:
        # Two calls, not one with two results: XLA pairs donated buffers with results
        # by order, and one call keeps every cache in place in some orders only.
        *shape, key_offset, value_offset = cache.geometry
        for rows, one, buffer, offset, scale in (
            (key, key_cache, cache.key_buffer, key_offset, k_scale),
            (value, value_cache, cache.value_buffer, value_offset, v_scale),
        ):
            geometry = [*shape, offset]
            _write_one(rows, one, buffer, geometry, slot_mapping, scale, kv_cache_dtype)


def _write_one(
    rows: torch.Tensor,
    cache: torch.Tensor,
    buffer: torch.Tensor,
    geometry: list[int],
    slot_mapping: torch.Tensor,
    scale: torch.Tensor | None,
    kv_cache_dtype: str,
) -> None:
    """Writes rows into a cache that lies in `buffer`, an XLA or traced tensor."""
    in_place.update(
        _one,
        buffer,
        rows,
        slot_mapping,
        scale,
        kv_cache_dtype,
        geometry,
        debug.enabled(),
        views=[cache],
    )


def _check_tensors(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_cache_dtype: str,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> None:
    _check_pair(key, value)
    _check.dtype(
        "key_cache", key_cache, paged_cache.dtypes(_check, key, kv_cache_dtype)
    )
    _check.require(
        list(key_cache.shape[2:]) == list(key.shape[1:]),
        "key_cache",
        f"have heads and head_dim {list(key.shape[1:])}",
        list(key_cache.shape[2:]),
    )
    paged_cache.check_slots(_check, key, slot_mapping)
    _check_scale("k_scale", k_scale, key)
    _check_scale("v_scale", v_scale, key)
    _check.same_device(
        "key", key, value=value, key_cache=key_cache, slot_mapping=slot_mapping
    )


def _check_pair(key: torch.Tensor, value: torch.Tensor) -> None:
    _check_rows("key", key)
    _check.dtype("value", value, [key.dtype])
    _check.shape("value", value, key.shape)


def _check_rows(name: str, rows: torch.Tensor) -> None:
    _check.dtype(name, rows, FLOAT_DTYPES)
    _check.rank(name, rows, "[num_tokens, num_kv_heads, head_dim]")


def _check_scale(name: str, scale: torch.Tensor | None, rows: torch.Tensor) -> None:
    if scale is None:
        return
    _check.scale(name, scale)
    _check.same_device("key", rows, **{name: scale})


def _attributes(
    kv_cache_dtype: str,
    geometry: list[int],
    debug_mode: bool,
    names: Sequence[str] = paged_cache.ATTRIBUTES,
) -> dict[str, AttributeValue]:
    values = dict(zip(names, geometry, strict=True))
    # The handler knows these two from the shape of key.
    del values["num_kv_heads"], values["head_dim"]
    return {"kv_cache_dtype": kv_cache_dtype, **values, "debug": debug_mode}


def _lower_both(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    *rest: Any,
) -> CustomCall:
    return _lower_pair(
        "xla_ops.reshape_and_cache_flash",
        key,
        value,
        {"key_cache": key_cache, "value_cache": value_cache},
        *rest,
    )


def _lower_stacked(
    kv_cache: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any
) -> CustomCall:
    return _lower_pair(
        "xla_ops.reshape_and_cache_flash_stacked",
        key,
        value,
        {"kv_cache": kv_cache},
        *rest,
    )


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
    _check_pair(key, value)
    paged_cache.check_slots(_check, key, slot_mapping)
    _check_scale("k_scale", k_scale, key)
    _check_scale("v_scale", v_scale, key)
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
    cache: torch.Tensor,
    rows: torch.Tensor,
    slot_mapping: torch.Tensor,
    scale: torch.Tensor | None,
    kv_cache_dtype: str,
    geometry: list[int],
    debug_mode: bool,
) -> CustomCall:
    _check_rows("key", rows)
    paged_cache.check_slots(_check, rows, slot_mapping)
    _check_scale("k_scale", scale, rows)
    return CustomCall(
        "xla_ops.reshape_and_cache_flash_one",
        (
            "key",
            "key_cache",
            "slot_mapping",
            OptionalOperand("scale", torch.float32),
        ),
        (Spec.of(cache),),
        _attributes(kv_cache_dtype, geometry, debug_mode, paged_cache.ATTRIBUTES[:-1]),
        {0: "key_cache"},
        nothing_to_do=slot_mapping.numel() == 0 or rows.numel() == 0,
    )


def _reference_one(
    cache: torch.Tensor,
    rows: torch.Tensor,
    slot_mapping: torch.Tensor,
    scale: torch.Tensor | None,
    kv_cache_dtype: str,
    geometry: list[int],
    debug_mode: bool,
) -> torch.Tensor:
    return reference_write(
        cache, rows, slot_mapping, scale, kv_cache_dtype, geometry[:-1], geometry[-1]
    )


def _reference_stacked(
    kv_cache: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    kv_cache_dtype: str,
    geometry: list[int],
    debug_mode: bool,
) -> torch.Tensor:
    *shape, key_offset, value_offset = geometry
    for rows, scale, offset in (
        (key, k_scale, key_offset),
        (value, v_scale, value_offset),
    ):
        kv_cache = reference_write(
            kv_cache, rows, slot_mapping, scale, kv_cache_dtype, shape, offset
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
    debug_mode: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    *shape, key_offset, value_offset = geometry
    return (
        reference_write(
            key_cache, key, slot_mapping, k_scale, kv_cache_dtype, shape, key_offset
        ),
        reference_write(
            value_cache,
            value,
            slot_mapping,
            v_scale,
            kv_cache_dtype,
            shape,
            value_offset,
        ),
    )


def reference_write(
    buffer: torch.Tensor,
    rows: torch.Tensor,
    slot_mapping: torch.Tensor,
    scale: torch.Tensor | None,
    kv_cache_dtype: str,
    shape: list[int],
    offset: int,
) -> torch.Tensor:
    """Returns `buffer` with the rows written into the cache that lies in it."""
    num_blocks, page_size, num_kv_heads, head_dim, *strides = shape
    block_stride, page_stride, head_stride = strides
    rows = rows[: slot_mapping.shape[0]]
    stored = paged_cache.convert(rows, scale, kv_cache_dtype)
    # fp8 arithmetic is rare: move the bits as bytes.
    bits = buffer.view(torch.uint8) if buffer.element_size() == 1 else buffer
    stored = stored.view(torch.uint8) if buffer.element_size() == 1 else stored
    valid = (slot_mapping >= 0) & (slot_mapping < num_blocks * page_size)
    block = torch.div(slot_mapping, page_size, rounding_mode="floor")
    start = block * block_stride + (slot_mapping - block * page_size) * page_stride
    heads = torch.arange(num_kv_heads, device=rows.device) * head_stride
    lanes = torch.arange(head_dim, device=rows.device)
    index = offset + start[:, None, None] + heads[:, None] + lanes
    # Skipped rows land in one spare element past the end.
    flat = torch.cat([bits.reshape(-1), bits.new_zeros(1)])
    index = torch.where(valid[:, None, None], index, flat.numel() - 1)
    flat = flat.index_put((index,), stored)
    return flat[:-1].reshape(buffer.shape).view(buffer.dtype)


def _splits(args: Mapping[str, Any]) -> sharding.Rule:
    """Heads of keys, values and caches; every device sees all tokens and slots."""
    geometry = args["geometry"]
    num_blocks, page_size, num_kv_heads, head_dim, *strides = geometry[:7]
    names = [n for n in ("key_cache", "value_cache", "kv_cache") if n in args]
    # An offset for each of keys and values, or for the one that is written.
    owners = names if len(names) == len(geometry) - 7 else names * 2

    def local(move: sharded_cache.Move, pieces: int) -> list[int]:
        return [
            num_blocks,
            page_size,
            num_kv_heads // pieces,
            head_dim,
            *(move(names[0], stride) for stride in strides),
            *(move(n, i) for n, i in zip(owners, geometry[7:], strict=True)),
        ]

    heads = dict.fromkeys(names, strides[2])
    return sharded_cache.written_rule(_check.op, args, heads, local)


_COMMON = "str kv_cache_dtype, SymInt[] geometry, bool debug"
_both = Op(
    "reshape_and_cache_flash_both",
    "(Tensor key, Tensor value, Tensor key_cache, Tensor value_cache,"
    " Tensor slot_mapping, Tensor? k_scale, Tensor? v_scale,"
    f" {_COMMON}) -> (Tensor, Tensor)",
    _lower_both,
    _reference_both,
    autocast=paged_cache.cast_rows,
    splits=_splits,
    public_name=_check.op,
)
_stacked = Op(
    "reshape_and_cache_flash_stacked",
    "(Tensor kv_cache, Tensor key, Tensor value, Tensor slot_mapping,"
    f" Tensor? k_scale, Tensor? v_scale, {_COMMON}, Tensor? donor) -> Tensor",
    _lower_stacked,
    _reference_stacked,
    autocast=paged_cache.cast_rows,
    splits=_splits,
    public_name=_check.op,
)
_one = Op(
    "reshape_and_cache_flash_one",
    "(Tensor key_cache, Tensor key, Tensor slot_mapping, Tensor? scale,"
    f" {_COMMON}, Tensor? donor) -> Tensor",
    _lower_one,
    _reference_one,
    autocast=paged_cache.cast_rows,
    splits=_splits,
    public_name=_check.op,
)

front.define(
    NAMESPACE,
    "reshape_and_cache_flash(Tensor key, Tensor value, Tensor(a!) key_cache,"
    " Tensor(b!) value_cache, Tensor slot_mapping, str kv_cache_dtype,"
    " Tensor? k_scale, Tensor? v_scale) -> ()",
    _front,
    autocast=paged_cache.cast_rows,
)
