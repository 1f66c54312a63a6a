"""Gradients of flash_attn_varlen and paged_attention, of every feature, in numbers."""

import pytest
import torch
import torch_xla
from hypothesis import given, settings
from hypothesis import strategies as st

from support import Path, int32, same
from varlen import FLOATS, FP8, KV_LENS, QUERY_LENS, contiguous, make, paged
from varlen_gradients import check, cotangents, everything, gradients
from xla_ops.core import handlers
from xla_ops.core.op import OPS

MASKS = [
    {"is_causal": True},
    {},
    {"window_left": 6, "window_right": 0},
    {"window_left": 3, "window_right": 2},
    {"window_right": 1},
]


@pytest.fixture(autouse=True)
def _grad_mode():
    # Torch counts devices at the first backward of a process: XLA's must be there.
    torch_xla.device()
    with torch.enable_grad():
        yield


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("page", [None, 5])
def test_numerics(path, page, mask, dtype):
    batch = make(QUERY_LENS, KV_LENS, 4, 2, 64, dtype, page=page)
    check(path, batch, **mask)


@pytest.mark.parametrize("dim", range(32, 257, 8))
def test_head_dims(dim):
    dtype = FLOATS[dim // 8 % 3]
    batch = contiguous([3, 17], [5, 33], 2, 1, dim, dtype)
    check(Path("cpu"), batch, is_causal=True)


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (6, 6), (8, 1), (10, 2), (21, 3)])
def test_groups_of_heads(heads, kv_heads):
    lens = [9, 1, 4], [9, 70, 30]
    batch = contiguous(*lens, heads, kv_heads, 40, torch.bfloat16)
    check(Path("cpu"), batch, is_causal=True)


@pytest.mark.parametrize("page", [None, 16])
@pytest.mark.parametrize("cap", [1.0, 30.0])
def test_softcap(path, page, cap):
    batch = make(QUERY_LENS, KV_LENS, 4, 2, 32, torch.float32, page=page)
    batch.arguments["q"] *= 10
    check(path, batch, softcap=cap, is_causal=True)


@pytest.mark.parametrize("page", [None, 16])
@pytest.mark.parametrize("shape", [(4,), (6, 4)])
def test_alibi(path, page, shape):
    batch = make(QUERY_LENS, KV_LENS, 4, 2, 32, torch.float32, page=page)
    check(path, batch, alibi_slopes=torch.rand(shape), is_causal=True)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("page", [None, 16])
def test_sinks(path, page, dtype):
    """In the model's dtype, with a gradient of that."""
    batch = make(QUERY_LENS, KV_LENS, 4, 2, 32, dtype, page=page)
    sinks = torch.tensor([-3.0, 0.0, 2.5, 9.0]).to(dtype)
    got = check(path, batch, sinks=sinks, is_causal=True)
    assert got["sinks"].ne(0).all()


def test_a_sink_of_minus_infinity_has_no_gradient(path):
    batch = contiguous([3], [7], 2, 1, 32, torch.float32)
    got = check(path, batch, sinks=torch.full((2,), -torch.inf))
    assert torch.equal(got["sinks"], torch.zeros(2))


@pytest.mark.parametrize("pads", [None, [2, 0, 4, 1, 3, 0]])
@pytest.mark.parametrize("slack", [0, 3])
def test_left_padding_and_used_lengths(path, pads, slack):
    """Keys of no sequence are NaN, and get zero."""
    lens = QUERY_LENS, KV_LENS
    batch = contiguous(*lens, 4, 2, 32, torch.float32, pads, slack)
    got = check(path, batch, is_causal=True)
    unowned = batch.arguments["k"].isnan()
    assert unowned.any() and got["k"][unowned].eq(0).all()
    assert got["v"][unowned].eq(0).all()


@pytest.mark.parametrize("used", [0, 1])
def test_of_one_result(path, used):
    """out's gradient alone, and lse's."""
    batch = contiguous(QUERY_LENS, KV_LENS, 4, 2, 32, torch.float32)
    grads = [None, None]
    grads[used] = cotangents(batch)[used]
    check(path, batch, grads=grads, is_causal=True, sinks=torch.randn(4))


