"""xla_ops.flash_attn_varlen: numerics against float64, masks, layouts, bad values."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

import xla_ops
from support import Path, int32, same
from varlen import (
    FLOATS,
    FP8,
    KV_LENS,
    PAGES,
    QUERY_LENS,
    by_page,
    contiguous,
    make,
    one_of_each,
    paged,
    prefix_sums,
)
from xla_ops.core import handlers


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
