"""xla_ops.flash_attn_varlen: numerics against float64, masks, bad values, errors."""

import dataclasses
import itertools

import pytest
import torch
import torch_xla
import torch_xla.debug.metrics as met
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

import xla_ops
from support import Path, assert_close_to_exact, int32, same
from xla_ops.core import handlers
from xla_ops.core.custom_call import call_directly
from xla_ops.core.op import OPS
from xla_ops.ops import attention

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
FP8 = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


@pytest.fixture
def lowered(monkeypatch):
    """Collects the calls that the op is lowered to during a test."""
    calls = []
    lower = attention._lower

    def record(*args):
        calls.append(lower(*args))
        return calls[-1]

    monkeypatch.setattr(attention, "_lower", record)
    OPS["flash_attn_varlen"]._plans.clear()  # what was lowered before
    return calls


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
        logits = logits.masked_fill(~visible, -torch.inf)
        if sinks is not None:
            sink = sinks.to(dtype)[:, None, None].expand(-1, query_lens[s], 1)
            logits = torch.cat([logits, sink], -1)
        seen = visible.any(-1)[:, None]
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


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("causal", [True, False])
@by_page
def test_numerics(path, page, causal, dtype):
    make(QUERY_LENS, KV_LENS, 4, 2, 64, dtype, page=page).check(path, is_causal=causal)


@pytest.mark.parametrize("dim", range(32, 257, 8))
def test_head_dims(path, dim):
    dtype = FLOATS[dim // 8 % 3]
    page = PAGES[dim // 8 % 5]
    make([3, 17], [5, 33], 2, 1, dim, dtype, page=page).check(path, is_causal=True)


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (6, 6), (8, 1), (10, 2), (21, 3)])
@one_of_each
def test_groups_of_heads(path, page, heads, kv_heads):
    batch = make([9, 1, 4], [9, 70, 30], heads, kv_heads, 40, torch.bfloat16, page=page)
    batch.check(path, is_causal=True)


@pytest.mark.parametrize(
    "left, right",
    [(-1, 0), (-1, 2), (0, -1), (0, 0), (3, -1), (3, 2), (16, 0), (16, 11)],
)
@one_of_each
def test_windows(path, page, left, right):
    batch = make(QUERY_LENS, KV_LENS, 4, 2, 32, torch.float32, page=page)
    batch.check(path, window_left=left, window_right=right)


def test_causal_overrides_window_right(path):
    batch = contiguous([6], [9], 2, 1, 32, torch.float32)
    out, _ = batch.check(path, is_causal=True, window_right=4)
    assert torch.equal(out, batch.check(path, window_right=0)[0])


def test_a_window_of_max_seqlen_k_is_unbounded(path):
    """As in vLLM, where that shows: a row that stands before all keys."""
    batch = contiguous([9], [4], 2, 1, 32, torch.float32)
    wanted, _ = batch.check(path)
    arguments = {**batch.arguments, "window_left": 4, "window_right": 4}
    (out, _), _ = path.run(lambda a: xla_ops.flash_attn_varlen(**a), arguments)
    assert torch.equal(out, wanted)
    batch.check(path, window_left=3, window_right=3)


@pytest.mark.parametrize("cap", [1.0, 30.0])
@one_of_each
def test_softcap(path, page, cap):
    batch = make(QUERY_LENS, KV_LENS, 4, 2, 32, torch.float32, page=page)
    batch.arguments["q"] *= 10
    batch.check(path, softcap=cap, is_causal=True)


def test_softmax_scale(path):
    batch = contiguous([5, 1], [20, 33], 4, 2, 32, torch.float32)
    batch.check(path, softmax_scale=0.7)


@pytest.mark.parametrize("shape", [(4,), (6, 4)])
@pytest.mark.parametrize("causal", [True, False])
@one_of_each
def test_alibi(path, page, causal, shape):
    batch = make(QUERY_LENS, KV_LENS, 4, 2, 32, torch.float32, page=page)
    batch.check(path, alibi_slopes=torch.rand(shape), is_causal=causal)


@pytest.mark.parametrize("dtype", FLOATS)
@one_of_each
def test_sinks(path, page, dtype):
    """In the model's dtype. A row that sees no key is zero all the same."""
    batch = make(QUERY_LENS, KV_LENS, 4, 2, 32, dtype, page=page)
    sinks = torch.tensor([-3.0, 0.0, 2.5, 9.0]).to(dtype)
    batch.check(path, sinks=sinks, is_causal=True)


