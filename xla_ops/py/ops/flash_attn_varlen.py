"""FlashAttention of ragged queries over contiguous or paged keys and values."""

from __future__ import annotations

from typing import Any

from ..core import front, mutable, paged_cache, scalars
from ..core.checks import Checker
from ..core.foreign import Foreign
from ..core.lazy import torch
from ..core.op import NAMESPACE
from . import attention, attention_backward

_NAMES = attention.Names(
    op="flash_attn_varlen",
    query="q",
    key="k",
    value="v",
    cu_seqlens_q="cu_seqlens_q",
    seqused_k="seqused_k",
    block_table="block_table",
    scale="softmax_scale",
    soft_cap="softcap",
)
_check = Checker(_NAMES.op)


def flash_attn_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None = None,
    is_causal: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    seqused_k: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    *,
    leftpad_k: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    kv_cache_dtype: str = "auto",
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attends each sequence's query rows to its keys and values.

    Sequence s owns the rows cu_seqlens_q[s] to cu_seqlens_q[s + 1] of q, L_q of them.
    Its L_k keys are, without block_table, the rows of k from cu_seqlens_k[s] +
    leftpad_k[s]: up to cu_seqlens_k[s + 1], or up to cu_seqlens_k[s] + seqused_k[s].
    With block_table they are the first seqused_k[s] tokens of the pages block_table[s].
    Row i has position p = i + L_k - L_q and sees the keys from p - window_left to
    p + window_right; causal is window_right = 0, aligned bottom right.

    A row that sees no key, and a row of no sequence (padding), is zero and its lse is
    +inf. A block id out of range masks its tokens; lengths are clamped to what the
    shapes allow; `set_debug(True)` reports such block ids.

    Under torch.autocast, q, k and v are cast to the autocast dtype. Pages and fp8 keys
    and values are never cast; over pages of another dtype, q is cast to theirs.

    Gradients: of q, sinks, and contiguous k and v in q's dtype, of both results. Where
    k or v asks for one, views of a packed tensor are copied. Pages, fp8 keys and
    values, scales and slopes have none: a backward that needs it raises. Under
    torch.use_deterministic_algorithms(True) every run gives the same bits.

    Args:
        q: [total_q, num_heads, head_dim], float32, float16 or bfloat16; head_dim a
            multiple of 8 up to 256.
        k, v: [total_k, num_kv_heads, head_dim], or, with block_table,
            [num_blocks, page_size, num_kv_heads, head_dim]; q's dtype, or see
            kv_cache_dtype. num_kv_heads divides num_heads. Views of one packed or
            stacked tensor, and permuted caches, are read where they lie.
        cu_seqlens_q: [num_seqs + 1], int32, not decreasing.
        cu_seqlens_k: the same of k. With block_table it is read only where seqused_k
            is None, and may be None where it is not.
        max_seqlen_q, max_seqlen_k: bounds of L_q and L_k. They plan the work and hide
            nothing; of max_seqlen_k only the power of two counts, so that a growing
            bound seldom makes a new program. Each value that torch.compile meets is
            traced anew, as every int is with torch_xla: give it a constant.
        softmax_scale: factor of q.k; None: head_dim ** -0.5.
        is_causal: whether window_right is 0, whatever the argument says.
        window_left, window_right: how many keys before and after p a row sees; -1, or
            max_seqlen_k and more: all.
        softcap: C of C * tanh(logit / C); 0: no cap.
        seqused_k: [num_seqs], int32.
        block_table: [num_seqs, max_blocks], int32.
        leftpad_k: [num_seqs], int32: rows to leave out before each sequence's keys.
        alibi_slopes: [num_heads] or [num_seqs, num_heads]; slope * |p - j| is taken
            off the logit of key j, after the cap.
        sinks: [num_heads], logits that add to the softmax's denominator only.
        kv_cache_dtype: "auto" (q's dtype), "fp8", "fp8_e4m3" (the same) or
            "fp8_e5m2"; fp8 keys and values are uint8 or the fp8 type.
        k_scale, v_scale: what fp8 keys and values are multiplied by: float32, one
            element or [num_seqs, num_kv_heads]; None: 1. With "auto" ignored.

    Returns:
        out, like q, and softmax_lse, float32 [num_heads, total_q]: the natural
        logarithm of the softmax's denominator, the sink included.

    Raises:
        ValueError: an argument breaks one of the rules above.

    Sources: Dao, FlashAttention-2, 2023; Press et al., Train Short, Test Long (ALiBi),
    2022; Xiao et al., Efficient Streaming Language Models with Attention Sinks, 2024.
    Semantics: vLLM's `_vllm_fa2_C.varlen_fwd`, which takes `out` and is
    `torch.ops.xla_ops.flash_attn_varlen.out`.
    """
    for name, t in (("q", q), ("k", k), ("v", v), ("cu_seqlens_q", cu_seqlens_q)):
        _check.tensor(name, t)
    _check.text("kv_cache_dtype", kv_cache_dtype)
    _check.optional_tensors(
        cu_seqlens_k=cu_seqlens_k,
        seqused_k=seqused_k,
        block_table=block_table,
        leftpad_k=leftpad_k,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        k_scale=k_scale,
        v_scale=v_scale,
    )
    if softmax_scale is not None:
        softmax_scale = scalars.number(_check.op, "softmax_scale", softmax_scale)
    op = _front if isinstance(q, Foreign) else torch.ops.xla.flash_attn_varlen_op
    return op(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        scalars.integer(_check.op, "max_seqlen_q", max_seqlen_q),
        scalars.integer(_check.op, "max_seqlen_k", max_seqlen_k),
        softmax_scale,
        scalars.flag(_check.op, "is_causal", is_causal),
        scalars.integer(_check.op, "window_left", window_left),
        scalars.integer(_check.op, "window_right", window_right),
        scalars.number(_check.op, "softcap", softcap),
        seqused_k,
        block_table,
        leftpad_k=leftpad_k,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        kv_cache_dtype=kv_cache_dtype,
        k_scale=k_scale,
        v_scale=v_scale,
    )


def _front(*args: Any, **features: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _op(*_arguments(*args, **features))


def _arguments(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None = None,
    is_causal: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    seqused_k: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    *,
    leftpad_k: torch.Tensor | None = None,
    **features: Any,
) -> attention.Arguments:
    names = (_NAMES.key, _NAMES.value)
    if block_table is None:
        _check.rank("k", k, "[total_k, num_kv_heads, head_dim]")
        _check.shape("v", v, k.shape)
        _check.dtype("v", v, [k.dtype])
    else:
        paged_cache.check_caches(_check, k, v, names)
    attention.check_head_dim(_check, _NAMES, q, k)
    for name, bound in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        _check.require(bound >= 0, name, "be at least 0", bound)
    if block_table is None:
        cache = attention.locate_rows(k, v)
        longest = attention.smaller(max_seqlen_k, k.shape[0])
    else:
        cache = paged_cache.locate_to_read(_check, k, v, names)
        width = block_table.shape[-1] if block_table.dim() else 0
        longest = attention.smaller(max_seqlen_k, width * cache.page_size)
        if seqused_k is None and cu_seqlens_k is not None:
            _check.dtype("cu_seqlens_k", cu_seqlens_k, [torch.int32])
            _check.rank("cu_seqlens_k", cu_seqlens_k, "[max_num_seqs + 1]")
            _check.same_device("q", q, cu_seqlens_k=cu_seqlens_k)
            seqused_k = cu_seqlens_k[1:] - cu_seqlens_k[:-1]
        cu_seqlens_k = None
    batch = attention.Batch(
        cu_seqlens_q, cu_seqlens_k, seqused_k, block_table, leftpad_k
    )
    window = (
        -1 if window_left >= max_seqlen_k else window_left,
        0 if is_causal else -1 if window_right >= max_seqlen_k else window_right,
    )
    return attention.arguments(
        _check,
        q,
        k,
        v,
        cache,
        batch,
        attention.Features(**features),
        q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale,
        window,
        softcap,
        longest,
    )


def _front_out(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    seqused_k: torch.Tensor | None,
    leftpad_k: torch.Tensor | None,
    block_table: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    p_dropout: float,
    softmax_scale: float,
    zero_tensors: bool,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    return_softmax: bool,
    gen: torch.Generator | None,
) -> list[torch.Tensor]:
    """vLLM's form. zero_tensors asks for what is always so, gen is for dropout."""
    _check.require(p_dropout == 0, "p_dropout", "be 0", f"{p_dropout:g}")
    _check.require(not return_softmax, "return_softmax", "be False", return_softmax)
    arguments = _arguments(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale,
        is_causal,
        window_size_left,
        window_size_right,
        softcap,
        seqused_k,
        block_table,
        leftpad_k=leftpad_k,
        alibi_slopes=alibi_slopes,
    )
    update = mutable.Update(_op, arguments, {"out": out, "softmax_lse": None})
    return mutable.apply(_NAMES.op, update)


_op = attention.declare(_NAMES, attention_backward.declare(_NAMES))
_autocast = attention.autocast(_NAMES.query, _NAMES.key, _NAMES.value)

front.define(
    "xla",
    "flash_attn_varlen_op(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q,"
    " Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k,"
    " float? softmax_scale=None, bool is_causal=False, SymInt window_left=-1,"
    " SymInt window_right=-1, float softcap=0.0, Tensor? seqused_k=None,"
    " Tensor? block_table=None, *, Tensor? leftpad_k=None,"
    f" {attention.FEATURES_SCHEMA}) -> (Tensor out, Tensor softmax_lse)",
    _front,
    autocast=_autocast,
    public_name=_NAMES.op,
)

front.define(
    NAMESPACE,
    "flash_attn_varlen.out(Tensor q, Tensor k, Tensor v, Tensor(a!)? out,"
    " Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? seqused_k, Tensor? leftpad_k,"
    " Tensor? block_table, Tensor? alibi_slopes, int max_seqlen_q, int max_seqlen_k,"
    " float p_dropout, float softmax_scale, bool zero_tensors, bool is_causal,"
    " int window_size_left, int window_size_right, float softcap, bool return_softmax,"
    " Generator? gen) -> Tensor[]",
    _front_out,
    autocast=_autocast,
)
