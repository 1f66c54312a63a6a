"""RMSNorm and rotary embedding of new queries and keys and the write of keys and values
into a paged KV cache, in one pass over a fused projection."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..core import debug, front, in_place, paged_cache, scalars, sharding
from ..core.checks import Checker
from ..core.custom_call import CustomCall, OptionalOperand
from ..core.foreign import Foreign
from ..core.hlo import Spec
from ..core.lazy import ownership, torch, tracing
from ..core.op import NAMESPACE, Op
from .fused_qk_norm_rope import autocast, check_heads
from .fused_qk_norm_rope import reference as norm_and_rotate
from .reshape_and_cache_flash import reference_write
from .rotary_embedding import rotate

_check = Checker("fused_qk_norm_rope_and_cache")


def fused_qk_norm_rope_and_cache(
    qkv: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    eps: float,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos_sin_cache: torch.Tensor,
    is_neox: bool,
    position_ids: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_cache_dtype: str = "auto",
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Prepares a fused projection for paged attention, by one kernel.

    Normalises each head of queries and keys of `qkv` and rotates it. Queries are
    returned, dense, as `paged_attention` takes them; keys and values go into the
    caches. `qkv` is only read. It is

    - with weights, `fused_qk_norm_rope`: RMSNorm and rotation in fp32, rounded once,
    - with neither weight, `rotary_embedding`: no norm, every step of the rotation
      rounded,

    and then `reshape_and_cache_flash` of the new keys and the values: to the bit on a
    CPU, and on CUDA but for the order in which a head's squares are added up. A token
    at a position outside [0, max_position) is not rotated, one whose slot is negative
    or past the cache is not written.

    The caches are written in place: lazily, under torch.compile(backend="openxla"), and
    through views such as `kv.unbind(0)`. Separate K and V caches, as a stacked one, are
    written by the one kernel. Where CPU or CUDA tensors are compiled, and where the
    caches' strides are not alike, the ops above are called one after the other.

    It has no gradient. Under torch.autocast, the weights are cast to qkv's dtype, so is
    a cos_sin_cache that is not float32, and the scales are cast to float32.

    Args:
        qkv: [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim], float32, float16
            or bfloat16: of each token the heads of queries, of keys and of values.
        num_heads, num_kv_heads: heads of queries, and of keys as of values.
        head_dim: elements of a head; even.
        eps: positive; read with weights.
        q_weight, k_weight: [head_dim], qkv's dtype; or both None.
        cos_sin_cache: [max_position, head_dim], qkv's dtype or float32.
        is_neox: whether pair i of a head is elements (i, i + head_dim / 2), not
            (2 i, 2 i + 1).
        position_ids: [num_tokens], int64 or int32.
        key_cache, value_cache: [num_blocks, page_size, num_kv_heads, head_dim], the
            last dimension dense; permuted views give other layouts. Of qkv's dtype with
            kv_cache_dtype "auto", else uint8 or the fp8 type.
        slot_mapping: [num_cached_tokens], int64, num_cached_tokens <= num_tokens: where
            the first tokens go, page slot // page_size at offset slot % page_size. The
            others go nowhere.
        kv_cache_dtype: "auto", "fp8", "fp8_e4m3" (the same) or "fp8_e5m2".
        k_scale, v_scale: one float32 element each (default 1); read for fp8 caches.

    Returns:
        [num_tokens, num_heads, head_dim], the queries, of qkv's dtype.

    Raises:
        ValueError: an argument breaks one of the rules above.

    Sources: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019; Su et al.,
    RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021; Kwon et al.,
    Efficient Memory Management for Large Language Model Serving with PagedAttention,
    2023.

    Example:
        >>> qkv = torch.tensor([[3.0, 4.0, 6.0, 8.0, 1.0, 2.0]])
        >>> kv = torch.zeros(2, 1, 2, 1, 2)  # one block of two tokens
        >>> table = torch.tensor([[0.0, 1.0]])  # 90 degrees
        >>> zero, one = torch.tensor([0]), torch.tensor([1])
        >>> fused_qk_norm_rope_and_cache(
        ...     qkv, 1, 1, 2, 1e-6, None, None, table, True, zero, *kv.unbind(0), one
        ... )
        tensor([[[-4.,  3.]]])
        >>> kv[:, 0, 1, 0]
        tensor([[-8.,  6.],
                [ 1.,  2.]])
    """
    for name, t in (
        ("qkv", qkv),
        ("cos_sin_cache", cos_sin_cache),
        ("position_ids", position_ids),
        ("key_cache", key_cache),
        ("value_cache", value_cache),
        ("slot_mapping", slot_mapping),
    ):
        _check.tensor(name, t)
    _check.optional_tensors(
        q_weight=q_weight, k_weight=k_weight, k_scale=k_scale, v_scale=v_scale
    )
    _check.text("kv_cache_dtype", kv_cache_dtype)
    is_foreign = isinstance(qkv, Foreign)
    op = _front if is_foreign else torch.ops.xla_ops.fused_qk_norm_rope_and_cache
    return op(
        qkv,
        scalars.integer(_check.op, "num_heads", num_heads),
        scalars.integer(_check.op, "num_kv_heads", num_kv_heads),
        scalars.integer(_check.op, "head_dim", head_dim),
        scalars.number(_check.op, "eps", eps),
        q_weight,
        k_weight,
        cos_sin_cache,
        scalars.flag(_check.op, "is_neox", is_neox),
        position_ids,
        key_cache,
        value_cache,
        slot_mapping,
        kv_cache_dtype,
        k_scale,
        v_scale,
    )