def test_a_sink_of_minus_infinity_is_none(path):
    batch = contiguous([3], [7], 2, 1, 32, torch.float32)
    wanted = batch.check(path)
    got = batch.check(path, sinks=torch.full((2,), -torch.inf))
    assert all(
        torch.allclose(g, w, atol=1e-6) for g, w in zip(got, wanted, strict=True)
    )


@pytest.mark.parametrize("pads", [None, [2, 0, 4, 1, 3, 0]])
@pytest.mark.parametrize("slack", [0, 3])
def test_left_padding_and_used_lengths(path, pads, slack):
    lens = QUERY_LENS, KV_LENS
    batch = contiguous(*lens, 4, 2, 32, torch.float32, pads, slack)
    batch.check(path, is_causal=True)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "name, as_bytes",
    [("fp8", True), ("fp8_e4m3", False), ("fp8_e5m2", True), ("fp8_e5m2", False)],
)
@one_of_each
def test_fp8(path, page, as_bytes, name, dtype):
    batch = make(QUERY_LENS, KV_LENS, 4, 2, 32, dtype, page=page)
    scales = fp8(batch, name, as_bytes, [torch.tensor(0.5), torch.full((1,), 1.75)])
    batch.check(path, kv_cache_dtype=name, **scales, is_causal=True)


@pytest.mark.parametrize("name", ["fp8", "fp8_e5m2"])
@one_of_each
def test_fp8_scales_of_each_sequence_and_head(path, page, name):
    batch = make(QUERY_LENS, KV_LENS, 4, 2, 32, torch.bfloat16, page=page)
    scales = fp8(batch, name, False, torch.rand(2, len(KV_LENS), 2) + 0.5)
    batch.check(path, kv_cache_dtype=name, **scales)


def test_fp8_without_scales(path):
    batch = paged([2, 1], [9, 20], 4, 2, 32, torch.float32, 5)
    ones = torch.ones(2, 1)
    fp8(batch, "fp8", True, ones)
    batch.check(path, kv_cache_dtype="fp8")


def fp8(batch, name, as_bytes, scales):
    """Makes the batch's keys and values fp8; returns the scales' arguments."""
    for argument, scale in zip(("k", "v"), scales, strict=True):
        t = batch.arguments[argument].to(FP8[name])
        batch.arguments[argument] = t.view(torch.uint8) if as_bytes else t
        tokens = batch.keys if argument == "k" else batch.values
        for s, mine in enumerate(tokens):
            factor = scale.reshape(()) if scale.numel() == 1 else scale[s][:, None]
            tokens[s] = mine.to(FP8[name]).double() * factor.double()
    return {"k_scale": scales[0], "v_scale": scales[1]}


@pytest.mark.parametrize("dtype", FLOATS)
@one_of_each
def test_everything_at_once(path, page, dtype):
    batch = make([16, 1, 2, 5], [48, 100, 2, 3], 8, 2, 72, dtype, page=page)
    check_everything(path, batch)


@pytest.mark.parametrize("page", [None, 5])
def test_everything_without_a_handler(path, page, monkeypatch):
    """What runs then is the reference."""
    for name in ("available", "loaded"):
        monkeypatch.setattr(handlers, name, lambda platform, target: False)
    shape = [3, 4], [7, 2], 8, 2, 16, torch.float32
    if page is None:
        check_everything(path, contiguous(*shape, pads=[2, 1], slack=3))
    else:
        check_everything(path, paged(*shape, page))


def check_everything(path, batch):
    seqs = len(batch.keys)
    scales = fp8(batch, "fp8", True, torch.rand(2, seqs, 2) + 0.5)
    batch.check(
        path,
        window_left=20,
        window_right=1,
        softcap=15.0,
        alibi_slopes=torch.rand(seqs, 8) / 4,
        sinks=torch.randn(8),
        kv_cache_dtype="fp8",
        **scales,
    )


@pytest.mark.parametrize("dtype", FLOATS)
@one_of_each
def test_long_keys_are_split(path, page, dtype, lowered):
    batch = make([1, 2], [1500, 700], 4, 2, 64, dtype, page=page)
    batch.check(path, is_causal=True, sinks=torch.randn(4))
    splits = 16 if handlers.platform_of(path.device) == handlers.CUDA else 1
    assert {call.attributes["num_splits"] for call in lowered} == {splits}
    batch.check(path, window_left=300, window_right=0)


