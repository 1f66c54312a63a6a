"""All of a decoder's attention between its projections, in one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..core import debug, front, handlers, scalars
from ..core.checks import Checker
from ..core.custom_call import CustomCall, OptionalOperand
from ..core.foreign import Foreign
from ..core.hlo import Spec
from ..core.lazy import torch, tracing
from ..core.op import NAMESPACE, Op
from ..core.places import dense_strides
from . import attention, attention_reference
from .fused_qk_norm_rope_and_cache import (
    fused_qk_norm_rope_and_cache,
    locate,
    lower_stacked,
    reference_stacked,
    update,
    write_autocast,
    write_splits,
)
from .paged_attention import NAMES, count_on, longest_of, paged_attention, window_left

_check = Checker("fused_qk_norm_rope_and_paged_attention")
_NAMES = NAMES._replace(op=_check.op, query="qkv")


def fused_qk_norm_rope_and_paged_attention(
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
    context_lens: torch.Tensor,
    block_tables: torch.Tensor,
    query_start_loc: torch.Tensor,
    num_seqs: torch.Tensor | int,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    *,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    kv_cache_dtype: str = "auto",
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Prepares a fused projection, writes the cache and attends over it.

    It is `fused_qk_norm_rope_and_cache` of the first arguments and `paged_attention` of
    its queries, to the bit. By one call, the attention of a decode step on a GPU of
    compute capability 9.0 or later starts while the kernel before it still writes.

    One call it is of XLA tensors whose keys and values are parts of one buffer, such as
    `kv.unbind(0)`, lazily and under torch.compile. Elsewhere the two are called one
    after the other: under torch_xla's SPMD, and of other tensors and arrays.

    It has no gradient. Under torch.autocast arguments are cast as those of
    `fused_qk_norm_rope_and_cache` are, alibi_slopes and sinks to float32; queries stay
    in qkv's dtype.

    Args:
        qkv to slot_mapping: as fused_qk_norm_rope_and_cache has them.
        context_lens to soft_cap, alibi_slopes, sinks: as paged_attention has them.
        kv_cache_dtype, k_scale, v_scale: the same; scales of one element.

    Returns:
        [num_tokens, num_heads, head_dim], qkv's dtype.

    Raises:
        ValueError: an argument breaks a rule of the two ops.

    Sources: those of the two ops.

    Example:
        >>> qkv = torch.arange(24.0).view(1, 24)  # a token's query, key and value
        >>> kv = torch.zeros(2, 1, 2, 1, 8)  # one block of two tokens
        >>> table = torch.zeros(1, 8)
        >>> zero = torch.tensor([0])
        >>> batch = [torch.tensor(x, dtype=torch.int32) for x in ([1], [[0]], [0, 1])]
        >>> fused_qk_norm_rope_and_paged_attention(
        ...     *(qkv, 1, 1, 8, 1e-6, None, None, table, True, zero),
        ...     *(*kv.unbind(0), zero, *batch, 1, 0.5),
        ... )
        tensor([[[16., 17., 18., 19., 20., 21., 22., 23.]]])
    """
    for name, t in (
        ("qkv", qkv),
        ("cos_sin_cache", cos_sin_cache),
        ("position_ids", position_ids),
        ("key_cache", key_cache),
        ("value_cache", value_cache),
        ("slot_mapping", slot_mapping),
        ("context_lens", context_lens),
        ("block_tables", block_tables),
        ("query_start_loc", query_start_loc),
    ):
        _check.tensor(name, t)
    _check.optional_tensors(
        q_weight=q_weight,
        k_weight=k_weight,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        k_scale=k_scale,
        v_scale=v_scale,
    )
    _check.text("kv_cache_dtype", kv_cache_dtype)
    if sliding_window is not None:
        sliding_window = scalars.integer(_check.op, "sliding_window", sliding_window)
    if soft_cap is not None:
        soft_cap = scalars.number(_check.op, "soft_cap", soft_cap)
    is_foreign = isinstance(qkv, Foreign)
    op = _front if is_foreign else getattr(torch.ops.xla_ops, _check.op)
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
        context_lens,
        block_tables,
        query_start_loc,
        count_on(_check, num_seqs, qkv.device),
        scalars.number(_check.op, "scale", scale),
        sliding_window,
        soft_cap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        kv_cache_dtype=kv_cache_dtype,
        k_scale=k_scale,
        v_scale=v_scale,
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
    context_lens: torch.Tensor,
    block_tables: torch.Tensor,
    query_start_loc: torch.Tensor,
    num_seqs: torch.Tensor,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    *,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    kv_cache_dtype: str = "auto",
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    sizes: tuple[Any, ...] = (num_heads, num_kv_heads, head_dim)
    caches: tuple[Any, ...] = (key_cache, value_cache)
    fp8: tuple[Any, ...] = (kv_cache_dtype, k_scale, v_scale)
    batch = (context_lens, block_tables, query_start_loc, num_seqs)
    cache = locate(
        *(_check, qkv, *sizes, eps, q_weight, k_weight, cos_sin_cache, position_ids),
        *(*caches, slot_mapping, *fp8),
    )
    alibi_slopes = attention.as_float32(_check, "alibi_slopes", alibi_slopes)
    sinks = attention.as_float32(_check, "sinks", sinks)
    is_fp8 = kv_cache_dtype != "auto"
    longest = longest_of(block_tables, key_cache.shape[1])
    rest = (
        *(q_weight, k_weight, cos_sin_cache, position_ids, slot_mapping),
        *(k_scale if is_fp8 else None, v_scale if is_fp8 else None, *batch),
        *(alibi_slopes, sinks),
        *(*sizes, eps, is_neox, kv_cache_dtype),
    )
    window = window_left(_check, sliding_window, longest)
    how = (scale, window, soft_cap or 0.0, debug.enabled())
    if cache is not None and cache.is_stacked and _may_join(qkv):
        rest = (*rest, cache.geometry, *how)
        return update(_op, qkv, [cache.key_buffer], rest, list(caches))
    # In this function's name: the two would say theirs.
    _check_read(qkv, key_cache, rest, how)
    query = fused_qk_norm_rope_and_cache(
        *(qkv, *sizes, eps, q_weight, k_weight, cos_sin_cache, is_neox),
        *(position_ids, *caches, slot_mapping, *fp8),
    )
    out = paged_attention(
        *(query, list(caches), *batch, scale, sliding_window, soft_cap),
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        kv_cache_dtype=kv_cache_dtype,
        k_scale=k_scale,
        v_scale=v_scale,
    )
    assert not isinstance(out, tuple)
    return out


