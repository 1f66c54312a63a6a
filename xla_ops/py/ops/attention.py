"""What paged_attention and flash_attn_varlen share: one functional op each.

The contract is that of xla_ops/cc/ops/attention/attention.h. The two ops compute the
same; they differ in what their errors call the arguments.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

from ..core import debug, paged_cache
from ..core.checks import Checker, float32
from ..core.custom_call import CustomCall, operand
from ..core.dtypes import FLOAT_DTYPES
from ..core.hlo import Spec
from ..core.op import Op
from ..core.paged_cache import PagedCache

_SCHEDULER_BYTES = 128  # kAttentionSchedulerBytes of attention.h


class Names(NamedTuple):
    """What an op calls itself and the arguments that the ops name differently."""

    op: str
    query: str
    key: str
    value: str
    cu_seqlens_q: str
    seqused_k: str
    block_table: str
    scale: str
    soft_cap: str


class Batch(NamedTuple):
    """Where the sequences' query rows and KV tokens are; None is absent.

    The shapes are those of attention.h; a block_table makes the keys paged.
    """

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor | None = None
    seqused_k: torch.Tensor | None = None
    block_table: torch.Tensor | None = None
    leftpad_k: torch.Tensor | None = None
    num_seqs: torch.Tensor | None = None


class Features(NamedTuple):
    """What both ops take as trailing keyword arguments."""

    alibi_slopes: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    kv_cache_dtype: str = "auto"
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None


FEATURES_SCHEMA = (
    "Tensor? alibi_slopes=None, Tensor? sinks=None, str kv_cache_dtype='auto',"
    " Tensor? k_scale=None, Tensor? v_scale=None"
)


def declare(names: Names) -> Op:
    """Declares the functional op torch.ops.xla_ops.<names.op>."""
    return Op(
        names.op,
        "(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q,"
        " Tensor? cu_seqlens_k, Tensor? seqused_k, Tensor? block_table,"
        " Tensor? leftpad_k, Tensor? num_seqs, Tensor? alibi_slopes, Tensor? sinks,"
        " Tensor? k_scale, Tensor? v_scale, float scale, SymInt window_left,"
        " SymInt window_right, float soft_cap, str kv_cache_dtype, SymInt num_splits,"
        " SymInt[] geometry, bool debug) -> (Tensor out, Tensor lse)",
        functools.partial(_lower, names, Checker(names.op)),
        _reference,
    )


def check_head_dim(check: Checker, names: Names, query, key) -> None:
    """Checks what the functional op, which gets buffers, cannot."""
    check.rank(names.query, query, "[num_tokens, num_heads, head_dim]")
    head_dim = query.shape[2]
    if key.shape[-1] != head_dim:
        check.require(False, names.key, f"have head_dim {head_dim}", key.shape[-1])


def arguments(
    check: Checker,
    query: torch.Tensor,
    cache: PagedCache,
    batch: Batch,
    features: Features,
    scale: float,
    window: tuple[int, int],
    soft_cap: float,
    longest: int,
) -> tuple:
    """Returns the functional op's arguments.

    Args:
        longest: how many KV tokens a sequence has at most, as far as the host knows.
        The others are as in attention.h.
    """
    alibi_slopes, sinks, kv_cache_dtype, k_scale, v_scale = features
    return (
        query,
        cache.key_buffer,
        cache.value_buffer,
        *batch,
        _as_float32(check, "alibi_slopes", alibi_slopes),
        _as_float32(check, "sinks", sinks),
        k_scale,
        v_scale,
        float(scale),
        *window,
        float(soft_cap),
        kv_cache_dtype,
        num_splits(query.shape[0] * cache.num_kv_heads, longest),
        cache.geometry,
        debug.enabled(),
    )


def num_splits(rows: int, longest: int) -> int:
    """Chooses into how many pieces each sequence's KV tokens are cut.

    The lengths are on the device, so only bounds are known here: enough pieces that a
    batch of few tokens still occupies a large GPU (at most 512 thread blocks), and none
    at all for a prefill, whose rows fill it. A piece's time falls with the number of
    pieces and the time to combine them rises with it, so the best number grows as the
    root of the length: on an H100 16 for 1024 tokens, 32 for 4096, 64 for 32768.

    A power of two, so that a bound which grows token by token seldom makes a new
    program.

    Args:
        rows: query tokens times KV heads.
        longest: how many KV tokens a sequence has at most.
    """
    splits = 1
    # Of at least 64 tokens each, the kernels' tile.
    while (
        splits < 64
        and 2 * splits * rows <= 512
        and max(128 * splits, 16 * splits**2) <= longest
    ):
        splits *= 2
    return splits


def _as_float32(check: Checker, argument: str, t: torch.Tensor | None):
    """vLLM holds sinks, for one, in the model's dtype."""
    if t is None:
        return None
    check.dtype(argument, t, FLOAT_DTYPES)
    return t.float()


