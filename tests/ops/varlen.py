"""Batches of attention, and what they mean: for the tests of flash_attn_varlen."""

import dataclasses
import itertools

import pytest
import torch

import xla_ops
from support import assert_close_to_exact, int32

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
FP8 = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


def attend(query, keys, values, query_lens, dtype, options):
    """The op by a loop over sequences, in `dtype` throughout.

    Args:
        keys, values: of each sequence, [L_k, num_kv_heads, head_dim].
        options: of flash_attn_varlen; those of the mask and the logits count.
    """
    num_tokens, num_heads, head_dim = query.shape
    out = torch.zeros(query.shape, dtype=dtype)
    lse = torch.full((num_heads, num_tokens), torch.inf, dtype=dtype)
    left = options.get("window_left", -1)
    right = 0 if options.get("is_causal") else options.get("window_right", -1)
    scale = options.get("softmax_scale") or head_dim**-0.5
    cap, slopes = options.get("softcap", 0.0), options.get("alibi_slopes")
    sinks = options.get("sinks")
    row = 0
    for s, (k, v) in enumerate(zip(keys, values, strict=True)):
        rows = slice(row, row + query_lens[s])
        row += query_lens[s]
        if not query_lens[s] or not len(k):
            continue
        group = num_heads // k.shape[1]
        k, v = (t.to(dtype).repeat_interleave(group, 1) for t in (k, v))
        logits = torch.einsum("ihd,jhd->hij", query[rows].to(dtype), k) * scale
        if cap:
            logits = cap * torch.tanh(logits / cap)
        position = torch.arange(query_lens[s])[:, None] + len(k) - query_lens[s]
        token = torch.arange(len(k))
        if slopes is not None:
            slope = (slopes[s] if slopes.dim() == 2 else slopes).to(dtype)
            logits = logits - slope[:, None, None] * (position - token).abs().to(dtype)
        visible = torch.ones(query_lens[s], len(k), dtype=torch.bool)
        if left >= 0:
            visible &= token >= position - left
        if right >= 0:
            visible &= token <= position + right
        seen = visible.any(-1)[:, None]
        # Rows that see nothing keep numbers, so that they have derivatives, of zero.
        logits = logits.masked_fill(~visible & seen, -torch.inf)
        if sinks is not None:
            sink = sinks.to(dtype)[:, None, None].expand(-1, query_lens[s], 1)
            logits = torch.cat([logits, sink], -1)
        weights = logits.softmax(-1)[..., : len(k)]
        mixed = torch.einsum("hij,jhd->ihd", weights, v)
        out[rows] = torch.where(seen[..., None], mixed, 0)
        lse[:, rows] = torch.where(seen[:, 0], logits.logsumexp(-1), torch.inf)
    return out, lse


@dataclasses.dataclass
class Batch:
    """Arguments of the op, and what they mean: each sequence's keys and values."""

    arguments: dict
    keys: list
    values: list
    query_lens: list

    def check(self, path, **options):
        """Runs the op and holds its results to the accuracy rule."""
        arguments = {**self.arguments, **options}
        (out, lse), _ = path.run(lambda a: xla_ops.flash_attn_varlen(**a), arguments)
        query = arguments["q"]
        assert (out.dtype, lse.dtype) == (query.dtype, torch.float32)
        plain = query, self.keys, self.values, self.query_lens
        exact, exact_lse = attend(*plain, torch.float64, options)
        rounded, _ = attend(*plain, query.dtype, options)
        assert_close_to_exact(out, rounded, exact, floor=2e-6)
        # Whatever the dtype, logits and lse are float32.
        _, plain_lse = attend(*plain, torch.float32, options)
        seen = exact_lse < torch.inf
        assert torch.equal(lse == torch.inf, ~seen)
        assert_close_to_exact(lse[seen], plain_lse[seen], exact_lse[seen], floor=1e-5)
        assert torch.equal(out[~seen.all(0)], torch.zeros_like(out[~seen.all(0)]))
        return out, lse


def prefix_sums(lens):
    return int32(*itertools.accumulate(lens, initial=0))


def common(query_lens, kv_lens, heads, dim, dtype):
    return {
        "q": torch.randn(sum(query_lens), heads, dim).to(dtype),
        "cu_seqlens_q": prefix_sums(query_lens),
        "max_seqlen_q": max(query_lens, default=0),
        "max_seqlen_k": max(kv_lens, default=0),
    }


def contiguous(query_lens, kv_lens, heads, kv_heads, dim, dtype, pads=None, slack=0):
    """Keys in rows; those that no sequence owns are poisoned."""
    pads = pads or [0] * len(kv_lens)
    room = [pad + n + slack for pad, n in zip(pads, kv_lens, strict=True)]
    kv = torch.full((2, sum(room) + 3, kv_heads, dim), torch.nan).to(dtype)
    cu_seqlens_k = prefix_sums(room)
    keys, values = [], []
    for start, pad, n in zip(cu_seqlens_k.tolist(), pads, kv_lens, strict=False):
        rows = kv[:, start + pad : start + pad + n]
        rows.copy_(torch.randn(rows.shape))
        keys.append(rows[0])
        values.append(rows[1])
    arguments = common(query_lens, kv_lens, heads, dim, dtype)
    arguments |= {"k": kv[0], "v": kv[1], "cu_seqlens_k": cu_seqlens_k}
    if any(pads):
        arguments["leftpad_k"] = int32(*pads)
    if slack:
        used = (pad + n for pad, n in zip(pads, kv_lens, strict=True))
        arguments["seqused_k"] = int32(*used)
    return Batch(arguments, keys, values, query_lens)


def paged(query_lens, kv_lens, heads, kv_heads, dim, dtype, page, spare=2):
    """Keys in shuffled pages; what no sequence owns is poisoned, block ids too."""
    blocks_of = [-(-n // page) for n in kv_lens]
    order = torch.randperm(sum(blocks_of) + spare).tolist()
    kv = torch.full((2, len(order), page, kv_heads, dim), torch.nan).to(dtype)
    width = max([*blocks_of, 1]) + 1
    tables, keys, values = [], [], []
    for n, blocks in zip(kv_lens, blocks_of, strict=True):
        mine, order = order[:blocks], order[blocks:]
        tables.append(mine + [-7, 10**9][n % 2 :][:1] * (width - blocks))
        tokens = torch.randn(2, n, kv_heads, dim).to(dtype)
        for j in range(n):
            kv[:, mine[j // page], j % page] = tokens[:, j]
        keys.append(tokens[0])
        values.append(tokens[1])
    arguments = common(query_lens, kv_lens, heads, dim, dtype)
    arguments |= {
        "k": kv[0],
        "v": kv[1],
        "cu_seqlens_k": None,
        "seqused_k": int32(*kv_lens),
        "block_table": int32(*tables).reshape(len(tables), width),
    }
    return Batch(arguments, keys, values, query_lens)


def make(*args, page=None):
    return contiguous(*args) if page is None else paged(*args, page)


PAGES = [None, 1, 5, 16, 64]
by_page = pytest.mark.parametrize("page", PAGES)
one_of_each = pytest.mark.parametrize("page", [None, 16])
# Rows without a key, sequences without rows or keys, and ordinary ones.
QUERY_LENS, KV_LENS = [5, 1, 0, 7, 4, 1], [21, 40, 9, 3, 0, 1]