@pytest.mark.parametrize("page", PAGES[1:])
def test_paged_is_as_contiguous(path, page):
    lens = QUERY_LENS, KV_LENS
    batch = paged(*lens, 4, 2, 64, torch.bfloat16, page)
    out, lse = batch.check(path, is_causal=True)
    rows = {
        **batch.arguments,
        "k": torch.cat(batch.keys),
        "v": torch.cat(batch.values),
        "cu_seqlens_k": prefix_sums(KV_LENS),
        "seqused_k": None,
        "block_table": None,
    }
    got, _ = path.run(lambda a: xla_ops.flash_attn_varlen(**a, is_causal=True), rows)
    assert same(got[0], out) and same(got[1], lse)


def test_lengths_of_pages_from_cu_seqlens_k(path):
    """Where vLLM leaves out seqused_k; where it does not, cu_seqlens_k is not read."""
    batch = paged([2, 3], [9, 20], 4, 2, 32, torch.float32, 5)
    batch.arguments |= {"cu_seqlens_k": prefix_sums([9, 20]), "seqused_k": None}
    wanted, _ = batch.check(path)
    batch.arguments |= {"cu_seqlens_k": int32(-1, 7, 7), "seqused_k": int32(9, 20)}
    assert torch.equal(batch.check(path)[0], wanted)


def packed(take, *stored):
    """A function of (arguments, stored...) that takes k and v out of `stored`."""

    def call(arguments, *stored):
        k, v = take(*stored)
        arguments = {**arguments, "k": k, "v": v}
        return xla_ops.flash_attn_varlen(**arguments, is_causal=True)

    return call, stored


def test_pages_in_other_layouts(path):
    batch = paged([3, 1], [10, 18], 4, 2, 32, torch.float32, 8)
    wanted = batch.check(path, is_causal=True)
    arguments = {**batch.arguments, "k": None, "v": None}
    kv = torch.stack([batch.arguments["k"], batch.arguments["v"]])
    for call, stored in (
        packed(lambda t: t.unbind(0), kv),
        packed(lambda t: t.transpose(2, 3).unbind(0), kv.transpose(2, 3).contiguous()),
        packed(lambda t: t.unbind(1), kv.transpose(0, 1).contiguous()),
        packed(lambda k, v: (k.clone(), v), *kv.clone()),
    ):
        got, _ = path.run(call, arguments, *stored)
        assert all(same(g, w) for g, w in zip(got, wanted, strict=True))


def test_rows_in_other_layouts(path):
    batch = contiguous([3, 1], [10, 18], 4, 2, 32, torch.float32)
    wanted = batch.check(path, is_causal=True)
    arguments = {**batch.arguments, "k": None, "v": None}
    k, v = batch.arguments["k"], batch.arguments["v"]
    heads = torch.cat([k, v], 1)
    for call, stored in (
        packed(lambda t: t.unbind(1), torch.stack([k, v], 1)),
        packed(lambda t: t.unbind(1)[1:], torch.stack([k * 2, k, v], 1)),
        packed(lambda t: t.split(2, 1), heads),
        packed(lambda t: t.view(-1, 4, 32).split(2, 1), heads.flatten(1)),
        packed(lambda t: t.transpose(0, 1).split(2, 1), heads.transpose(0, 1).clone()),
        packed(lambda k, v: (k.transpose(1, 2), v), k.transpose(1, 2).clone(), v),
    ):
        got, _ = path.run(call, arguments, *stored)
        assert all(same(g, w) for g, w in zip(got, wanted, strict=True))


def test_query_that_is_a_view(path):
    batch = contiguous([3, 1], [10, 18], 4, 2, 32, torch.float32)
    wanted = batch.check(path)
    wide = torch.cat([batch.arguments["q"], torch.randn(4, 2, 32)], 1)

    def call(arguments, wide):
        return xla_ops.flash_attn_varlen(**{**arguments, "q": wide[:, :4]})

    got, _ = path.run(call, {**batch.arguments, "q": None}, wide)
    assert all(torch.equal(g, w) for g, w in zip(got, wanted, strict=True))


@one_of_each
def test_rows_of_no_sequence(path, page):
    batch = make([2, 3], [6, 7], 4, 2, 32, torch.float32, page=page)
    batch.arguments["q"] = torch.cat([batch.arguments["q"], torch.randn(4, 4, 32)])
    batch.check(path, sinks=torch.ones(4), alibi_slopes=torch.ones(4))


