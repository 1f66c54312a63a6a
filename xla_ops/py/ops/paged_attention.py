"""Attention of ragged queries over a paged KV cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..core import front, paged_cache, scalars
from ..core.checks import Checker
from ..core.foreign import Foreign
from ..core.lazy import torch
from . import attention, attention_backward

NAMES = attention.Names(
    op="paged_attention",
    query="query",
    key="key_cache",
    value="value_cache",
    cu_seqlens_q="query_start_loc",
    seqused_k="context_lens",
    block_table="block_tables",
    scale="scale",
    soft_cap="soft_cap",
    cache="kv_cache",
)
_check = Checker(NAMES.op)


def paged_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor | Sequence[torch.Tensor],
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
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attends each sequence's new tokens to its tokens in a paged KV cache.

    Prefill, chunked prefill and decode may be mixed in one batch: sequence s owns the
    query rows query_start_loc[s] to query_start_loc[s + 1], and its KV tokens, the new
    ones included, are the first context_lens[s] of the pages block_tables[s]. Row i of
    L sees token j iff j <= i + context_lens[s] - L (bottom-right causal) and, with a
    sliding window W, j > i + context_lens[s] - L - W.

    A row that sees no token, and a row of no sequence (padding), is zero. A block id
    out of range masks its tokens; context_lens, query_start_loc and num_seqs are
    clamped to what the shapes allow; `set_debug(True)` reports such block ids.

    Under torch.autocast, query is cast to the cache's dtype or, with an fp8 cache, to
    the autocast dtype. The cache is never cast.

    Gradients: of query and sinks, of both results. The cache, scales and slopes have
    none: a backward that needs it raises. Under
    torch.use_deterministic_algorithms(True) every run gives the same bits.

    Args:
        query: [num_tokens, num_heads, head_dim], float32, float16 or bfloat16; head_dim
            a multiple of 8 up to 256.
        kv_cache: [2, num_blocks, page_size, num_kv_heads, head_dim], or a pair
            (key_cache, value_cache) of [num_blocks, page_size, num_kv_heads, head_dim]
            each; query's dtype, or see kv_cache_dtype. num_kv_heads divides num_heads.
        context_lens: [max_num_seqs], int32.
        block_tables: [max_num_seqs, max_blocks], int32.
        query_start_loc: [max_num_seqs + 1], int32, not decreasing.
        num_seqs: [1], int32: how many sequences there are. Or an int, which is a
            constant of compiled programs: each new one compiles again.
        scale: factor of q.k, such as head_dim ** -0.5.
        sliding_window: how many tokens a row sees at most; None or 0: all.
        soft_cap: C of C * tanh(logit / C); None or 0: no cap.
        alibi_slopes: [num_heads] or [max_num_seqs, num_heads]; slope * distance in
            tokens is taken off a logit, after the cap.
        sinks: [num_heads], logits that add to the softmax's denominator only.
        kv_cache_dtype: "auto" (query's dtype), "fp8", "fp8_e4m3" (the same) or
            "fp8_e5m2"; an fp8 cache is uint8 or the fp8 type.
        k_scale, v_scale: what an fp8 cache's elements are multiplied by: float32, one
            element or [max_num_seqs, num_kv_heads]; None: 1. With "auto" ignored.
        return_lse: whether to return lse too.

    Returns:
        out, like `query`; with return_lse (out, lse), lse float32 [num_heads,
        num_tokens]: the natural logarithm of the softmax's denominator, the sink
        included, and +inf for rows that see no token. `merge_attn_states` takes both.

    Raises:
        ValueError: an argument breaks one of the rules above.

    Sources: Kwon et al., Efficient Memory Management for Large Language Model Serving
    with PagedAttention, 2023; Dao, FlashAttention-2, 2023.
    """
    for name, t in (
        ("query", query),
        ("context_lens", context_lens),
        ("block_tables", block_tables),
        ("query_start_loc", query_start_loc),
    ):
        _check.tensor(name, t)
    _check.text("kv_cache_dtype", kv_cache_dtype)
    _check.optional_tensors(
        alibi_slopes=alibi_slopes, sinks=sinks, k_scale=k_scale, v_scale=v_scale
    )
    scale = scalars.number(_check.op, "scale", scale)
    if sliding_window is not None:
        sliding_window = scalars.integer(_check.op, "sliding_window", sliding_window)
    if soft_cap is not None:
        soft_cap = scalars.number(_check.op, "soft_cap", soft_cap)
    return_lse = scalars.flag(_check.op, "return_lse", return_lse)
    num_seqs = count_on(_check, num_seqs, query.device)
    stacked = isinstance(kv_cache, (torch.Tensor, Foreign))
    if not stacked:
        if not isinstance(kv_cache, (list, tuple)):
            got = type(kv_cache).__name__
            rule = f"{_check.op}: kv_cache must be a tensor or two in a list"
            raise TypeError(f"{rule}, got {got}")
        kv_cache = list(kv_cache)
    for cache in (kv_cache,) if stacked else kv_cache:
        _check.tensor("kv_cache", cache)
    if isinstance(query, Foreign):
        call = _front if return_lse else _front_out
    else:
        ops = torch.ops.xla_gpu
        op = ops.paged_attention_with_lse if return_lse else ops.paged_attention
        call = op.default if stacked else op.separate
    return call(
        query,
        kv_cache,
        context_lens,
        block_tables,
        query_start_loc,
        num_seqs,
        scale,
        sliding_window,
        soft_cap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        kv_cache_dtype=kv_cache_dtype,
        k_scale=k_scale,
        v_scale=v_scale,
    )


