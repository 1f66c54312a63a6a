"""Cases of attention: prefill, contiguous and paged, and decode."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch

import peers
import xla_ops
from batch import Batch
from case import Case, Target

BF16, FP8, I32 = torch.bfloat16, torch.float8_e4m3fn, torch.int32
PAGE = 16


def _query(batch: Batch, device) -> torch.Tensor:
    shape = (batch.num_tokens, batch.num_heads, batch.head_dim)
    return torch.randn(shape, dtype=BF16, device=device)


def _int32(values: Sequence[int], device) -> torch.Tensor:
    return torch.tensor(values, dtype=I32, device=device)


def _paged(
    batch: Batch, device, width: int = 1, dtype=BF16
) -> tuple[torch.Tensor, ...]:
    """Returns key cache, value cache and block table, pages in random order.

    Args:
        width: how many times wider than needed the block table is. What it holds past
            a sequence's pages is any block.
    """
    pages = batch.num_pages(PAGE)
    shape = (sum(pages), PAGE, batch.num_kv_heads, batch.head_dim)
    caches = [torch.randn(shape, dtype=BF16, device=device).to(dtype) for _ in "kv"]
    table = torch.randint(sum(pages), (len(pages), width * max(pages)))
    blocks_of = batch.deal(torch.randperm(sum(pages)).tolist(), PAGE)
    for row, blocks in zip(table, blocks_of, strict=True):
        row[: len(blocks)] = torch.tensor(blocks)
    return *caches, table.to(device, I32)


def _error(batch: Batch, query, kv_of, out, lse=None) -> float:
    """Relative error of some rows of a result, against float64.

    Looks at the first, the longest and the last sequence, and in each at rows
    from first to last.

    Args:
        kv_of: sequence -> its K and V, [kv_len, num_kv_heads, head_dim].
    """
    sequences = range(batch.num_seqs)
    longest = max(sequences, key=batch.kv_lens.__getitem__)
    wrong = size = 0.0
    for s in sorted({0, longest, sequences[-1]}):
        num_rows, context = batch.query_lens[s], batch.kv_lens[s]
        rows = torch.linspace(0, num_rows - 1, min(num_rows, 8)).long()
        rows = rows.unique().to(out.device)
        key, value = (t.double() for t in kv_of(s))
        first = batch.query_starts[s]
        q = query[first + rows].double()
        q = q.unflatten(1, (batch.num_kv_heads, batch.group))
        logits = torch.einsum("rkgd,jkd->kgrj", q, key) * batch.scale
        if batch.causal:
            seen = rows[:, None] + context - num_rows
            hidden = torch.arange(context, device=out.device) > seen
            logits = logits.masked_fill(hidden, -torch.inf)
        exact = torch.einsum("kgrj,jkd->rkgd", logits.softmax(-1), value)
        got = out[first + rows].double()
        wrong += (got - exact.flatten(1, 2)).square().sum().item()
        size += exact.square().sum().item()
        if lse is not None:
            exact = logits.logsumexp(-1).flatten(0, 1)
            got = lse[:, first + rows].double()
            wrong += (got - exact).square().sum().item()
    return (wrong / size) ** 0.5 if size else wrong


def _pages_of(batch, key_cache, value_cache, table):
    def kv_of(s):
        n = batch.kv_lens[s]
        pages = table[s, : -(-n // PAGE)].long()
        # As bytes: torch does not index fp8 on every device.
        taken = [
            c.view(torch.uint8)[pages].view(c.dtype) for c in (key_cache, value_cache)
        ]
        return [c.flatten(0, 1)[:n] for c in taken]

    return kv_of


def _contiguous_prefill(batch: Batch, **rest) -> Case:
    longest = max(batch.query_lens)

    def make(device):
        rows = (sum(batch.kv_lens), batch.num_kv_heads, batch.head_dim)
        key, value = (torch.randn(rows, dtype=BF16, device=device) for _ in "kv")
        return _query(batch, device), key, value, _int32(batch.kv_starts, device)

    def ours(query, key, value, starts):
        return xla_ops.flash_attn_varlen(
            query, key, value, starts, starts, longest, longest, batch.scale,
            batch.causal,
        )  # fmt: skip

    def kv_of(key, value):
        starts = batch.kv_starts
        return lambda s: [t[starts[s] : starts[s + 1]] for t in (key, value)]

    def check(operands, result):
        query, key, value, _ = operands
        return _error(batch, query, kv_of(key, value), *result)

    uniform = len(set(batch.query_lens)) == 1
    shape = (len(batch.query_lens), longest, batch.num_heads, batch.head_dim)

    def dense(query, key, value, starts, backend=None):
        rows = [t.view(shape).transpose(1, 2) for t in (query, key, value)]
        return peers.sdpa(*rows, batch.causal, backend)

    def plain(query, key, value, starts):
        q, k, v = (t.view(shape).transpose(1, 2) for t in (query, key, value))
        logits = (q @ k.transpose(2, 3)).float() * batch.scale
        if batch.causal:
            mask = torch.ones(longest, longest, dtype=torch.bool, device=q.device)
            logits = logits.masked_fill(~mask.tril(), -torch.inf)
        out = logits.softmax(-1).to(q.dtype) @ v
        return out.transpose(1, 2).flatten(0, 1)

    return Case(
        make=make,
        ours=ours,
        reference=plain,
        moved=batch.moved,
        flops=batch.flops,
        check=check,
        peers={
            **(peers.sdpa_backends(dense) if uniform else {}),
            **peers.libraries("flash_attn_varlen", batch),
        },
        **rest,
    )


def _paged_prefill(batch: Batch, **rest) -> Case:
    longest, most = max(batch.query_lens), max(batch.kv_lens)

    def make(device):
        starts = _int32(batch.query_starts, device)
        return (
            _query(batch, device),
            *_paged(batch, device),
            starts,
            _int32(batch.kv_lens, device),
        )

    def ours(query, key_cache, value_cache, table, starts, lens):
        return xla_ops.flash_attn_varlen(
            query, key_cache, value_cache, starts, None, longest, most, batch.scale,
            batch.causal, seqused_k=lens, block_table=table,
        )  # fmt: skip

    def check(operands, result):
        return _error(batch, operands[0], _pages_of(batch, *operands[1:4]), *result)

    return Case(
        make=make,
        ours=ours,
        reference=functools.partial(_gathered, batch),
        moved=batch.moved,
        flops=batch.flops,
        check=check,
        peers={
            "gather + SDPA": functools.partial(_gathered, batch),
            **peers.libraries("flash_attn_varlen paged", batch),
        },
        **rest,
    )


def _gathered(batch, query, key_cache, value_cache, table, *_):
    """Attention by torch's own operators: pages gathered, then SDPA.

    For batches of one query length and one KV length.
    """
    num_seqs, context = batch.num_seqs, batch.kv_lens[0]
    key, value = (
        cache[table[:, : -(-context // PAGE)].long()].flatten(1, 2)[:, :context]
        for cache in (key_cache, value_cache)
    )
    query = query.unflatten(0, (num_seqs, -1))
    q = query.unflatten(2, (batch.num_kv_heads, batch.group)).permute(0, 2, 3, 1, 4)
    k, v = (t.permute(0, 2, 1, 3) for t in (key, value))
    if query.shape[1] == 1:
        # Rows of one query token fold into the heads: no mask, no repeated K and V.
        logits = (q.flatten(2, 3) @ k.transpose(2, 3)).float() * batch.scale
        out = logits.softmax(-1).to(q.dtype) @ v
        return out.flatten(1, 2)
    q = q.flatten(1, 2)
    k, v = (t.repeat_interleave(batch.group, 1) for t in (k, v))
    out = peers.sdpa(q, k, v, batch.causal and query.shape[1] == context, None)
    return out.transpose(1, 2).flatten(0, 1)


def _decode_case(batch: Batch, width=1, fp8=False, **rest) -> Case:
    num_seqs = batch.num_seqs

    def make(device):
        caches = _paged(batch, device, width, FP8 if fp8 else BF16)
        starts = _int32(batch.query_starts, device)
        count = torch.full((1,), num_seqs, dtype=I32, device=device)
        operands = (
            _query(batch, device),
            *caches,
            _int32(batch.kv_lens, device),
            starts,
            count,
        )
        if fp8:
            operands += (torch.rand(1, device=device) + 0.5,) * 2
        return operands

    def ours(query, key_cache, value_cache, table, lens, starts, count, *scales):
        more = {}
        if fp8:
            more = {"kv_cache_dtype": "fp8", "k_scale": scales[0], "v_scale": scales[1]}
        return xla_ops.paged_attention(
            query, (key_cache, value_cache), lens, table, starts, count, batch.scale,
            **more,
        )  # fmt: skip

    def check(operands, result):
        pages = _pages_of(batch, *operands[1:4])
        if fp8:
            scales = operands[-2:]

            def scaled(s):
                pairs = zip(pages(s), scales, strict=True)
                return [t.double() * scale.double() for t, scale in pairs]

            return _error(batch, operands[0], scaled, result)
        return _error(batch, operands[0], pages, result)

    gathered = functools.partial(_gathered, batch)
    plain = not fp8 and width == 1 and len(set(batch.kv_lens)) == 1
    return Case(
        make=make,
        ours=ours,
        reference=gathered,
        moved=batch.moved - batch.kv_bytes // 2 * fp8,
        flops=batch.flops,
        check=check,
        peers={
            "gather + matmul": gathered,
            **peers.libraries("paged_attention", batch),
        }
        if plain
        else {},
        **rest,
    )


# vLLM 0.12.0's FlashAttention 3 on the same H100, TFLOP/s at 4k and 16k tokens.
_FA3 = {
    (64, True): (412, 504),
    (128, True): (523, 644),
    (256, True): (534, 663),
    (64, False): (490, 524),
    (128, False): (646, 546),
    (256, False): (708, 726),
}
RAGGED = (8192, 17, 33, 1000, 4096, 257, 2048, 741)


def prefill(device: str) -> Iterator[Case]:
    if device == "cpu":
        batch = Batch((64, 64), (64, 64), 4, 2, 64)
        names = {"group": "prefill", "quick": True}
        yield _contiguous_prefill(
            Batch((64, 64), (64, 64), 4, 4, 64), op="prefill", size="2x64 hd64 causal",
            in_xla=True, **names,
        )  # fmt: skip
        yield _paged_prefill(
            batch, op="paged prefill", size="2x64 hd64 causal", **names
        )
        return
    total, width = 16384, 2048

    def square(head_dim, causal, lens):
        heads = width // head_dim
        return Batch(lens, lens, heads, heads, head_dim, causal)

    def uniform(length):
        return (length,) * (total // length)

    for head_dim, causal in ((128, True), (64, True), (256, True),
                             (128, False), (64, False), (256, False)):  # fmt: skip
        for length, anchor in zip((4096, 16384), _FA3[head_dim, causal], strict=True):
            mask = "causal" if causal else "full"
            least = 0.85 if (head_dim, causal) == (128, True) else 0.8
            chosen = (head_dim, causal, length) == (128, True, 4096)
            yield _contiguous_prefill(
                square(head_dim, causal, uniform(length)),
                op="prefill",
                size=f"{length // 1024}k hd{head_dim} {mask}",
                group="prefill",
                target=Target("TFLOP/s", least * anchor, anchor),
                in_xla=chosen,
                xla_target=Target("speedup", 1.0, 1.1, "XLA"),
                quick=chosen,
            )
        if (head_dim, causal) != (128, True):
            continue
        for length, least, aim in ((4096, 400, 454), (16384, 460, 539)):
            yield _paged_prefill(
                square(head_dim, causal, uniform(length)),
                op="paged prefill",
                size=f"{length // 1024}k hd{head_dim} causal",
                group="prefill",
                target=Target("TFLOP/s", least, aim),
                quick=length == 4096,
            )
        yield _contiguous_prefill(
            square(head_dim, causal, RAGGED),
            op="ragged prefill",
            size="17 to 8k hd128 causal",
            group="prefill",
            target=Target("relative rate", 0.85, 0.95, "prefill 4k hd128 causal"),
        )


def decode(device: str) -> Iterator[Case]:
    def batch(num_seqs, context, heads, kv_heads, head_dim=128):
        ones, contexts = (1,) * num_seqs, (context,) * num_seqs
        return Batch(ones, contexts, heads, kv_heads, head_dim)

    if device == "cpu":
        few = batch(4, 96, 4, 2, 64)
        names = {"op": "decode", "group": "decode", "quick": True}
        yield _decode_case(few, size="4x96 4/2", in_xla=True, **names)
        yield _decode_case(few, size="4x96 4/2 fp8", fp8=True, **names)
        yield _decode_case(few, size="4x96 4/2 wide table", width=16, **names)
        unequal = Batch((1,) * 4, (300, 28, 28, 28), 4, 2, 64)
        yield _decode_case(unequal, size="300, 3x28 4/2", **names)
        return

    def case(num_seqs, context, heads, kv_heads, target, **rest):
        length = str(context) if context % 1024 else f"{context // 1024}k"
        size = f"{num_seqs}x{length} {heads}/{kv_heads}" + rest.pop("suffix", "")
        return _decode_case(
            batch(num_seqs, context, heads, kv_heads, rest.pop("head_dim", 128)),
            op="decode",
            size=size,
            group="decode",
            target=target,
            **rest,
        )

    speedup = Target("speedup", 1.0, 1.1, "XLA")
    for context, least, aim in ((1024, 2.2, 2.63), (4096, 2.7, 2.98),
                                (2048, 2.5, 2.85), (8192, 2.8, 3.03)):  # fmt: skip
        yield case(
            64, context, 32, 8, Target("TB/s", least, aim),
            in_xla=context in (1024, 4096), xla_target=speedup, quick=context == 4096,
        )  # fmt: skip
    for context, least, aim in ((1024, 16, 10), (4096, 21, 14), (32768, 70, 50)):
        yield case(1, context, 32, 8, Target("us", least, aim), quick=context == 4096)
    yield case(16, 4096, 32, 32, Target("TB/s", 2.6, 3.0))
    yield case(
        64, 4096, 32, 8, Target("relative time", 0.65, 0.55, "decode 64x4k 32/8"),
        suffix=" fp8", fp8=True, quick=True,
    )  # fmt: skip
    yield case(
        64, 1024, 32, 8, Target("relative time", 1.1, 1.02, "decode 64x1k 32/8"),
        suffix=" wide table", width=16,
    )  # fmt: skip
    # One long sequence among short ones, beside the same bytes evenly spread.
    yield case(64, 1520, 32, 8, None)
    yield _decode_case(
        Batch((1,) * 64, (1024,) * 40 + (32768,) + (1024,) * 23, 32, 8, 128),
        op="decode",
        size="32k, 63x1k 32/8",
        group="decode",
        target=Target("relative time", 1.15, 1.05, "decode 64x1520 32/8"),
    )
    yield case(8, 4096, 32, 8, None)
    yield case(64, 4096, 32, 8, None, suffix=" hd64", head_dim=64)
    yield case(64, 2048, 16, 4, None, suffix=" hd256", head_dim=256)