def test_halves_merge_to_the_whole(path):
    """By lse, empty rows included: the first half of a sequence may see nothing."""
    batch = contiguous([4, 1, 2], [30, 17, 1], 4, 2, 64, torch.float32)
    whole, lse = batch.check(path)
    halves = []
    for first in (True, False):
        kept = [
            slice(None, n // 2) if first else slice(n // 2, None) for n in (30, 17, 1)
        ]
        keys, values = (
            [t[rows] for t, rows in zip(tokens, kept, strict=True)]
            for tokens in (batch.keys, batch.values)
        )
        lens = [len(k) for k in keys]
        arguments = {
            **batch.arguments,
            "k": torch.cat(keys),
            "v": torch.cat(values),
            "cu_seqlens_k": prefix_sums(lens),
        }
        part, _ = path.run(lambda a: xla_ops.flash_attn_varlen(**a), arguments)
        halves += part
    merged, merged_lse = xla_ops.merge_attn_states(*halves)
    assert torch.allclose(merged, whole, atol=2e-6)
    assert torch.allclose(merged_lse, lse, atol=2e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_agrees_with_sdpa(path, causal):
    batch = contiguous([13, 13], [13, 13], 6, 2, 48, torch.float32)
    out, _ = batch.check(path, is_causal=causal)
    q, k, v = (
        t[:26].reshape(2, 13, -1, 48).transpose(1, 2)
        for t in (batch.arguments[name] for name in ("q", "k", "v"))
    )
    sdpa = scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    assert torch.allclose(out, sdpa.transpose(1, 2).reshape(out.shape), atol=2e-6)


@pytest.mark.parametrize("bad", [-1, 10**6, -(2**31), 2**31 - 1])
def test_bad_block_ids_are_masked(path, bad):
    batch = paged([1], [12], 2, 1, 32, torch.float32, 4)
    batch.arguments["block_table"][0, 1] = bad
    for tokens in (batch.keys, batch.values):
        tokens[0] = torch.cat([tokens[0][:4], tokens[0][8:]])
    batch.check(path)


def test_wild_integers_stay_in_bounds(path):
    """Values that no shape allows are clamped: no crash, no row out of bounds."""
    pads = [1, 1]
    rows = contiguous([2, 2], [8, 8], 2, 1, 32, torch.float32, pads, 1).arguments
    pages = paged([2, 2], [8, 8], 2, 1, 32, torch.float32, 4, spare=0).arguments
    for arguments in (rows, pages):
        for name, t in arguments.items():
            if not isinstance(t, torch.Tensor) or t.dtype != torch.int32:
                continue
            for value in (2**31 - 1, -(2**31)):
                changed = {**arguments, name: torch.full_like(t, value)}
                (out, lse), _ = path.run(
                    lambda a: xla_ops.flash_attn_varlen(**a, is_causal=True), changed
                )
                assert out.shape == (4, 2, 32) and lse.shape == (2, 4)


@pytest.mark.parametrize("page", [None, 4])
@pytest.mark.parametrize(
    "query_lens, kv_lens", [([0, 0], [3, 0]), ([], []), ([3, 1], [0, 0])]
)
def test_empty(path, page, query_lens, kv_lens):
    batch = make(query_lens, kv_lens, 4, 2, 32, torch.float32, page=page)
    batch.check(path)
    for name in ("k", "v"):
        batch.arguments[name] = batch.arguments[name][:0]
    if not sum(kv_lens):
        batch.check(path, is_causal=True, sinks=torch.ones(4))


def test_rows_without_a_sequence_at_all(path):
    batch = contiguous([], [], 4, 2, 32, torch.float32)
    batch.arguments["q"] = torch.randn(3, 4, 32)
    batch.check(path)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_batch(data):
    draw = data.draw
    # The tensors follow from what is drawn, so that an example fails again.
    torch.manual_seed(draw(st.integers(0, 99)))
    seqs = draw(st.integers(1, 4))
    query_lens = draw(st.lists(st.integers(0, 6), min_size=seqs, max_size=seqs))
    kv_lens = draw(st.lists(st.integers(0, 20), min_size=seqs, max_size=seqs))
    kv_heads = draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, 3))
    shape = query_lens, kv_lens, heads, kv_heads, 8 * draw(st.integers(1, 8))
    dtype = draw(st.sampled_from(FLOATS))
    if draw(st.booleans()):
        batch = paged(*shape, dtype, draw(st.integers(1, 9)))
    else:
        pads = draw(st.lists(st.integers(0, 3), min_size=seqs, max_size=seqs))
        batch = contiguous(*shape, dtype, pads, draw(st.integers(0, 2)))
    options = {}
    if draw(st.booleans()):
        name = draw(st.sampled_from(list(FP8)))
        scales = torch.rand(2, seqs, kv_heads) + 0.5
        options |= fp8(batch, name, draw(st.booleans()), scales)
        options["kv_cache_dtype"] = name
    if draw(st.booleans()):
        options["is_causal"] = True
    else:
        # From max_seqlen_k on a window is unbounded, so stay below.
        longest = max(batch.arguments["max_seqlen_k"] - 1, -1)
        options["window_right"] = draw(st.integers(-1, longest))
    if draw(st.booleans()):
        options["window_left"] = draw(st.integers(0, 12))
    if draw(st.booleans()):
        options["softcap"] = draw(st.floats(0.5, 50.0))
    if draw(st.booleans()):
        options["sinks"] = torch.randn(heads)
    if draw(st.booleans()):
        rows = (seqs,) if draw(st.booleans()) else ()
        options["alibi_slopes"] = torch.rand(*rows, heads)
    batch.check(Path("cpu"), **options)