def _lower(
    names,
    check,
    query,
    key,
    value,
    cu_seqlens_q,
    cu_seqlens_k,
    seqused_k,
    block_table,
    leftpad_k,
    num_seqs,
    alibi_slopes,
    sinks,
    k_scale,
    v_scale,
    scale,
    window_left,
    window_right,
    soft_cap,
    kv_cache_dtype,
    num_splits,
    geometry,
    debug_mode,
) -> CustomCall:
    check.dtype(names.query, query, FLOAT_DTYPES)
    check.rank(names.query, query, "[num_tokens, num_heads, head_dim]")
    num_tokens, num_heads, head_dim = query.shape
    check.require(
        head_dim % 8 == 0 and 0 < head_dim <= 256,
        names.query,
        "have a head_dim that is a multiple of 8 up to 256",
        head_dim,
    )
    cache_dtypes = paged_cache.dtypes(check, query, kv_cache_dtype)
    check.dtype(names.key, key, cache_dtypes)
    check.dtype(names.value, value, cache_dtypes)
    place = dict(zip(paged_cache.ATTRIBUTES, (int(n) for n in geometry), strict=True))
    del place["head_dim"]
    num_kv_heads = place["num_kv_heads"]
    check.require(
        num_kv_heads > 0 and num_heads % num_kv_heads == 0,
        "num_kv_heads",
        f"divide num_heads {num_heads}",
        num_kv_heads,
    )
    batch = Batch(
        cu_seqlens_q, cu_seqlens_k, seqused_k, block_table, leftpad_k, num_seqs
    )
    max_num_seqs = _check_batch(names, check, query, batch)
    if alibi_slopes is not None:
        check.dtype("alibi_slopes", alibi_slopes, [torch.float32])
        check.require(
            list(alibi_slopes.shape) in ([num_heads], [max_num_seqs, num_heads]),
            "alibi_slopes",
            f"have shape [{num_heads}] or [{max_num_seqs}, {num_heads}]",
            list(alibi_slopes.shape),
        )
    if sinks is not None:
        check.dtype("sinks", sinks, [torch.float32])
        check.shape("sinks", sinks, [num_heads])
    for name, t in (("k_scale", k_scale), ("v_scale", v_scale)):
        if t is not None:
            _check_scale(check, name, t, [max_num_seqs, num_kv_heads], kv_cache_dtype)
    # As the handler gets them.
    scale, soft_cap = float32(scale), float32(soft_cap)
    check.require(math.isfinite(scale), names.scale, "be finite", f"{scale:g}")
    for name, window in (("window_left", window_left), ("window_right", window_right)):
        check.require(window >= -1, name, "be at least -1", window)
    check.require(
        math.isfinite(soft_cap) and soft_cap >= 0,
        names.soft_cap,
        "be finite and at least 0",
        f"{soft_cap:g}",
    )
    check.require(
        1 <= num_splits <= 1024, "num_splits", "be from 1 to 1024", num_splits
    )
    floats = {
        "alibi_slopes": alibi_slopes,
        "sinks": sinks,
        "k_scale": k_scale,
        "v_scale": v_scale,
    }
    check.same_device(
        names.query, query, **{names.key: key, names.value: value}, **floats
    )
    # Of each split, for each row and head: an accumulator, its maximum and its sum.
    partials = num_splits * num_tokens * num_heads * (head_dim + 2) * 4
    return CustomCall(
        f"xla_ops.{names.op}",
        (
            query.contiguous(),
            key,
            value,
            *(operand(t, torch.int32) for t in batch),
            *(operand(t, torch.float32) for t in floats.values()),
        ),
        (Spec.of(query), Spec((num_heads, num_tokens), torch.float32)),
        {
            "scale": scale,
            "window_left": int(window_left),
            "window_right": int(window_right),
            "soft_cap": soft_cap,
            "kv_cache_dtype": kv_cache_dtype,
            "paged": block_table is not None,
            "num_splits": int(num_splits),
            **place,
            "debug": debug_mode,
        },
        nothing_to_do=query.numel() == 0,
        scratch=(
            Spec(
                (_SCHEDULER_BYTES + (partials if num_splits > 1 else 0),), torch.uint8
            ),
        ),
    )