class _Queries(Foreign):
    """What a lowering asks of queries that no tensor holds."""

    def __init__(self, qkv: torch.Tensor, shape: tuple[int, ...]):
        self.shape, self.dtype, self.device = shape, qkv.dtype, qkv.device


def _check_read(
    qkv: torch.Tensor, key_cache: torch.Tensor, rest: tuple, how: tuple
) -> None:
    """Checks what the second op checks, of caches that lie anywhere."""
    # One cache stands for both, wherever it lies.
    geometry = [*key_cache.shape, *dense_strides(key_cache.shape)[:3], 0, 0]
    to_write, to_read = _parts(*(qkv, key_cache, *rest, geometry, *how))
    num_heads, _, head_dim = to_write[9:12]
    query = _Queries(qkv, (qkv.shape[0], num_heads, head_dim))
    attention.lower(_NAMES, _check, to_read(query, key_cache))


def _may_join(qkv: torch.Tensor) -> bool:
    """Whether it may be one call, which is of XLA's graphs and not to be split."""
    if isinstance(qkv, Foreign) or qkv.device.type != "xla" or not qkv.numel():
        return False
    return not tracing.is_transformed() and not handlers.is_spmd()


def _parts(
    qkv: torch.Tensor,
    kv_cache: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos_sin_cache: torch.Tensor,
    position_ids: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    context_lens: torch.Tensor,
    block_tables: torch.Tensor,
    query_start_loc: torch.Tensor,
    num_seqs: torch.Tensor,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    eps: float,
    is_neox: bool,
    kv_cache_dtype: str,
    geometry: list[int],
    scale: float,
    window: int,
    soft_cap: float,
    debug_mode: bool,
    donor: torch.Tensor | None = None,
) -> tuple[tuple, Callable[[Any, torch.Tensor], attention.Arguments]]:
    """The functional ops' arguments: of the one that writes, and, given queries and the
    cache, of the one that reads."""
    to_write = (
        *(qkv, kv_cache, q_weight, k_weight, cos_sin_cache, position_ids),
        *(slot_mapping, k_scale, v_scale, num_heads, num_kv_heads, head_dim, eps),
        *(is_neox, kv_cache_dtype, geometry, debug_mode),
    )

    def to_read(query: Any, kv_cache: torch.Tensor) -> attention.Arguments:
        batch = attention.Batch(
            query_start_loc,
            seqused_k=context_lens,
            block_table=block_tables,
            num_seqs=num_seqs,
        )
        return attention.Arguments(
            *(query, kv_cache, kv_cache, *batch, alibi_slopes, sinks),
            *(k_scale, v_scale, scale, window, 0, soft_cap, kv_cache_dtype),
            *(0, geometry, debug_mode),
        )

    return to_write, to_read


