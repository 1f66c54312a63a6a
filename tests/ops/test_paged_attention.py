"""xla_ops.paged_attention: numerics against float64, masks, bad values, errors."""

import pytest
import torch
import torch_xla.debug.metrics as met
from hypothesis import given, settings
from hypothesis import strategies as st

import xla_ops
from support import Path, assert_close_to_exact, int32, same


def attend(q, kc, vc, lens, tables, starts, scale, window=None, cap=None, dtype=None):
    """The op by a plain loop over sequences and heads, in `dtype` throughout."""
    dtype = dtype or torch.float64
    out = torch.zeros(q.shape, dtype=dtype)
    page = kc.shape[1]
    group = q.shape[1] // kc.shape[2]
    for s, length in enumerate(lens):
        rows = range(starts[s], starts[s + 1])
        if not length or not len(rows):
            continue
        slots = [(tables[s][j // page], j % page) for j in range(length)]
        k = torch.stack([kc[b, o] for b, o in slots]).to(dtype)
        v = torch.stack([vc[b, o] for b, o in slots]).to(dtype)
        for i, row in enumerate(rows):
            last = i + length - len(rows)
            first = 0 if window is None else max(0, last - window + 1)
            if last < 0:
                continue
            for h in range(q.shape[1]):
                kh = k[first : last + 1, h // group]
                logits = (kh * q[row, h].to(dtype)).sum(-1) * scale
                if cap:
                    logits = cap * torch.tanh(logits / cap)
                out[row, h] = logits.softmax(0) @ v[first : last + 1, h // group]
    return out


def batch(query_lens, context_lens, heads, kv_heads, dim, page, dtype, spare=2):
    """Makes a batch with shuffled blocks, poisoned spare blocks and unused tables."""
    blocks_of = [-(-n // page) for n in context_lens]
    used = sum(blocks_of)
    num_blocks = used + spare
    order = torch.randperm(num_blocks).tolist()
    width = max([*blocks_of, 1]) + 1
    tables, at = [], 0
    for n in blocks_of:
        tables.append(order[at : at + n] + [-7] * (width - n))
        at += n
    kv = torch.randn(2, num_blocks, page, kv_heads, dim).to(dtype)
    # What no sequence owns must never reach a result.
    kv[:, order[used:]] = torch.nan
    for n, table in zip(context_lens, tables, strict=True):
        if n % page:
            kv[:, table[n // page], n % page :] = torch.nan
    starts = [0]
    for n in query_lens:
        starts.append(starts[-1] + n)
    return {
        "query": torch.randn(starts[-1], heads, dim).to(dtype),
        "kv_cache": kv,
        "context_lens": int32(*context_lens),
        "block_tables": int32(*tables).reshape(len(tables), width),
        "query_start_loc": int32(*starts),
        "num_seqs": int32(len(query_lens)),
    }


def check(path, given, scale, separate=False, **options):
    def call(given):
        kv = given["kv_cache"]
        pair = (kv[0], kv[1]) if separate else kv
        return xla_ops.paged_attention(
            **{**given, "kv_cache": pair}, scale=scale, **options
        )

    out, _ = path.run(call, given)
    plain = (
        given["query"],
        *given["kv_cache"],
        given["context_lens"].tolist(),
        given["block_tables"].tolist(),
        given["query_start_loc"].tolist(),
        scale,
        options.get("sliding_window"),
        options.get("soft_cap"),
    )
    same = attend(*plain, dtype=given["query"].dtype)
    assert_close_to_exact(out, same, attend(*plain), floor=2e-6)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "query_lens, context_lens, heads, kv_heads, dim, page",
    [
        ([1], [1], 1, 1, 8, 1),
        ([3, 1, 5], [3, 17, 9], 4, 2, 24, 3),
        ([1, 1, 1, 1], [33, 1, 0, 64], 8, 2, 64, 16),
        ([0, 7, 0], [5, 40, 0], 6, 6, 80, 16),
        ([65], [130], 2, 1, 128, 32),
        ([9, 1], [9, 300], 4, 1, 256, 16),
    ],
)
def test_numerics(path, query_lens, context_lens, heads, kv_heads, dim, page, dtype):
    given = batch(query_lens, context_lens, heads, kv_heads, dim, page, dtype)
    check(path, given, dim**-0.5)


@pytest.mark.parametrize("window", [1, 4, 16, 1000])
def test_sliding_window(path, window):
    given = batch([5, 1], [20, 33], 4, 2, 32, 4, torch.float32)
    check(path, given, 0.2, sliding_window=window)


@pytest.mark.parametrize("cap", [1.0, 30.0])
def test_soft_cap(path, cap):
    given = batch([5, 1], [20, 33], 4, 2, 32, 4, torch.float32)
    given["query"] *= 10
    check(path, given, 0.5, soft_cap=cap)


def test_window_and_cap_in_half(path):
    given = batch([16, 1, 2], [48, 100, 2], 8, 2, 64, 16, torch.float16)
    check(path, given, 0.125, sliding_window=20, soft_cap=15.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_decode_is_split(path, dtype):
    given = batch([1, 1], [1500, 700], 4, 2, 64, 16, dtype)
    check(path, given, 0.125)


def test_separate_caches(path):
    given = batch([3, 1], [10, 18], 4, 2, 16, 8, torch.float32)
    check(path, given, 0.25, separate=True)


def test_caches_in_other_layouts(path):
    given = batch([3, 1], [10, 18], 4, 2, 16, 8, torch.float32)
    wanted = check(path, given, 0.25)
    kv = given["kv_cache"]
    layouts = {
        "HND": (kv.transpose(2, 3).contiguous(), lambda t: t.transpose(2, 3).unbind(0)),
        "blocks first": (kv.transpose(0, 1).contiguous(), lambda t: t.unbind(1)),
    }
    for stored, take in layouts.values():

        def call(given, stored, take=take):
            return xla_ops.paged_attention(
                **{**given, "kv_cache": take(stored)}, scale=0.25
            )

        out, _ = path.run(call, given, stored)
        assert torch.equal(out, wanted)


def test_rows_of_no_sequence_are_zero(path):
    given = batch([2, 3, 1], [6, 7, 8], 4, 2, 16, 4, torch.float32)
    given["query"] = torch.cat([given["query"], torch.randn(5, 4, 16)])
    given["num_seqs"] = int32(2)
    out, _ = path.run(lambda g: xla_ops.paged_attention(**g, scale=0.25), given)
    assert out[:5].abs().sum(-1).gt(0).all()
    assert torch.equal(out[5:], torch.zeros(6, 4, 16))


@pytest.mark.parametrize("bad", [-1, 10**6, -(2**31), 2**31 - 1])
def test_bad_block_ids_are_masked(path, bad):
    given = batch([1], [12], 2, 1, 16, 4, torch.float32)
    given["block_tables"][0, 1] = bad
    out, _ = path.run(lambda g: xla_ops.paged_attention(**g, scale=0.25), given)
    q, (kc, vc) = given["query"].double(), given["kv_cache"].double()
    table = given["block_tables"][0].tolist()
    slots = [(table[j // 4], j % 4) for j in (0, 1, 2, 3, 8, 9, 10, 11)]
    k = torch.stack([kc[b, o, 0] for b, o in slots])
    v = torch.stack([vc[b, o, 0] for b, o in slots])
    wanted = torch.softmax(q[0] @ k.T * 0.25, -1) @ v
    assert torch.allclose(out[0].double(), wanted, atol=1e-5)


def test_wild_integers_stay_in_bounds(path):
    """Values that no shape allows are clamped: no crash, no NaN from elsewhere."""
    given = batch([2, 2], [8, 8], 2, 1, 16, 4, torch.float32, spare=0)
    wild = [2**31 - 1, -(2**31)]
    for name in ("context_lens", "query_start_loc", "num_seqs", "block_tables"):
        for value in wild:
            changed = {**given, name: torch.full_like(given[name], value)}
            out, _ = path.run(
                lambda g: xla_ops.paged_attention(**g, scale=0.25), changed
            )
            assert out.shape == given["query"].shape


def test_context_shorter_than_queries(path):
    given = batch([4], [2], 2, 1, 16, 4, torch.float32)
    out = check(path, given, 0.25)
    assert torch.equal(out[:2], torch.zeros(2, 2, 16))


@pytest.mark.parametrize("tokens, seqs, blocks", [(0, 2, 3), (3, 0, 3), (3, 2, 0)])
def test_empty(path, tokens, seqs, blocks):
    given = {
        "query": torch.randn(tokens, 2, 16),
        "kv_cache": torch.randn(2, blocks, 4, 1, 16),
        "context_lens": torch.ones(seqs, dtype=torch.int32),
        "block_tables": torch.zeros(seqs, 1, dtype=torch.int32),
        "query_start_loc": torch.zeros(seqs + 1, dtype=torch.int32),
        "num_seqs": int32(seqs),
    }
    out, _ = path.run(lambda g: xla_ops.paged_attention(**g, scale=0.25), given)
    assert torch.equal(out, torch.zeros(tokens, 2, 16))


FEATURES = {
    "plain": {},
    "alibi": {"alibi_slopes": torch.arange(4.0) / 8},
    "alibi of sequences": {"alibi_slopes": torch.arange(8.0).reshape(2, 4) / 8},
    "sinks": {"sinks": torch.tensor([-1.0, 0, 1, 5], dtype=torch.bfloat16)},
    "fp8": {
        "kv_cache_dtype": "fp8_e5m2",
        "k_scale": torch.tensor(0.5),
        "v_scale": torch.arange(1.0, 5).reshape(2, 2),
    },
}


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("name", FEATURES)
def test_features_and_lse_are_those_of_flash_attn_varlen(path, name, separate, window):
    given = batch([5, 1], [20, 3], 4, 2, 32, 4, torch.float32)
    if name == "fp8":
        given["kv_cache"] = given["kv_cache"].to(torch.float8_e5m2).view(torch.uint8)
    features = FEATURES[name]

    def paged(given, features, return_lse):
        kv = given["kv_cache"]
        return xla_ops.paged_attention(
            **{**given, "kv_cache": kv.unbind(0) if separate else kv},
            scale=0.25,
            sliding_window=window,
            return_lse=return_lse,
            **features,
        )

    def flash(given, features):
        return xla_ops.flash_attn_varlen(
            given["query"],
            *given["kv_cache"],
            *(given["query_start_loc"], None, 5, 24, 0.25, True),
            window_left=window - 1 if window else -1,
            seqused_k=given["context_lens"],
            block_table=given["block_tables"],
            **features,
        )

    wanted, _ = path.run(flash, given, features)
    got, _ = path.run(lambda *args: paged(*args, True), given, features)
    out, _ = path.run(lambda *args: paged(*args, False), given, features)
    assert all(same(g, w) for g, w in zip(got, wanted, strict=True))
    assert same(out, wanted[0])


def test_lse_of_rows_of_no_sequence(path):
    given = batch([2, 3], [6, 7], 4, 2, 16, 4, torch.float32)
    given["num_seqs"] = int32(1)

    def call(given):
        return xla_ops.paged_attention(**given, scale=0.25, return_lse=True)

    (out, lse), _ = path.run(call, given)
    assert lse[:, :2].isfinite().all()
    assert torch.all(lse[:, 2:] == torch.inf) and not out[2:].any()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_batch(data):
    draw = data.draw
    # The tensors follow from what is drawn, so that an example fails again.
    torch.manual_seed(draw(st.integers(0, 99)))
    seqs = draw(st.integers(1, 4))
    query_lens = draw(st.lists(st.integers(0, 6), min_size=seqs, max_size=seqs))
    context_lens = [n + draw(st.integers(0, 20)) for n in query_lens]
    kv_heads = draw(st.integers(1, 3))
    given = batch(
        query_lens,
        context_lens,
        kv_heads * draw(st.integers(1, 3)),
        kv_heads,
        8 * draw(st.integers(1, 8)),
        draw(st.integers(1, 9)),
        draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])),
    )
    options = {}
    if draw(st.booleans()):
        options["sliding_window"] = draw(st.integers(1, 12))
    if draw(st.booleans()):
        options["soft_cap"] = draw(st.floats(0.5, 50.0))
    check(Path("cpu"), given, 0.25, **options)


@pytest.mark.parametrize("name", ["lazy", "cpu"])
def test_debug_mode_reports_block_ids(name, debug_mode, capfd):
    given = batch([1], [12], 2, 1, 16, 4, torch.float32)
    given["block_tables"][0, 1] = 77
    Path(name).run(lambda g: xla_ops.paged_attention(**g, scale=0.25), given)
    captured = capfd.readouterr()
    text = captured.err + captured.out
    assert "paged_attention: block_tables[0, 1] must be" in text
    assert "got 77; masked" in text


Q = torch.ones(3, 4, 16)
KV = torch.ones(2, 5, 4, 2, 16)
ERRORS = [
    ({"query": Q.int()}, "query must be float32, float16 or bfloat16, got int32"),
    (
        {"query": torch.ones(3, 64)},
        "query must have shape [num_tokens, num_heads, head_dim], got [3, 64]",
    ),
    (
        {"query": torch.ones(3, 4, 12), "kv_cache": torch.ones(2, 5, 4, 2, 12)},
        "query must have a head_dim that is a multiple of 8 up to 256, got 12",
    ),
    (
        {"query": torch.ones(3, 4, 264), "kv_cache": torch.ones(2, 5, 4, 2, 264)},
        "query must have a head_dim that is a multiple of 8 up to 256, got 264",
    ),
    (
        {"kv_cache": torch.ones(5, 4, 2, 16)},
        "kv_cache must have shape [2, num_blocks, page_size, num_kv_heads, head_dim],"
        " got [5, 4, 2, 16]",
    ),
    ({"kv_cache": KV.half()}, "key_cache must be float32, got float16"),
    ({"kv_cache": KV[..., :8].clone()}, "key_cache must have head_dim 16, got 8"),
    (
        {"kv_cache": torch.ones(2, 5, 4, 3, 16)},
        "num_kv_heads must divide num_heads 4, got 3",
    ),
    ({"context_lens": torch.ones(2)}, "context_lens must be int32, got float32"),
    (
        {"context_lens": int32(1, 1).reshape(2, 1)},
        "context_lens must have shape [max_num_seqs], got [2, 1]",
    ),
    (
        {"block_tables": int32([0], [1], [2])},
        "block_tables must have shape [2, max_blocks], got [3, 1]",
    ),
    ({"query_start_loc": int32(0, 3)}, "query_start_loc must have shape [3], got [2]"),
    ({"num_seqs": int32(2, 2)}, "num_seqs must have 1 element, got shape [2]"),
    ({"scale": float("inf")}, "scale must be finite, got inf"),
    ({"sliding_window": -1}, "sliding_window must be at least 0, got -1"),
    ({"soft_cap": -1.0}, "soft_cap must be finite and at least 0, got -1"),
    ({"sinks": torch.ones(2)}, "sinks must have shape [4], got [2]"),
    (
        {"kv_cache_dtype": "fp8"},
        "key_cache must be float8_e4m3fn or uint8, got float32",
    ),
]


@pytest.mark.parametrize("scale", [torch.tensor(7.0), torch.ones(3).half()])
def test_scales_of_a_cache_that_is_not_fp8_are_ignored(path, scale):
    """vLLM's layers pass them always."""
    given = batch([2, 1], [5, 9], 4, 2, 16, 4, torch.float32)
    given |= {"scale": 0.25}
    wanted, _ = path.run(lambda g: xla_ops.paged_attention(**g), given)
    given |= {"k_scale": scale, "v_scale": scale}
    out, _ = path.run(lambda g: xla_ops.paged_attention(**g), given)
    assert torch.equal(out, wanted)


@pytest.mark.parametrize("num_seqs", [0, 1, 2, 9, -1])
def test_num_seqs_as_an_int(path, num_seqs):
    given = batch([2, 1], [5, 9], 4, 2, 16, 4, torch.float32) | {"scale": 0.25}
    given["num_seqs"] = int32(num_seqs)
    wanted, _ = path.run(lambda g: xla_ops.paged_attention(**g), given)
    del given["num_seqs"]
    out, _ = path.run(lambda g: xla_ops.paged_attention(**g, num_seqs=num_seqs), given)
    assert torch.equal(out, wanted)


def test_num_seqs_as_an_int_is_data_lazily():
    """A new number is no new program."""
    given = batch([2, 1], [5, 9], 4, 2, 16, 4, torch.float32) | {"scale": 0.25}
    del given["num_seqs"]
    compiled = lambda: met.metric_data("CompileTime")[0]  # noqa: E731
    path = Path("lazy")
    run = lambda n: path.run(  # noqa: E731
        lambda g: xla_ops.paged_attention(**g, num_seqs=n), given
    )
    run(2)
    before = compiled()
    for n in (1, 3, 4, 7):
        run(n)
    assert compiled() == before


@pytest.mark.parametrize("changes, message", ERRORS, ids=[m for _, m in ERRORS])
def test_errors(path, changes, message):
    given = {
        "query": Q,
        "kv_cache": KV,
        "context_lens": int32(2, 1),
        "block_tables": int32([0], [1]),
        "query_start_loc": int32(0, 2, 3),
        "num_seqs": int32(2),
        "scale": 0.25,
    } | changes
    with pytest.raises(Exception) as error:
        path.run(lambda g: xla_ops.paged_attention(**g), given)
    assert "paged_attention: " + message in str(error.value)


def test_kv_cache_must_be_a_pair():
    with pytest.raises(ValueError, match=r"kv_cache must be a pair .*, got 3 tensors"):
        xla_ops.paged_attention(
            Q, [KV[0]] * 3, int32(1), int32([0]), int32(0, 3), int32(1), 0.25
        )
