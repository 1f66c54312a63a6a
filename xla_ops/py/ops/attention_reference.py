"""What attention means, in plain torch: the reference of attention.py's ops."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..core import paged_cache

if TYPE_CHECKING:
    from .attention import Arguments, Batch


def reference(a: Arguments) -> tuple[torch.Tensor, torch.Tensor]:
    num_tokens, num_heads, head_dim = a.query.shape
    num_blocks, page_size, num_kv_heads, _, *strides, key_offset, value_offset = (
        a.geometry
    )
    shape = (num_blocks, page_size, num_kv_heads, head_dim)
    keys = _take(a.key, shape, strides, key_offset, a.kv_cache_dtype)
    values = _take(a.value, shape, strides, value_offset, a.kv_cache_dtype)
    batch = a.batch._make(None if t is None else t.long() for t in a.batch)
    rows = torch.arange(num_tokens, device=a.query.device)
    # [num_tokens, num_kv_heads, heads of one KV head, ...] from here on.
    heads = (num_kv_heads, num_heads // max(num_kv_heads, 1))
    grouped = a.query.float().reshape(num_tokens, *heads, head_dim)
    out = torch.zeros_like(grouped)
    lse = grouped.new_full((num_tokens, *heads, 1), torch.inf)
    for s, (start, end, index, exists, length) in enumerate(
        _sequences(batch, num_tokens, keys.shape[0], num_blocks, page_size)
    ):
        key = keys[index] * _of_sequence(a.k_scale, s)
        value = values[index] * _of_sequence(a.v_scale, s)
        tokens = torch.arange(index.shape[0], device=a.query.device)
        position = (rows - start + length - (end - start))[:, None]
        visible = ((rows >= start) & (rows < end))[:, None] & exists
        visible &= tokens < length
        if a.window_left >= 0:
            visible &= tokens >= position - a.window_left
        if a.window_right >= 0:
            visible &= tokens <= position + a.window_right
        logits = _by_kv_head(grouped, key.permute(1, 2, 0)) * a.scale
        if a.soft_cap:
            logits = a.soft_cap * torch.tanh(logits / a.soft_cap)
        if a.alibi_slopes is not None:
            slopes = a.alibi_slopes
            if a.alibi_slopes.dim() == 2:
                slopes = _row(a.alibi_slopes, s)
            distance = (position - tokens).abs()[:, None, None, :]
            logits = logits - slopes.reshape(*heads, 1) * distance
        mask = visible[:, None, None, :]
        logits = logits.masked_fill(~mask, -torch.inf)
        largest = logits.amax(-1, keepdim=True)
        if a.sinks is not None:
            largest = torch.maximum(largest, a.sinks.reshape(*heads, 1))
        seen = mask.any(-1, keepdim=True)
        largest = torch.where(seen, largest, 0.0)
        weights = torch.exp(logits - largest)
        total = weights.sum(-1, keepdim=True)
        if a.sinks is not None:
            total = total + torch.exp(a.sinks.reshape(*heads, 1) - largest)
        # A masked token may hold NaN.
        value = torch.where(visible.any(0)[:, None, None], value, 0.0)
        mixed = _by_kv_head(weights, value.transpose(0, 1)) / total
        out = torch.where(seen, mixed, out)
        lse = torch.where(seen, torch.log(total) + largest, lse)
    out = out.reshape(a.query.shape).to(a.query.dtype)
    return out, lse.reshape(num_tokens, num_heads).t().contiguous()


def _by_kv_head(rows: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """[tokens, KV heads, group, n] times [KV heads, n, m].

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
    """t[s]. torch_xla 2.9.0 gets t[0] of a square wrong below functionalization."""
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