def count_on(
    check: Checker, num_seqs: torch.Tensor | int, device: torch.device
) -> torch.Tensor:
    """Returns num_seqs as an int32 tensor [1], after a check of its type."""
    if not isinstance(num_seqs, (torch.Tensor, Foreign)):
        number = scalars.integer(check.op, "num_seqs", num_seqs)
        if torch.compiler.is_compiling():
            num_seqs = torch.full((1,), number, dtype=torch.int32, device=device)
        else:
            # Data, not a constant of the lazy graph.
            num_seqs = torch.tensor([number], dtype=torch.int32, device=device)
    check.tensor("num_seqs", num_seqs)
    return num_seqs


def _front(
    query: torch.Tensor,
    kv_cache: torch.Tensor | Sequence[torch.Tensor],
    *rest: Any,
    **features: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attends over a stacked cache or a pair; returns (out, lse)."""
    if isinstance(kv_cache, (torch.Tensor, Foreign)):
        _check.require(
            kv_cache.dim() == 5 and kv_cache.shape[0] == 2,
            "kv_cache",
            "have shape [2, num_blocks, page_size, num_kv_heads, head_dim]",
            list(kv_cache.shape),
        )
    else:
        _check.require(
            len(kv_cache) == 2,
            "kv_cache",
            "be a pair (key_cache, value_cache)",
            f"{len(kv_cache)} tensors",
        )
    key_cache, value_cache = kv_cache[0], kv_cache[1]
    return _attend(query, key_cache, value_cache, *rest, **features)


def _front_out(*args: Any, **features: Any) -> torch.Tensor:
    return _front(*args, **features)[0]


def _attend(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    context_lens: torch.Tensor,
    block_tables: torch.Tensor,
    query_start_loc: torch.Tensor,
    num_seqs: torch.Tensor,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    **features: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    paged_cache.check_caches(_check, key_cache, value_cache)
    attention.check_head_dim(_check, NAMES, query, key_cache)
    cache = paged_cache.locate_to_read(_check, key_cache, value_cache)
    longest = longest_of(block_tables, cache.page_size)
    return _op(
        *attention.arguments(
            _check,
            query,
            key_cache,
            value_cache,
            cache,
            attention.Batch(
                query_start_loc,
                seqused_k=context_lens,
                block_table=block_tables,
                num_seqs=num_seqs,
            ),
            attention.Features(**features),
            scale,
            (window_left(_check, sliding_window, longest), 0),
            soft_cap or 0.0,
            longest,
        )
    )


def longest_of(block_tables: torch.Tensor, page_size: int) -> int:
    """How many tokens a sequence has at most."""
    return (block_tables.shape[-1] if block_tables.dim() else 0) * page_size


def window_left(check: Checker, sliding_window: int | None, longest: int) -> int:
    """The window as the functional op has it, after a check."""
    window = sliding_window or 0
    check.require(window >= 0, "sliding_window", "be at least 0", window)
    # One as wide as the table hides nothing.
    return window - 1 if window < longest else -1


_op = attention.declare(NAMES, attention_backward.declare(NAMES))

_TAIL = (
    "Tensor context_lens, Tensor block_tables, Tensor query_start_loc,"
    " Tensor num_seqs, float scale, int? sliding_window=None,"
    f" float? soft_cap=None, *, {attention.FEATURES_SCHEMA})"
)
_FORMS: tuple[tuple[str, Callable, str], ...] = (
    ("paged_attention", _front_out, "Tensor"),
    ("paged_attention_with_lse", _front, "(Tensor out, Tensor lse)"),
)
for _name, _kernel, _results in _FORMS:
    for _overload, _type in (("", "Tensor"), (".separate", "Tensor[]")):
        front.define(
            "xla_gpu",
            f"{_name}{_overload}(Tensor query, {_type} kv_cache, {_TAIL} -> {_results}",
            _kernel,
            autocast=attention.autocast("query", "kv_cache", "kv_cache"),
            public_name=NAMES.op,
        )