def _check_batch(names: Names, check: Checker, query, batch: Batch) -> int:
    """Checks the integer tensors and returns max_num_seqs."""
    paged = batch.block_table is not None
    by_name = {
        names.seqused_k: batch.seqused_k,
        names.block_table: batch.block_table,
        names.cu_seqlens_q: batch.cu_seqlens_q,
        "cu_seqlens_k": batch.cu_seqlens_k,
        "leftpad_k": batch.leftpad_k,
        "num_seqs": batch.num_seqs,
    }
    for name, t in by_name.items():
        if t is not None:
            check.dtype(name, t, [torch.int32])
    check.same_device(names.query, query, **by_name)
    if paged:
        for name in ("cu_seqlens_k", "leftpad_k"):
            _check_absent(check, name, by_name[name], f"with {names.block_table}")
        check.require(
            batch.seqused_k is not None,
            names.seqused_k,
            f"be given with {names.block_table}",
            None,
        )
        check.rank(names.seqused_k, batch.seqused_k, "[max_num_seqs]")
        max_num_seqs = batch.seqused_k.shape[0]
        table = batch.block_table
        check.require(
            table.dim() == 2 and table.shape[0] == max_num_seqs,
            names.block_table,
            f"have shape [{max_num_seqs}, max_blocks]",
            list(table.shape),
        )
        check.shape(names.cu_seqlens_q, batch.cu_seqlens_q, [max_num_seqs + 1])
    else:
        check.require(
            batch.cu_seqlens_q.dim() == 1 and batch.cu_seqlens_q.shape[0] > 0,
            names.cu_seqlens_q,
            "have shape [max_num_seqs + 1]",
            list(batch.cu_seqlens_q.shape),
        )
        max_num_seqs = batch.cu_seqlens_q.shape[0] - 1
        check.require(
            batch.cu_seqlens_k is not None,
            "cu_seqlens_k",
            f"be given without {names.block_table}",
            None,
        )
        check.shape("cu_seqlens_k", batch.cu_seqlens_k, [max_num_seqs + 1])
        for name in (names.seqused_k, "leftpad_k"):
            if by_name[name] is not None:
                check.shape(name, by_name[name], [max_num_seqs])
    if batch.num_seqs is not None:
        check.one_element("num_seqs", batch.num_seqs)
    return max_num_seqs


def _check_absent(check: Checker, name: str, t, where: str) -> None:
    if t is not None:
        check.require(False, name, f"be absent {where}", f"shape {list(t.shape)}")


def _check_scale(check: Checker, name: str, t, shape, kv_cache_dtype: str) -> None:
    if kv_cache_dtype == "auto":
        _check_absent(check, name, t, "with kv_cache_dtype auto")
    check.dtype(name, t, [torch.float32])
    check.require(
        t.numel() == 1 or list(t.shape) == shape,
        name,
        f"have 1 element or shape {shape}",
        f"shape {list(t.shape)}",
    )