def programs():
    return met.counter_value("UncachedCompile") or 0


def test_bounds_seldom_make_new_programs():
    """max_seqlen_q never does, max_seqlen_k once an octave or less often."""
    path = Path("lazy")
    given = path.put(contiguous([1, 1], [1990, 4], 2, 1, 32, torch.float32).arguments)
    xla_ops.flash_attn_varlen(**given)[0].cpu()
    before = programs()
    for n in range(7):
        given |= {"max_seqlen_q": 1 + n, "max_seqlen_k": 1991 + n}
        xla_ops.flash_attn_varlen(**given)[0].cpu()
    assert programs() == before


def test_symbolic_sizes_are_guarded_by_octaves():
    """torch.compile makes sizes symbolic once they change; a plan must not fix them."""
    counter = torch._dynamo.testing.CompileCounter()
    step = torch.compile(xla_ops.flash_attn_varlen, backend=counter, dynamic=True)
    for tokens, longest in [(5, 1100), (6, 1101), (7, 1900), (8, 2047)]:
        q = torch.randn(tokens, 4, 16)
        k = torch.randn(2100, 2, 16)
        starts, kv_starts = int32(0, tokens), int32(0, longest)
        given = (q, k, k, starts, kv_starts, tokens, longest)
        out, _ = step(*given, is_causal=True)
        expected, _ = xla_ops.flash_attn_varlen(*given, is_causal=True)
        assert torch.equal(out, expected)
    assert counter.frame_count == 1


def test_library_is_asked_for_splits_and_workspace(monkeypatch, lowered):
    asked = []

    def plan(platform, op, request, num_results):
        asked.append((platform, op, request, num_results))
        return 7, 4321

    monkeypatch.setattr(handlers, "plan", plan)
    monkeypatch.setattr(handlers, "loaded", lambda platform, target: False)
    batch = contiguous([2, 1], [1500, 600], 4, 2, 16, torch.float32)
    xla_ops.flash_attn_varlen(**batch.arguments)
    (call,) = lowered
    assert call.attributes["num_splits"] == 7
    assert [spec.shape for spec in call.scratch] == [(4321,)]
    # Tokens, heads, KV heads, head_dim, sequences; the bound in octaves; splits.
    sizes = 3, 4, 2, 16, 2
    choose = ("Host", "attention", (*sizes, 1024, 0), 2)
    assert asked == [choose, ("Host", "attention", (*sizes, 0, 7), 2)]


def test_without_a_library_nothing_is_cut(monkeypatch, lowered):
    monkeypatch.setattr(handlers, "plan", lambda *args: None)
    monkeypatch.setattr(handlers, "loaded", lambda platform, target: False)
    batch = contiguous([2, 1], [1500, 600], 4, 2, 16, torch.float32)
    xla_ops.flash_attn_varlen(**batch.arguments)
    assert [call.attributes["num_splits"] for call in lowered] == [1]


def test_absent_operands_are_no_parameters():
    given = Path("lazy").put(contiguous([2], [5], 2, 1, 32, torch.float32).arguments)
    results = xla_ops.flash_attn_varlen(**given)
    hlo = torch_xla._XLAC._get_xla_tensors_hlo(list(results))
    entry = hlo[hlo.index("ENTRY") :]
    assert entry.count(" parameter(") == 5, "q, k, v and two prefix sums"


def test_torch_op_takes_the_arguments_in_order(path):
    batch = paged([3, 1], [10, 18], 4, 2, 32, torch.float32, 8)
    a = batch.arguments
    wanted = batch.check(
        path, softmax_scale=0.3, window_left=4, window_right=2, softcap=9.0
    )

    def call(*args):
        return torch.ops.xla.flash_attn_varlen_op(*args)

    got, _ = path.run(
        call,
        *(a["q"], a["k"], a["v"], a["cu_seqlens_q"], None, 3, 18),
        *(0.3, False, 4, 2, 9.0, a["seqused_k"], a["block_table"]),
    )
    assert all(torch.equal(g, w) for g, w in zip(got, wanted, strict=True))