def _front(
    qkv: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    eps: float,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos_sin_cache: torch.Tensor,
    is_neox: bool,
    position_ids: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_cache_dtype: str = "auto",
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    sizes: tuple[Any, ...] = (num_heads, num_kv_heads, head_dim)
    rotation: tuple[Any, ...] = (q_weight, k_weight, cos_sin_cache, position_ids)
    scales: tuple[Any, ...] = (k_scale, v_scale)
    cache = locate(
        *(_check, qkv, *sizes, eps, *rotation, key_cache, value_cache),
        *(slot_mapping, kv_cache_dtype, *scales),
    )
    if not isinstance(qkv, Foreign) and not qkv.numel():
        return qkv.new_empty(qkv.shape[0], num_heads, head_dim)
    if cache is None or _is_taken_apart(qkv, key_cache) or _share(cache):
        return _one_by_one(
            qkv,
            *sizes,
            eps,
            *rotation,
            is_neox,
            key_cache,
            value_cache,
            slot_mapping,
            kv_cache_dtype,
            k_scale,
            v_scale,
        )
    is_stacked = cache.is_stacked
    op = _stacked if is_stacked else _both
    buffers = (
        [cache.key_buffer] if is_stacked else [cache.key_buffer, cache.value_buffer]
    )
    rest = (
        *(*rotation, slot_mapping, k_scale, v_scale),
        *(*sizes, eps, is_neox, kv_cache_dtype, cache.geometry, debug.enabled()),
    )
    if not in_place.is_value(key_cache):
        donors = [None] * op.num_donors
        return op.update_at_once(qkv, *buffers, *rest, *donors)[0]
    return update(op, qkv, buffers, rest, [key_cache, value_cache])


def locate(
    check: Checker,
    qkv: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    eps: float,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos_sin_cache: torch.Tensor,
    position_ids: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_cache_dtype: str,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> paged_cache.PagedCache | None:
    """Checks the arguments and locates the caches; None: their strides differ."""
    _check_heads(
        *(check, qkv, num_heads, num_kv_heads, head_dim, eps),
        *(q_weight, k_weight, cos_sin_cache, position_ids),
    )
    paged_cache.check_caches(check, key_cache, value_cache)
    check.dtype("key_cache", key_cache, paged_cache.dtypes(check, qkv, kv_cache_dtype))
    check.require(
        list(key_cache.shape[2:]) == [num_kv_heads, head_dim],
        "key_cache",
        f"have heads and head_dim {[num_kv_heads, head_dim]}",
        list(key_cache.shape[2:]),
    )
    _check_slots(check, qkv, slot_mapping, k_scale, v_scale)
    check.same_device("qkv", qkv, key_cache=key_cache, value_cache=value_cache)
    return paged_cache.locate(check, key_cache, value_cache, to_write=True)


def _is_taken_apart(qkv: torch.Tensor, key_cache: torch.Tensor) -> bool:
    """Whether ops of one result each keep in place what one of several would not.

    What compiles programs of CPU and CUDA tensors knows those.
    """
    if isinstance(qkv, Foreign):
        return False
    is_traced = in_place.is_value(qkv) or in_place.is_value(key_cache)
    return is_traced and (qkv.device.type != "xla" or tracing.is_transformed())


def _share(cache: paged_cache.PagedCache) -> bool:
    """Whether caches that are given new values are parts of one, yet not stacked.

    A new value of the whole, which is computed from the old one, would undo that of a
    part: so each is given its own before the next is computed.
    """
    key, value = cache.key_buffer, cache.value_buffer
    if cache.is_stacked or isinstance(key, Foreign) or not in_place.is_value(key):
        return False
    return _storage(key) == _storage(value)


def _storage(t: torch.Tensor) -> int:
    """What tells whether tensors are of one: views of one, tracked or not, are."""
    if isinstance(t, tracing.FunctionalTensor):
        t = t.elem
    elif not tracing.is_plain(t):
        return id(t._base if t._is_view() else t)
    return t.untyped_storage()._cdata


def update(
    op: Op,
    qkv: torch.Tensor,
    buffers: list[torch.Tensor],
    rest: tuple,
    views: list[torch.Tensor],
) -> torch.Tensor:
    """Gives caches that are values, or another framework's, their new ones.

    Returns:
        The op's first result; the others are the caches' new values.
    """
    if isinstance(qkv, Foreign):
        first, *results = op(qkv, *buffers, *rest, *[None] * op.num_donors)
        for buffer, value in zip(buffers, results, strict=True):
            buffer.become(value)
        return first
    old, donors = in_place.prepare(op.name, buffers)
    first, *results = op(qkv, *old, *rest, *donors)
    for buffer, value in zip(buffers, results, strict=True):
        in_place.assign(buffer, value, views)
    ownership.renew([v for v in views if all(v is not b for b in buffers)])
    return first


def _one_by_one(
    qkv: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    eps: float,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos_sin_cache: torch.Tensor,
    position_ids: torch.Tensor,
    is_neox: bool,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *rest: Any,
) -> torch.Tensor:
    """The same by the ops that this one joins, which write what they rotate."""
    ops = torch.ops.xla_ops
    rotated = (num_heads + num_kv_heads) * head_dim
    heads = qkv[:, :rotated].clone()
    if q_weight is None:
        ops.rotary_embedding(
            position_ids, heads, None, head_dim, cos_sin_cache, is_neox
        )
    else:
        ops.fused_qk_norm_rope(
            *(heads, num_heads, num_kv_heads, 0, head_dim, eps, q_weight, k_weight),
            *(cos_sin_cache, is_neox, position_ids),
        )
    tokens = qkv.shape[0]
    query, key = heads.split([num_heads * head_dim, num_kv_heads * head_dim], dim=1)
    shape = (tokens, num_kv_heads, head_dim)
    # A copy: they may lie where the new keys go, which are written first.
    value = qkv[:, rotated:].clone()
    rows = (key.reshape(shape), value.reshape(shape))
    ops.reshape_and_cache_flash(*rows, key_cache, value_cache, slot_mapping, *rest)
    return query.reshape(tokens, num_heads, head_dim).contiguous()


def _check_heads(
    check: Checker,
    qkv: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    eps: float,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos_sin_cache: torch.Tensor,
    position_ids: torch.Tensor,
) -> None:
    counts = {"num_heads": num_heads, "num_kv_heads": num_kv_heads}
    check_heads(
        *(check, qkv, counts, num_heads + 2 * num_kv_heads, head_dim, eps),
        *(q_weight, k_weight, cos_sin_cache, position_ids),
    )


def _check_slots(
    check: Checker,
    qkv: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> None:
    paged_cache.check_slots(check, qkv, slot_mapping)
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is not None:
            check.scale(name, scale)
    check.same_device(
        "qkv", qkv, slot_mapping=slot_mapping, k_scale=k_scale, v_scale=v_scale
    )


def _lower_both(
    qkv: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, *rest: Any
) -> CustomCall:
    caches = {"key_cache": key_cache, "value_cache": value_cache}
    return _lower(_check, "xla_ops.fused_qk_norm_rope_and_cache", qkv, caches, *rest)


def lower_stacked(
    check: Checker, qkv: torch.Tensor, kv_cache: torch.Tensor, *rest: Any
) -> CustomCall:
    target = "xla_ops.fused_qk_norm_rope_and_cache_stacked"
    return _lower(check, target, qkv, {"kv_cache": kv_cache}, *rest)


def _lower(
    check: Checker,
    target: str,
    qkv: torch.Tensor,
    caches: dict[str, torch.Tensor],
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos_sin_cache: torch.Tensor,
    position_ids: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    eps: float,
    is_neox: bool,
    kv_cache_dtype: str,
    geometry: list[int],
    debug_mode: bool,
) -> CustomCall:
    """Writes keys and values into `caches`, by name: a buffer for each, or one."""
    _check_heads(
        *(check, qkv, num_heads, num_kv_heads, head_dim, eps),
        *(q_weight, k_weight, cos_sin_cache, position_ids),
    )
    _check_slots(check, qkv, slot_mapping, k_scale, v_scale)
    places = dict(zip(paged_cache.ATTRIBUTES, geometry, strict=True))
    query = Spec((qkv.shape[0], num_heads, head_dim), qkv.dtype)
    return CustomCall(
        target,
        (
            "qkv",
            "cos_sin_cache",
            "position_ids",
            "slot_mapping",
            OptionalOperand("q_weight", qkv.dtype),  # absent, there is no norm
            OptionalOperand("k_weight", qkv.dtype),
            OptionalOperand("k_scale", torch.float32),  # absent, it is 1
            OptionalOperand("v_scale", torch.float32),
            # From the last result's to the first's: so XLA, which pairs donated
            # buffers with results by order, gives each the buffer that it updates.
            *reversed(caches),
        ),
        (query, *(Spec.of(cache) for cache in caches.values())),
        {
            **places,  # num_kv_heads and head_dim among them
            "num_heads": num_heads,
            "eps": eps,
            "is_neox": is_neox,
            "kv_cache_dtype": kv_cache_dtype,
            "debug": debug_mode,
        },
        dict(enumerate(caches, 1)),
        nothing_to_do=qkv.numel() == 0,
    )


def _reference_both(
    qkv: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, ...]:
    query, (keys, values) = _reference(qkv, *rest)
    return query, keys(key_cache), values(value_cache)


def reference_stacked(
    qkv: torch.Tensor, kv_cache: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, ...]:
    query, (keys, values) = _reference(qkv, *rest)
    return query, values(keys(kv_cache))


def _reference(
    qkv: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos_sin_cache: torch.Tensor,
    position_ids: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    eps: float,
    is_neox: bool,
    kv_cache_dtype: str,
    geometry: list[int],
    debug_mode: bool,
) -> tuple[torch.Tensor, list[Any]]:
    """Returns queries, and functions that write keys and values into a buffer."""
    counts = (num_heads, num_kv_heads, num_kv_heads)
    heads, values = qkv.split([sum(counts[:2]) * head_dim, counts[2] * head_dim], dim=1)
    if q_weight is None or k_weight is None:
        rotation = (head_dim, cos_sin_cache, is_neox)
        heads = rotate(position_ids, heads, *rotation)
    else:
        heads = norm_and_rotate(
            *(heads, *counts[:2], 0, head_dim, eps, q_weight, k_weight),
            *(cos_sin_cache, is_neox, position_ids),
        )
    query, keys = heads.split([n * head_dim for n in counts[:2]], dim=1)
    *shape, key_offset, value_offset = geometry
    rows = (keys, values)
    places = ((k_scale, key_offset), (v_scale, value_offset))

    def writer(rows: torch.Tensor, scale: torch.Tensor | None, offset: int) -> Any:
        rows = rows.reshape(-1, num_kv_heads, head_dim)
        tail = (scale, kv_cache_dtype, shape, offset)
        return lambda buffer: reference_write(buffer, rows, slot_mapping, *tail)

    query = query.reshape(-1, num_heads, head_dim).contiguous()
    return query, [writer(r, *place) for r, place in zip(rows, places, strict=True)]


def write_autocast(
    args: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, torch.dtype]:
    scales = dict.fromkeys(("k_scale", "v_scale"), torch.float32)
    return {**autocast(args, dtype), **scales}


def write_splits(args: Mapping[str, Any]) -> sharding.Rule:
    """None: a row has all heads, and every device sees all tokens and slots."""
    caches = [name for name in ("key_cache", "value_cache", "kv_cache") if name in args]
    whole = {
        name: " ".join(f"!dimension{i}" for i in range(args[name].dim()))
        for name in caches
    }
    rows = {"qkv": "!tokens ~heads", "position_ids": "!tokens"}
    results = ("!tokens !query_heads !head_dim", *whole.values())
    return sharding.Rule({**rows, **whole}, results)


_REST = (
    "Tensor? q_weight, Tensor? k_weight, Tensor cos_sin_cache, Tensor position_ids,"
    " Tensor slot_mapping, Tensor? k_scale, Tensor? v_scale, int num_heads,"
    " int num_kv_heads, int head_dim, float eps, bool is_neox, str kv_cache_dtype,"
    " SymInt[] geometry, bool debug"
)
_both = Op(
    "fused_qk_norm_rope_and_cache_both",
    f"(Tensor qkv, Tensor key_cache, Tensor value_cache, {_REST},"
    " Tensor? donor_key_cache, Tensor? donor_value_cache) -> (Tensor, Tensor, Tensor)",
    _lower_both,
    _reference_both,
    autocast=write_autocast,
    splits=write_splits,
    public_name=_check.op,
)
_stacked = Op(
    "fused_qk_norm_rope_and_cache_stacked",
    f"(Tensor qkv, Tensor kv_cache, {_REST}, Tensor? donor_kv_cache)"
    " -> (Tensor, Tensor)",
    lambda *args: lower_stacked(_check, *args),
    reference_stacked,
    autocast=write_autocast,
    splits=write_splits,
    public_name=_check.op,
)

front.define(
    NAMESPACE,
    "fused_qk_norm_rope_and_cache(Tensor qkv, int num_heads, int num_kv_heads,"
    " int head_dim, float eps, Tensor? q_weight, Tensor? k_weight,"
    " Tensor cos_sin_cache, bool is_neox, Tensor position_ids, Tensor(a!) key_cache,"
    " Tensor(b!) value_cache, Tensor slot_mapping, str kv_cache_dtype='auto',"
    " Tensor? k_scale=None, Tensor? v_scale=None) -> Tensor",
    _front,
    autocast=write_autocast,
)