def _lower(*args: Any) -> CustomCall:
    to_write, to_read = _parts(*args)
    qkv, kv_cache = to_write[:2]
    first = lower_stacked(_check, *to_write)
    query, new_cache = first.results
    second = attention.lower(
        _NAMES,
        _check,
        to_read(_Queries(qkv, query.shape), kv_cache),
    )
    out, lse = second.results
    attributes = {**first.attributes, **second.attributes}
    del attributes["paged"]
    *prepared, cache = first.operands
    floats = (OptionalOperand(n, torch.float32) for n in ("alibi_slopes", "sinks"))
    return CustomCall(
        f"xla_ops.{_check.op}",
        (
            *prepared,
            *("query_start_loc", "context_lens", "block_tables", "num_seqs"),
            *floats,
            cache,
        ),
        (out, new_cache),
        attributes,
        {1: "kv_cache"},
        nothing_to_do=first.nothing_to_do,
        scratch=(Spec(query.shape, query.dtype), lse, *second.scratch),
    )


def _reference(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    to_write, to_read = _parts(*args)
    query, kv_cache = reference_stacked(*to_write)
    return attention_reference.reference(to_read(query, kv_cache))[0], kv_cache


def _autocast(args: Mapping[str, Any], dtype: torch.dtype) -> dict[str, torch.dtype]:
    features = dict.fromkeys(("alibi_slopes", "sinks"), torch.float32)
    return {**write_autocast(args, dtype), **features}


_op = Op(
    f"{_check.op}_stacked",
    "(Tensor qkv, Tensor kv_cache, Tensor? q_weight, Tensor? k_weight,"
    " Tensor cos_sin_cache, Tensor position_ids, Tensor slot_mapping,"
    " Tensor? k_scale, Tensor? v_scale, Tensor context_lens, Tensor block_tables,"
    " Tensor query_start_loc, Tensor num_seqs, Tensor? alibi_slopes, Tensor? sinks,"
    " int num_heads, int num_kv_heads, int head_dim, float eps, bool is_neox,"
    " str kv_cache_dtype, SymInt[] geometry, float scale, SymInt window_left,"
    " float soft_cap, bool debug, Tensor? donor_kv_cache) -> (Tensor, Tensor)",
    _lower,
    _reference,
    autocast=_autocast,
    # None, as of the one that writes: a row has all heads.
    splits=write_splits,
    public_name=_check.op,
)

front.define(
    NAMESPACE,
    f"{_check.op}(Tensor qkv, int num_heads, int num_kv_heads, int head_dim, float eps,"
    " Tensor? q_weight, Tensor? k_weight, Tensor cos_sin_cache, bool is_neox,"
    " Tensor position_ids, Tensor(a!) key_cache, Tensor(b!) value_cache,"
    " Tensor slot_mapping, Tensor context_lens, Tensor block_tables,"
    " Tensor query_start_loc, Tensor num_seqs, float scale, int? sliding_window=None,"
    f" float? soft_cap=None, *, {attention.FEATURES_SCHEMA}) -> Tensor",
    _front,
    autocast=_autocast,
)