@pytest.mark.parametrize("name", ["lazy", "cpu"])
def test_debug_mode_reports_block_ids(name, capfd):
    given = paged([1], [12], 2, 1, 32, torch.float32, 4).arguments
    given["block_table"][0, 1] = 77
    xla_ops.set_debug(True)
    try:
        Path(name).run(lambda a: xla_ops.flash_attn_varlen(**a), given)
    finally:
        xla_ops.set_debug(False)
    captured = capfd.readouterr()
    text = captured.err + captured.out
    assert "flash_attn_varlen: block_table[0, 1] must be" in text
    assert "got 77; masked" in text


Q = torch.ones(3, 4, 16)
ROWS = {
    "q": Q,
    "k": torch.ones(5, 2, 16),
    "v": torch.ones(5, 2, 16),
    "cu_seqlens_q": int32(0, 2, 3),
    "cu_seqlens_k": int32(0, 3, 5),
    "max_seqlen_q": 2,
    "max_seqlen_k": 3,
}
PAGED = ROWS | {
    "k": torch.ones(5, 4, 2, 16),
    "v": torch.ones(5, 4, 2, 16),
    "cu_seqlens_k": None,
    "seqused_k": int32(2, 1),
    "block_table": int32([0], [1]),
}
ONE = torch.ones(1)
ERRORS = [
    (ROWS, {"q": Q.int()}, "q must be float32, float16 or bfloat16, got int32"),
    (
        ROWS,
        {"q": torch.ones(3, 64)},
        "q must have shape [num_tokens, num_heads, head_dim], got [3, 64]",
    ),
    (
        ROWS,
        {name: torch.ones(5, 2, 12) for name in "qkv"},
        "q must have a head_dim that is a multiple of 8 up to 256, got 12",
    ),
    (
        PAGED,
        {"q": torch.ones(3, 2, 264)}
        | {name: torch.ones(5, 4, 2, 264) for name in "kv"},
        "q must have a head_dim that is a multiple of 8 up to 256, got 264",
    ),
    (
        ROWS,
        {"k": PAGED["k"]},
        "k must have shape [total_k, num_kv_heads, head_dim], got [5, 4, 2, 16]",
    ),
    (
        PAGED,
        {"k": ROWS["k"]},
        "k must have shape [num_blocks, page_size, num_kv_heads, head_dim], got"
        " [5, 2, 16]",
    ),
    (
        ROWS,
        {"k": Q[:, :2].half(), "v": Q[:, :2].half()},
        "k must be float32, got float16",
    ),
    (ROWS, {"v": Q[:, :2]}, "v must have shape [5, 2, 16], got [3, 2, 16]"),
    (ROWS, {"v": ROWS["v"].half()}, "v must be float32, got float16"),
    (
        ROWS,
        {"k": torch.ones(5, 2, 8), "v": torch.ones(5, 2, 8)},
        "k must have head_dim 16, got 8",
    ),
    (
        ROWS,
        {"k": torch.ones(5, 3, 16), "v": torch.ones(5, 3, 16)},
        "num_kv_heads must divide num_heads 4, got 3",
    ),
    (
        PAGED,
        {"k": torch.ones(5, 0, 2, 16), "v": torch.ones(5, 0, 2, 16)},
        "page_size must be at least 1, got 0",
    ),
    (ROWS, {"cu_seqlens_q": ONE}, "cu_seqlens_q must be int32, got float32"),
    (
        ROWS,
        {"cu_seqlens_q": int32(3)[0]},
        "cu_seqlens_q must have shape [max_num_seqs + 1], got []",
    ),
    (
        PAGED,
        {"cu_seqlens_q": int32(0, 3)},
        "cu_seqlens_q must have shape [3], got [2]",
    ),
    (
        ROWS,
        {"cu_seqlens_k": None},
        "cu_seqlens_k must be given without block_table, got None",
    ),
    (
        ROWS,
        {"cu_seqlens_k": int32(0, 3)},
        "cu_seqlens_k must have shape [3], got [2]",
    ),
    (ROWS, {"max_seqlen_q": -1}, "max_seqlen_q must be at least 0, got -1"),
    (ROWS, {"max_seqlen_k": -2}, "max_seqlen_k must be at least 0, got -2"),
    (ROWS, {"softmax_scale": float("nan")}, "softmax_scale must be finite, got nan"),
    (ROWS, {"softmax_scale": 1e39}, "softmax_scale must be finite, got inf"),
    (ROWS, {"softcap": 1e39}, "softcap must be finite and at least 0, got inf"),
    (ROWS, {"window_left": -2}, "window_left must be at least -1, got -2"),
    (ROWS, {"window_right": -2}, "window_right must be at least -1, got -2"),
    (ROWS, {"softcap": -1.0}, "softcap must be finite and at least 0, got -1"),
    (
        PAGED,
        {"seqused_k": None},
        "seqused_k must be given with block_table, got None",
    ),
    (
        PAGED,
        {"seqused_k": None, "cu_seqlens_k": ONE},
        "cu_seqlens_k must be int32, got float32",
    ),
    (
        PAGED,
        {"seqused_k": None, "cu_seqlens_k": int32(3)[0]},
        "cu_seqlens_k must have shape [max_num_seqs + 1], got []",
    ),
    (
        PAGED,
        {"seqused_k": int32([1], [2])},
        "seqused_k must have shape [max_num_seqs], got [2, 1]",
    ),
    (ROWS, {"seqused_k": int32(1)}, "seqused_k must have shape [2], got [1]"),
    (
        PAGED,
        {"block_table": int32([0], [1], [2])},
        "block_table must have shape [2, max_blocks], got [3, 1]",
    ),
    (
        PAGED,
        {"block_table": torch.ones(2, 1)},
        "block_table must be int32, got float32",
    ),
    (
        PAGED,
        {"leftpad_k": int32(0, 0)},
        "leftpad_k must be absent with block_table, got shape [2]",
    ),
    (ROWS, {"leftpad_k": int32(0)}, "leftpad_k must have shape [2], got [1]"),
    (
        ROWS,
        {"alibi_slopes": torch.ones(4).double()},
        "alibi_slopes must be float32, float16 or bfloat16, got float64",
    ),
    (
        ROWS,
        {"alibi_slopes": torch.ones(3, 4)},
        "alibi_slopes must have shape [4] or [2, 4], got [3, 4]",
    ),
    (
        ROWS,
        {"sinks": int32(1)},
        "sinks must be float32, float16 or bfloat16, got int32",
    ),
    (ROWS, {"sinks": ONE}, "sinks must have shape [4], got [1]"),
    (
        ROWS,
        {"kv_cache_dtype": "int8"},
        "kv_cache_dtype must be auto, fp8, fp8_e4m3 or fp8_e5m2, got int8",
    ),
    (
        ROWS,
        {"kv_cache_dtype": "fp8"},
        "k must be float8_e4m3fn or uint8, got float32",
    ),
    (
        ROWS,
        {"k_scale": ONE},
        "k_scale must be absent with kv_cache_dtype auto, got shape [1]",
    ),
    (
        ROWS,
        {name: torch.ones(5, 2, 16, dtype=torch.uint8) for name in "kv"}
        | {"kv_cache_dtype": "fp8_e5m2", "v_scale": torch.ones(2, 4)},
        "v_scale must have 1 element or shape [2, 2], got shape [2, 4]",
    ),
    (
        ROWS,
        {name: torch.ones(5, 2, 16, dtype=torch.uint8) for name in "kv"}
        | {"kv_cache_dtype": "fp8_e5m2", "k_scale": ONE.half()},
        "k_scale must be float32, got float16",
    ),
]