@pytest.mark.parametrize("asked", [("q",), ("k",), ("v",), ("sinks",), ("q", "v")])
def test_only_what_is_asked_for_is_computed(path, asked, monkeypatch):
    calls = []
    op = OPS["flash_attn_varlen_backward"]
    lower = op.lower
    monkeypatch.setitem(op.__dict__, "lower", lambda *a: calls.append(a) or lower(*a))
    op._plans.clear()
    batch = contiguous(QUERY_LENS, KV_LENS, 4, 2, 32, torch.float32)
    check(path, batch, asked, is_causal=True, sinks=torch.randn(4))
    wants = {args[-3:] for args in calls}
    assert wants == {("q" in asked, not {"k", "v"}.isdisjoint(asked), "sinks" in asked)}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("page", [None, 16])
def test_everything_at_once(path, page, dtype):
    batch = make([16, 1, 2, 5], [48, 100, 2, 3], 8, 2, 72, dtype, page=page)
    check(path, batch, **everything(4, 8))


@pytest.mark.parametrize("page", [None, 5])
def test_everything_without_a_handler(path, page, monkeypatch):
    """What runs then is the reference."""
    for name in ("available", "loaded"):
        monkeypatch.setattr(handlers, name, lambda platform, target: False)
    shape = [3, 4], [7, 2], 8, 2, 16, torch.float32
    if page is None:
        batch = contiguous(*shape, pads=[2, 1], slack=3)
    else:
        batch = paged(*shape, page)
    check(path, batch, **everything(2, 8))


@pytest.mark.parametrize("page", [None, 5])
@pytest.mark.parametrize("name", ["fp8", "fp8_e5m2"])
def test_query_over_fp8(path, name, page):
    """8-bit keys and values are no leaves, with scales of each sequence and head."""
    batch = make(QUERY_LENS, KV_LENS, 4, 2, 32, torch.float32, page=page)
    scales = torch.rand(2, len(KV_LENS), 2) + 0.5
    for argument, tokens, scale in (
        ("k", batch.keys, scales[0]),
        ("v", batch.values, scales[1]),
    ):
        batch.arguments[argument] = batch.arguments[argument].to(FP8[name])
        for s, mine in enumerate(tokens):
            rounded = mine.to(FP8[name]).float()
            tokens[s] = rounded * scale[s][:, None]
    options = {"kv_cache_dtype": name, "k_scale": scales[0], "v_scale": scales[1]}
    check(path, batch, ("q", "sinks"), **options, sinks=torch.randn(4), is_causal=True)


@pytest.mark.parametrize("page", [None, 5])
def test_rows_of_no_sequence(path, page):
    batch = make([2, 3], [6, 7], 4, 2, 32, torch.float32, page=page)
    batch.arguments["q"] = torch.cat([batch.arguments["q"], torch.randn(4, 4, 32)])
    got = check(path, batch, sinks=torch.ones(4))
    assert torch.equal(got["q"][5:], torch.zeros(4, 4, 32))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_lse_of_rows_that_see_nothing(path, value):
    """It is infinite, and so perhaps is its gradient: neither may count."""
    batch = contiguous([9], [4], 4, 2, 32, torch.float32)
    grad_out, grad_lse = cotangents(batch)
    grads = (grad_out, grad_lse.clone())
    grads[1][:, :5] = value
    got = gradients(path, {**batch.arguments, "is_causal": True}, grads)
    grads[1][:, :5] = 0
    wanted = gradients(path, {**batch.arguments, "is_causal": True}, grads)
    for name, t in got.items():
        assert same(t, wanted[name])
    assert got["q"][:5].eq(0).all()


@pytest.mark.parametrize(
    "query_lens, kv_lens", [([0, 0], [3, 0]), ([], []), ([3, 1], [0, 0])]
)
def test_empty(path, query_lens, kv_lens):
    batch = contiguous(query_lens, kv_lens, 4, 2, 32, torch.float32)
    got = check(path, batch, is_causal=True, sinks=torch.ones(4))
    assert all(t.eq(0).all() for t in got.values())


