"""Attention of ragged queries over a paged KV cache."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..core import debug, paged_cache
from ..core.checks import Checker
from ..core.custom_call import CustomCall
from ..core.dtypes import FLOAT_DTYPES
from ..core.hlo import Spec
from ..core.op import NAMESPACE, Op

_check = Checker("paged_attention")
_INT_TENSORS = ("context_lens", "block_tables", "query_start_loc", "num_seqs")


def paged_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor | Sequence[torch.Tensor],
    context_lens: torch.Tensor,
    block_tables: torch.Tensor,
    query_start_loc: torch.Tensor,
    num_seqs: torch.Tensor,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
) -> torch.Tensor:
    """Attends each sequence's new tokens to its tokens in a paged KV cache.

    Prefill, chunked prefill and decode may be mixed in one batch: sequence s owns the
    query rows query_start_loc[s] to query_start_loc[s + 1], and its KV tokens, the new
    ones included, are the first context_lens[s] of the pages block_tables[s]. Row i of
    L sees token j iff j <= i + context_lens[s] - L (bottom-right causal) and, with a
    sliding window W, j > i + context_lens[s] - L - W.

    A row that sees no token, and a row of no sequence (padding), is zero. A block id
    out of range masks its tokens; context_lens, query_start_loc and num_seqs are
    clamped to what the shapes allow; `set_debug(True)` reports such block ids.

    Args:
        query: [num_tokens, num_heads, head_dim], float32, float16 or bfloat16; head_dim
            a multiple of 8 up to 256.
        kv_cache: [2, num_blocks, page_size, num_kv_heads, head_dim], or a pair
            (key_cache, value_cache) of [num_blocks, page_size, num_kv_heads, head_dim]
            each; query's dtype. num_kv_heads divides num_heads.
        context_lens: [max_num_seqs], int32.
        block_tables: [max_num_seqs, max_blocks], int32.
        query_start_loc: [max_num_seqs + 1], int32, not decreasing.
        num_seqs: [1], int32: how many sequences there are.
        scale: factor of q.k, such as head_dim ** -0.5.
        sliding_window: how many tokens a row sees at most; None: all.
        soft_cap: C of C * tanh(logit / C); None: no cap.

    Returns:
        A tensor like `query`.

    Raises:
        ValueError: an argument breaks one of the rules above.

    Sources: Kwon et al., Efficient Memory Management for Large Language Model Serving
    with PagedAttention, 2023; Dao, FlashAttention-2, 2023.
    """
    _check.tensor("query", query)
    if isinstance(kv_cache, torch.Tensor):
        op = torch.ops.xla_gpu.paged_attention.default
    else:
        kv_cache = list(kv_cache)
        op = torch.ops.xla_gpu.paged_attention.separate
    return op(
        query,
        kv_cache,
        context_lens,
        block_tables,
        query_start_loc,
        num_seqs,
        scale,
        sliding_window,
        soft_cap,
    )


def _front(query, kv_cache, *rest):
    _check.require(
        kv_cache.dim() == 5 and kv_cache.shape[0] == 2,
        "kv_cache",
        "have shape [2, num_blocks, page_size, num_kv_heads, head_dim]",
        list(kv_cache.shape),
    )
    return _attend(query, kv_cache[0], kv_cache[1], *rest)


def _front_separate(query, kv_cache, *rest):
    _check.require(
        len(kv_cache) == 2, "kv_cache", "be a pair (key_cache, value_cache)",
        f"{len(kv_cache)} tensors",
    )
    return _attend(query, *kv_cache, *rest)


def _attend(
    query,
    key_cache,
    value_cache,
    context_lens,
    block_tables,
    query_start_loc,
    num_seqs,
    scale,
    sliding_window=None,
    soft_cap=None,
):
    paged_cache.check_caches(_check, key_cache, value_cache)
    _check.dtype("query", query, FLOAT_DTYPES)
    _check.rank("query", query, "[num_tokens, num_heads, head_dim]")
    head_dim = query.shape[2]
    _check.require(
        key_cache.shape[3] == head_dim,
        "key_cache",
        f"have head_dim {head_dim}",
        key_cache.shape[3],
    )
    _check.same_device("query", query, key_cache=key_cache, value_cache=value_cache)
    cache = paged_cache.locate(_check, key_cache, value_cache)
    if cache is None:
        cache = paged_cache.dense(key_cache, value_cache)
    rows = (query.shape[0], query.shape[1])
    return _op(
        query,
        cache.key_buffer,
        cache.value_buffer,
        context_lens,
        block_tables,
        query_start_loc,
        num_seqs,
        float(scale),
        0 if sliding_window is None else sliding_window,
        0.0 if soft_cap is None else float(soft_cap),
        _num_splits(*rows, cache, block_tables),
        cache.geometry,
        debug.enabled(),
    )[0]


def _num_splits(num_tokens, num_heads, cache, block_tables) -> int:
    """Chooses into how many pieces each sequence's KV tokens are cut.

    The lengths are on the device, so only bounds are known here: enough pieces that a
    batch of few tokens still occupies a large GPU (about 256 thread blocks), none
    shorter than 256 tokens, and none at all for a prefill, whose rows fill it.
    """
    blocks_without = num_tokens * max(cache.num_kv_heads, 1)
    longest = block_tables.shape[-1] * cache.page_size if block_tables.dim() else 0
    return max(1, min(256 // max(blocks_without, 1), longest // 256, 64))


def _lower(
    query,
    key_cache,
    value_cache,
    context_lens,
    block_tables,
    query_start_loc,
    num_seqs,
    scale,
    sliding_window,
    soft_cap,
    num_splits,
    geometry,
    debug_mode,
) -> CustomCall:
    _check.dtype("query", query, FLOAT_DTYPES)
    _check.rank("query", query, "[num_tokens, num_heads, head_dim]")
    num_tokens, num_heads, head_dim = query.shape
    _check.require(
        head_dim % 8 == 0 and 0 < head_dim <= 256,
        "query",
        "have a head_dim that is a multiple of 8 up to 256",
        head_dim,
    )
    _check.dtype("key_cache", key_cache, [query.dtype])
    _check.dtype("value_cache", value_cache, [query.dtype])
    values = dict(
        zip(paged_cache.ATTRIBUTES, (int(n) for n in geometry), strict=True)
    )
    del values["head_dim"]
    num_kv_heads = values["num_kv_heads"]
    _check.require(
        num_kv_heads > 0 and num_heads % num_kv_heads == 0,
        "num_kv_heads",
        f"divide num_heads {num_heads}",
        num_kv_heads,
    )
    tensors = (context_lens, block_tables, query_start_loc, num_seqs)
    for name, t in zip(_INT_TENSORS, tensors, strict=True):
        _check.dtype(name, t, [torch.int32])
        _check.same_device("query", query, **{name: t})
    _check.rank("context_lens", context_lens, "[max_num_seqs]")
    max_num_seqs = context_lens.shape[0]
    _check.require(
        block_tables.dim() == 2 and block_tables.shape[0] == max_num_seqs,
        "block_tables",
        f"have shape [{max_num_seqs}, max_blocks]",
        list(block_tables.shape),
    )
    _check.shape("query_start_loc", query_start_loc, [max_num_seqs + 1])
    _check.one_element("num_seqs", num_seqs)
    _check.require(math.isfinite(scale), "scale", "be finite", f"{scale:g}")
    _check.require(
        sliding_window >= 0, "sliding_window", "be at least 0", sliding_window
    )
    _check.require(
        math.isfinite(soft_cap) and soft_cap >= 0,
        "soft_cap",
        "be finite and at least 0",
        f"{soft_cap:g}",
    )
    # Of each split, for each row and head: an accumulator, its maximum and its sum.
    partials = num_splits * num_tokens * num_heads * (head_dim + 2) * 4
    return CustomCall(
        "xla_ops.paged_attention",
        (
            query.contiguous(),
            key_cache,
            value_cache,
            *(t.contiguous() for t in tensors),
        ),
        (
            Spec.of(query),
            Spec((partials if num_splits > 1 else 0,), torch.uint8),
        ),
        {
            "scale": scale,
            "sliding_window": int(sliding_window),
            "soft_cap": soft_cap,
            "num_splits": int(num_splits),
            **values,
            "debug": debug_mode,
        },
        nothing_to_do=query.numel() == 0,
    )


def _reference(
    query,
    key_cache,
    value_cache,
    context_lens,
    block_tables,
    query_start_loc,
    num_seqs,
    scale,
    sliding_window,
    soft_cap,
    num_splits,
    geometry,
    debug_mode,
):
    num_blocks, page_size, num_kv_heads, head_dim, *strides, k_offset, v_offset = (
        geometry
    )
    num_tokens, num_heads, _ = query.shape
    max_num_seqs, max_blocks = block_tables.shape
    shape = (num_blocks, page_size, num_kv_heads, head_dim)
    keys = _take(key_cache, shape, strides, k_offset)
    values = _take(value_cache, shape, strides, v_offset)
    device = query.device
    rows = torch.arange(num_tokens, device=device)
    tokens = torch.arange(max_blocks * page_size, device=device)
    grouped = query.float().reshape(
        num_tokens, num_kv_heads, num_heads // num_kv_heads, head_dim
    )
    out = torch.zeros_like(grouped)
    start = query_start_loc[0].clamp(0, num_tokens)
    for s in range(max_num_seqs if num_blocks and max_blocks else 0):
        end = torch.maximum(query_start_loc[s + 1].clamp(max=num_tokens), start)
        context = context_lens[s].clamp(0, max_blocks * page_size)
        block = block_tables[s]
        readable = (block >= 0) & (block < num_blocks)
        safe = torch.where(readable, block, 0)
        key = keys[safe].reshape(-1, num_kv_heads, head_dim).float()
        value = values[safe].reshape(-1, num_kv_heads, head_dim).float()
        position = (rows - start + context - (end - start))[:, None]
        owned = ((rows >= start) & (rows < end) & (num_seqs[0] > s))[:, None]
        visible = owned & (tokens <= position) & (tokens < context)
        visible &= readable.repeat_interleave(page_size)
        if sliding_window:
            visible &= tokens > position - sliding_window
        logits = torch.einsum("tkgd,jkd->tkgj", grouped, key) * scale
        if soft_cap:
            logits = soft_cap * torch.tanh(logits / soft_cap)
        mask = visible[:, None, None, :]
        weights = torch.softmax(logits.masked_fill(~mask, -torch.inf), dim=-1)
        # A row without a visible token is 0 / 0 above; a masked token may hold NaN.
        weights = torch.where(mask, weights, 0.0)
        seen = visible.any(0)[:, None, None]
        out = out + torch.einsum(
            "tkgj,jkd->tkgd", weights, torch.where(seen, value, 0.0)
        )
        start = end
    out = out.reshape(query.shape).to(query.dtype)
    return out, torch.empty(0, dtype=torch.uint8, device=device)


def _take(buffer, shape, strides, offset):
    """Gathers the cache that lies in `buffer` as a dense tensor of `shape`."""
    index = torch.full((), offset, device=buffer.device, dtype=torch.int64)
    for axis, (size, stride) in enumerate(zip(shape, (*strides, 1), strict=True)):
        step = torch.arange(size, device=buffer.device) * stride
        index = index + step.reshape(-1, *[1] * (len(shape) - axis - 1))
    return buffer.reshape(-1)[index]


_op = Op(
    "paged_attention",
    "(Tensor query, Tensor key_cache, Tensor value_cache, Tensor context_lens,"
    " Tensor block_tables, Tensor query_start_loc, Tensor num_seqs, float scale,"
    " SymInt sliding_window, float soft_cap, SymInt num_splits, SymInt[] geometry,"
    " bool debug) -> (Tensor, Tensor)",
    _lower,
    _reference,
)

_TAIL = (
    "Tensor context_lens, Tensor block_tables, Tensor query_start_loc,"
    " Tensor num_seqs, float scale, int? sliding_window=None,"
    " float? soft_cap=None) -> Tensor"
)
_library = torch.library.Library("xla_gpu", "FRAGMENT")
_library.define(f"paged_attention(Tensor query, Tensor kv_cache, {_TAIL}")
_library.define(f"paged_attention.separate(Tensor query, Tensor[] kv_cache, {_TAIL}")
_library.impl("paged_attention", _front, "CompositeImplicitAutograd")
_library.impl("paged_attention.separate", _front_separate, "CompositeImplicitAutograd")