@pytest.mark.parametrize("legal, changes, message", ERRORS, ids=[m for *_, m in ERRORS])
def test_errors(path, legal, changes, message):
    with pytest.raises(Exception) as error:
        path.run(lambda a: xla_ops.flash_attn_varlen(**a), legal | changes)
    assert "flash_attn_varlen: " + message in str(error.value)


@pytest.mark.parametrize(
    "name", ["k", "v", "cu_seqlens_q", "seqused_k", "block_table", "sinks"]
)
def test_tensors_must_share_a_device(name):
    given = PAGED | {"sinks": torch.ones(4)}
    device = torch_xla.device()
    moved = {
        k: t.to(device) if isinstance(t, torch.Tensor) and k != name else t
        for k, t in given.items()
    }
    with pytest.raises(ValueError) as error:
        xla_ops.flash_attn_varlen(**moved)
    text = f"flash_attn_varlen: {name} must be on q's device {device}, got cpu"
    assert str(error.value) == text


@pytest.mark.parametrize("name", ["q", "k", "v", "cu_seqlens_q"])
def test_arguments_must_be_tensors(name):
    with pytest.raises(
        TypeError, match=rf"^flash_attn_varlen: {name} must be a tensor"
    ):
        xla_ops.flash_attn_varlen(**(ROWS | {name: 1}))