def test_a_row_of_two_sequences(path):
    """seqused_k may reach over the next sequence's keys: both parts are summed."""
    batch = contiguous([2, 3], [4, 5], 4, 2, 32, torch.float32)
    for name in ("k", "v"):
        batch.arguments[name] = batch.arguments[name].nan_to_num(0.5)
    arguments = {**batch.arguments, "seqused_k": int32(7, 5), "is_causal": True}
    got = gradients(path, arguments, grads := cotangents(batch))
    apart = {"q": [], "k": 0, "v": 0}
    for rows, keys in ((slice(0, 2), slice(0, 7)), (slice(2, 5), slice(4, 9))):
        ends = int32(0, rows.stop - rows.start), int32(0, keys.stop - keys.start)
        part = {"cu_seqlens_q": ends[0], "cu_seqlens_k": ends[1], "seqused_k": None}
        part |= {"q": arguments["q"][rows], "k": arguments["k"][keys]}
        part |= {"v": arguments["v"][keys]}
        found = gradients(
            path, {**arguments, **part}, (grads[0][rows], grads[1][:, rows])
        )
        apart["q"].append(found["q"])
        for name in ("k", "v"):
            whole = torch.zeros_like(arguments[name])
            whole[keys] = found[name]
            apart[name] = apart[name] + whole
    apart["q"] = torch.cat(apart["q"])
    for name, t in apart.items():
        assert torch.allclose(got[name], t, atol=1e-5)


def test_wild_integers_stay_in_bounds(path):
    pads = [1, 1]
    rows = contiguous([2, 2], [8, 8], 2, 1, 32, torch.float32, pads, 1).arguments
    pages = paged([2, 2], [8, 8], 2, 1, 32, torch.float32, 4, spare=0).arguments
    for arguments in (rows, pages):
        is_paged = "block_table" in arguments
        for name, t in arguments.items():
            if not isinstance(t, torch.Tensor) or t.dtype != torch.int32:
                continue
            for value in (2**31 - 1, -(2**31)):
                changed = {**arguments, name: torch.full_like(t, value)}
                grads = torch.ones(4, 2, 32), None
                asked = ("q",) if is_paged else ("q", "k", "v")
                got = gradients(path, changed, grads, asked)
                assert all(got[n].shape == arguments[n].shape for n in asked)


@pytest.mark.parametrize("causal", [True, False])
def test_agrees_with_sdpa(path, causal):
    batch = contiguous([13, 13], [13, 13], 6, 2, 48, torch.float32)
    grads = cotangents(batch)[0], None
    arguments = {**batch.arguments, "is_causal": causal}
    got = gradients(path, arguments, grads, "qkv")
    leaves = [arguments[n][:26].clone().requires_grad_() for n in "qkv"]
    q, k, v = (t.reshape(2, 13, -1, 48).transpose(1, 2) for t in leaves)
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=causal, enable_gqa=True
    )
    wanted = torch.autograd.grad(
        out.transpose(1, 2).reshape(26, 6, 48), leaves, grads[0]
    )
    for n, t in zip("qkv", wanted, strict=True):
        assert torch.allclose(got[n][:26], t, atol=5e-6)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_batch(data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 99)))
    seqs = draw(st.integers(1, 4))
    query_lens = draw(st.lists(st.integers(0, 6), min_size=seqs, max_size=seqs))
    kv_lens = draw(st.lists(st.integers(0, 40), min_size=seqs, max_size=seqs))
    kv_heads = draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, 3))
    dtype = draw(st.sampled_from(FLOATS))
    shape = query_lens, kv_lens, heads, kv_heads, 8 * draw(st.integers(1, 8)), dtype
    if draw(st.booleans()):
        batch = paged(*shape, draw(st.integers(1, 9)))
    else:
        pads = draw(st.lists(st.integers(0, 3), min_size=seqs, max_size=seqs))
        batch = contiguous(*shape, pads, draw(st.integers(0, 2)))
    options = {
        "is_causal": draw(st.booleans()),
        "window_left": draw(st.sampled_from([-1, 0, 3, 17])),
        "window_right": draw(st.sampled_from([-1, 0, 4])),
        "softcap": draw(st.sampled_from([0.0, 2.0, 20.0])),
    }
    if draw(st.booleans()):
        of_seqs = draw(st.sampled_from([(), (seqs,)]))
        options["alibi_slopes"] = torch.rand(*of_seqs, heads)
    if draw(st.booleans()):
        options["sinks"] = torch.randn(heads)
    # A window of max_seqlen_k and more is none.
    batch.arguments["max_seqlen_k"] = 64
    with torch.enable_grad():
        check(Path("cpu"), batch, **options)