def _reference(
    query,
    key,
    value,
    cu_seqlens_q,
    cu_seqlens_k,
    seqused_k,
    block_table,
    leftpad_k,
    num_seqs,
    alibi_slopes,
    sinks,
    k_scale,
    v_scale,
    scale,
    window_left,
    window_right,
    soft_cap,
    kv_cache_dtype,
    num_splits,
    geometry,
    debug_mode,
) -> tuple[torch.Tensor, torch.Tensor]:
    num_tokens, num_heads, head_dim = query.shape
    num_blocks, page_size, num_kv_heads, _, *strides, key_offset, value_offset = (
        geometry
    )
    shape = (num_blocks, page_size, num_kv_heads, head_dim)
    keys = _take(key, shape, strides, key_offset, kv_cache_dtype)
    values = _take(value, shape, strides, value_offset, kv_cache_dtype)
    integers = (
        *(cu_seqlens_q, cu_seqlens_k, seqused_k, block_table),
        *(leftpad_k, num_seqs),
    )
    batch = Batch(*(None if t is None else t.long() for t in integers))
    rows = torch.arange(num_tokens, device=query.device)
    # [num_tokens, num_kv_heads, heads of one KV head, ...] from here on.
    heads = (num_kv_heads, num_heads // max(num_kv_heads, 1))
    grouped = query.float().reshape(num_tokens, *heads, head_dim)
    out = torch.zeros_like(grouped)
    lse = grouped.new_full((num_tokens, *heads, 1), torch.inf)
    for s, (start, end, index, exists, length) in enumerate(
        _sequences(batch, num_tokens, keys.shape[0], num_blocks, page_size)
    ):
        key = keys[index] * _of_sequence(k_scale, s)
        value = values[index] * _of_sequence(v_scale, s)
        tokens = torch.arange(index.shape[0], device=query.device)
        position = (rows - start + length - (end - start))[:, None]
        visible = ((rows >= start) & (rows < end))[:, None] & exists
        visible &= tokens < length
        if window_left >= 0:
            visible &= tokens >= position - window_left
        if window_right >= 0:
            visible &= tokens <= position + window_right
        logits = _by_kv_head(grouped, key.permute(1, 2, 0)) * scale
        if soft_cap:
            logits = soft_cap * torch.tanh(logits / soft_cap)
        if alibi_slopes is not None:
            slopes = alibi_slopes
            if alibi_slopes.dim() == 2:
                slopes = _row(alibi_slopes, s)
            distance = (position - tokens).abs()[:, None, None, :]
            logits = logits - slopes.reshape(*heads, 1) * distance
        mask = visible[:, None, None, :]
        logits = logits.masked_fill(~mask, -torch.inf)
        largest = logits.amax(-1, keepdim=True)
        if sinks is not None:
            largest = torch.maximum(largest, sinks.reshape(*heads, 1))
        seen = mask.any(-1, keepdim=True)
        largest = torch.where(seen, largest, 0.0)
        weights = torch.exp(logits - largest)
        total = weights.sum(-1, keepdim=True)
        if sinks is not None:
            total = total + torch.exp(sinks.reshape(*heads, 1) - largest)
        # A masked token may hold NaN.
        value = torch.where(visible.any(0)[:, None, None], value, 0.0)
        mixed = _by_kv_head(weights, value.transpose(0, 1)) / total
        out = torch.where(seen, mixed, out)
        lse = torch.where(seen, torch.log(total) + largest, lse)
    out = out.reshape(query.shape).to(query.dtype)
    return out, lse.reshape(num_tokens, num_heads).t().contiguous()


def _by_kv_head(rows: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """[tokens, KV heads, group, n] times [KV heads, n, m]: [tokens, KV heads, group, m].

    torch_xla's matmul keeps to set_mat_mul_precision(); its einsum does not.
    """
    num_tokens, num_kv_heads, group, size = rows.shape
    by_head = rows.transpose(0, 1).reshape(num_kv_heads, num_tokens * group, size)
    products = torch.matmul(by_head, matrices)
    shape = (num_kv_heads, num_tokens, group, matrices.shape[-1])
    return products.reshape(shape).transpose(0, 1)


def _sequences(batch: Batch, num_tokens: int, num_slots: int, num_blocks, page_size):
    """Yields each sequence's first and last query row and where its KV tokens are.

    Yields:
        (start, end) of the rows, end excluded; of the tokens that it might have, the
        slots in the flattened cache and whether those exist; how many tokens it has.
        Sizes are the same for all sequences, and all numbers are tensors.
    """
    device = batch.cu_seqlens_q.device
    paged = batch.block_table is not None
    end = batch.cu_seqlens_q[0].clamp(0, num_tokens)
    first_slot = None if paged else batch.cu_seqlens_k[0].clamp(0, num_slots)
    # No slot, no token: rows then see nothing, and there is nothing to index.
    for s in range(batch.cu_seqlens_q.shape[0] - 1 if num_slots else 0):
        start = end
        end = torch.maximum(batch.cu_seqlens_q[s + 1].clamp(max=num_tokens), start)
        if paged:
            block = _row(batch.block_table, s)
            exists = (block >= 0) & (block < num_blocks)
            block = torch.where(exists, block, 0)
            offsets = torch.arange(page_size, device=device)
            index = (block[:, None] * page_size + offsets).flatten()
            exists = exists.repeat_interleave(page_size)
            length = batch.seqused_k[s].clamp(0, index.shape[0])
            if not index.shape[0]:
                continue
        else:
            slot = first_slot
            first_slot = batch.cu_seqlens_k[s + 1].clamp(max=num_slots)
            first_slot = torch.maximum(first_slot, slot)
            length = first_slot - slot
            if batch.seqused_k is not None:
                length = torch.minimum(batch.seqused_k[s].clamp(0), num_slots - slot)
            pad = torch.zeros_like(length)
            if batch.leftpad_k is not None:
                pad = torch.minimum(batch.leftpad_k[s].clamp(0), length)
            length = length - pad
            index = slot + pad + torch.arange(num_slots, device=device)
            index = index.clamp(max=num_slots - 1)
            exists = torch.ones_like(index, dtype=torch.bool)
        if batch.num_seqs is not None:
            exists = exists & (batch.num_seqs.reshape(()) > s)
        yield start, end, index, exists, length


def _of_sequence(scale: torch.Tensor | None, s: int) -> torch.Tensor | float:
    """A KV scale as it multiplies sequence s's [tokens, num_kv_heads, head_dim]."""
    if scale is None:
        return 1.0
    return scale.reshape(()) if scale.numel() == 1 else _row(scale, s)[:, None]


def _row(t: torch.Tensor, s: int) -> torch.Tensor:
    """t[s], which torch_xla 2.9.0 gets wrong below functionalization: t[0] of a square."""
    return t[s : s + 1].reshape(t.shape[1])


def _take(buffer, shape, strides, offset, kv_cache_dtype) -> torch.Tensor:
    """Gathers the cache that lies in `buffer`: float32 [slots, heads, head_dim]."""
    index = torch.full((), offset, device=buffer.device, dtype=torch.int64)
    for axis, (size, stride) in enumerate(zip(shape, (*strides, 1), strict=True)):
        step = torch.arange(size, device=buffer.device) * stride
        index = index + step.reshape(-1, *[1] * (len(shape) - axis - 1))
    index = index.flatten(0, 1)
    if buffer.dtype != torch.uint8:
        return buffer.float().reshape(-1)[index]
    # XLA tensors cannot be viewed as another dtype: look the bytes' values up.
    codes = torch.arange(256, dtype=torch.uint8).view(paged_cache.FP8[kv_cache_dtype])
    return codes.float().to(buffer.device)[buffer.reshape(-1)[index].long()]