# Arguments of the functional ops, in order: operands, then attributes.
LEGAL = {
    "query": Q,
    "key": ROWS["k"],
    "value": ROWS["v"],
    "cu_seqlens_q": int32(0, 2, 3),
    "cu_seqlens_k": int32(0, 3, 5),
    "seqused_k": None,
    "block_table": None,
    "leftpad_k": None,
    "num_seqs": None,
    "alibi_slopes": None,
    "sinks": None,
    "k_scale": None,
    "v_scale": None,
    "scale": 0.25,
    "window_left": -1,
    "window_right": 0,
    "soft_cap": 0.0,
    "kv_cache_dtype": "auto",
    "num_splits": 1,
    "geometry": [1, 5, 2, 16, 0, 32, 16, 0, 0],
    "debug": False,
}
LEGAL_PAGED = LEGAL | {
    "cu_seqlens_k": None,
    "seqused_k": int32(2, 1),
    "block_table": int32([0], [1]),
    "geometry": [1, 5, 2, 16, 160, 32, 16, 0, 0],
}
BYTES = ROWS["k"].to(torch.uint8)
LEGAL_FP8 = LEGAL | {"key": BYTES, "value": BYTES, "kv_cache_dtype": "fp8"}
BROKEN = [
    (LEGAL, "query", Q.int()),
    (LEGAL, "query", Q.flatten()),
    (LEGAL, "query", Q[..., :12]),
    (LEGAL, "query", Q[:, :3]),
    (LEGAL, "key", ROWS["k"].half()),
    (LEGAL, "value", ROWS["k"].double()),
    (LEGAL, "kv_cache_dtype", "fp4"),
    (LEGAL, "kv_cache_dtype", "fp8_e5m2"),
    (LEGAL, "cu_seqlens_q", int32(0, 2, 3).long()),
    (LEGAL, "cu_seqlens_q", int32([0, 2, 3])),
    (LEGAL, "cu_seqlens_k", int32(0, 2, 3).long()),
    (LEGAL, "cu_seqlens_k", int32(0, 2)),
    (LEGAL, "seqused_k", ONE.expand(2)),
    (LEGAL, "seqused_k", int32(1)),
    (LEGAL, "leftpad_k", int32(1, 1).long()),
    (LEGAL, "leftpad_k", int32([1, 1])),
    (LEGAL, "num_seqs", ONE),
    (LEGAL, "num_seqs", int32(1, 1)),
    (LEGAL_PAGED, "seqused_k", int32(1, 1).long()),
    (LEGAL_PAGED, "seqused_k", int32([1, 1])),
    (LEGAL_PAGED, "block_table", int32([1, 1])),
    (LEGAL_PAGED, "block_table", int32([1], [1]).long()),
    (LEGAL_PAGED, "cu_seqlens_q", int32(0, 2)),
    (LEGAL_PAGED, "cu_seqlens_k", int32(0, 2, 3)),
    (LEGAL_PAGED, "leftpad_k", int32(0, 2)),
    (LEGAL, "alibi_slopes", torch.ones(4).half()),
    (LEGAL, "alibi_slopes", torch.ones(1, 4)),
    (LEGAL, "sinks", torch.ones(4).half()),
    (LEGAL, "sinks", torch.ones(4, 1)),
    (LEGAL, "k_scale", ONE),
    (LEGAL, "v_scale", ONE),
    (LEGAL_FP8, "k_scale", ONE.half()),
    (LEGAL_FP8, "v_scale", torch.ones(4)),
    (LEGAL, "scale", float("inf")),
    (LEGAL, "window_left", -2),
    (LEGAL, "window_right", -3),
    (LEGAL, "soft_cap", float("nan")),
    (LEGAL, "num_splits", 0),
    (LEGAL, "num_splits", 1025),
]


@pytest.mark.parametrize("op", ["flash_attn_varlen", "paged_attention"])
@pytest.mark.parametrize(
    "legal, name, value", BROKEN, ids=[f"{i}-{b[1]}" for i, b in enumerate(BROKEN)]
)
def test_the_handler_says_what_python_says(op, legal, name, value):
    with pytest.raises(ValueError) as error:
        OPS[op].lower(*(legal | {name: value}).values())
    assert str(error.value).startswith(op + ": ")
    bound = OPS[op].lowered(list(legal.values()))
    call_directly(bound)
    if name in bound.call.names:
        bound = bound.call.bind(legal | {name: value})
    else:
        attributes = {**bound.call.attributes, name: value}
        call = dataclasses.replace(bound.call, attributes=attributes)
        bound = bound._replace(call=call)
    with pytest.raises(ValueError) as from_handler:
        call_directly(bound)
    assert str(from_handler.value) == str(error.value)
