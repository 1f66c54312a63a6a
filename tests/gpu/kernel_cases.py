"""The cases of check_kernels.py: what is called, and what must come out.

Each check draws its operands from the generator it is given, calls one op and
compares with a float64 reference; it raises AssertionError, or returns what is
worth reporting.
"""

import jax
import jax_ops
import ml_dtypes
import numpy as np

BF16 = np.dtype(ml_dtypes.bfloat16)
F16 = np.dtype(np.float16)
F32 = np.dtype(np.float32)
DTYPES = (F32, F16, BF16)
# Half the distance between neighbours at 1.
ROUNDING = {F32: 2.0**-24, F16: 2.0**-11, BF16: 2.0**-8}


def poison(shape, dtype):
    """Leaves NaNs in memory that the next result of that size may reuse."""
    jax.block_until_ready(jax.device_put(np.full(shape, np.nan, dtype)))


def check_rms_norm(rng, dtype, tokens, hidden):
    x = (rng.standard_normal((tokens, hidden)) * 3).astype(dtype)
    w = (1 + 0.3 * rng.standard_normal(hidden)).astype(dtype)
    poison(x.shape, dtype)
    got = np.asarray(jax.jit(jax_ops.rms_norm)(x, w)).astype(np.float64)
    x64 = x.astype(np.float64)
    mean = (x64**2).sum(-1, keepdims=True) / max(hidden, 1)
    s = 1 / np.sqrt(mean + np.float32(1e-6))
    normed = (x64 * s).astype(dtype).astype(np.float64)
    want = (normed * w.astype(np.float64)).astype(dtype).astype(np.float64)
    relative = np.abs(got - want) / np.maximum(np.abs(want), 1e-30)
    # s differs from fp32's in its last bits, which may flip a rounding of
    # the first product and then of the second. One rounding in place of two
    # would change a quarter of the 16-bit elements.
    worst = float(relative.max(initial=0))
    changed = float((got != want).mean()) if got.size else 0.0
    limit = 16 if dtype == F32 else 6
    assert worst <= limit * ROUNDING[dtype], f"relative error {worst}"
    if dtype != F32 and got.size > 1000:
        assert changed < 0.01, f"{changed:.2%} of the elements differ"
    return {"worst": worst, "changed": changed}


def to_fp8(x, scale, dtype):
    limit = float(ml_dtypes.finfo(dtype).max)
    scaled = x.astype(np.float32) / np.float32(scale)
    return np.clip(scaled, -limit, limit).astype(dtype)


def check_reshape(
    rng, dtype, cache, layout, tokens, heads, head_dim, page, blocks=7, one=False
):
    kv_cache_dtype, cache_dtype = {
        "auto": ("auto", dtype),
        "e4m3": ("fp8_e4m3", np.dtype(ml_dtypes.float8_e4m3fn)),
        "e5m2": ("fp8_e5m2", np.dtype(ml_dtypes.float8_e5m2)),
        "uint8": ("fp8", np.dtype(np.uint8)),
    }[cache]
    # Two rows more than slots: they must be ignored.
    shape = (tokens + 2, heads, head_dim)
    key, value = ((rng.standard_normal(shape) * 40).astype(dtype) for _ in "kv")
    if cache != "auto":
        key.reshape(-1)[:3] = [np.inf, -np.inf, np.nan]
        value.reshape(-1)[:3] = [60000.0, -60000.0, 1e-7]
    slots = rng.permutation(max(blocks * page, tokens))[:tokens].astype(np.int64)
    slots[rng.random(len(slots)) < 0.2] = -1
    if tokens > 3:
        slots[:3] = [blocks * page, np.iinfo(np.int64).max, np.iinfo(np.int64).min]
    scales = np.float32([0.37]), np.float32([1.9])

    buffer_shape, attributes = jax_ops.geometry(layout, blocks, page, heads, head_dim)
    count = 2 if layout in ("NHD", "HND") else 1
    before = [
        rng.integers(0, 100, buffer_shape).astype(np.uint8).astype(cache_dtype)
        for _ in range(count)
    ]
    want = [b.copy() for b in before]
    caches = jax_ops.logical_caches(want, layout, (blocks, page, heads, head_dim))
    rows = [key, value]
    if one:
        before, want, caches, rows = before[:1], want[:1], caches[:1], rows[:1]
    for i, slot in enumerate(slots):
        if 0 <= slot < blocks * page:
            for source, target, scale in zip(rows, caches, scales, strict=False):
                row = source[i]
                if cache == "uint8":
                    row = to_fp8(row, scale[0], ml_dtypes.float8_e4m3fn)
                    row = row.view(np.uint8)
                elif cache != "auto":
                    row = to_fp8(row, scale[0], cache_dtype)
                target[slot // page, slot % page] = row

    if one:
        run = jax.jit(
            lambda k, c, s, f: [
                jax_ops.reshape_and_cache_flash_one(
                    k, c, s, f, attributes, kv_cache_dtype
                )
            ]
        )
        got = run(key, before[0], slots, scales[0])
    else:
        run = jax.jit(
            lambda k, v, c, s, f: jax_ops.reshape_and_cache_flash(
                k, v, c, s, f, attributes, kv_cache_dtype
            )
        )
        got = run(key, value, before, slots, scales)
    for g, w in zip(got, want, strict=True):
        g = np.asarray(g)
        same = g.view(np.uint8) == w.view(np.uint8)
        if cache_dtype.itemsize == 1:
            if cache == "uint8":
                g, w = (a.view(ml_dtypes.float8_e4m3fn) for a in (g, w))
            g, w = g.astype(np.float32), w.astype(np.float32)
            same = same | (np.isnan(g) & np.isnan(w))
        assert same.all(), f"{(~same).sum()} of {same.size} bytes differ"
    return {}


def attention_reference(query, caches, case, inputs, scale):
    """Float64, token by token of the contract in paged_attention.h."""
    key_cache, value_cache = (c.astype(np.float64) for c in caches)
    num_blocks, page, kv_heads, _ = key_cache.shape
    tokens, heads, _ = query.shape
    out = np.zeros(query.shape)
    max_seqs, max_blocks = inputs["block_tables"].shape
    starts = np.minimum(
        np.maximum.accumulate(np.maximum(inputs["query_start_loc"], 0)), tokens
    )
    for s in range(min(max(int(inputs["num_seqs"][0]), 0), max_seqs)):
        first, last = starts[s], starts[s + 1]
        context = min(max(int(inputs["context_lens"][s]), 0), max_blocks * page)
        if last <= first or context == 0:
            continue
        j = np.arange(context)
        blocks = inputs["block_tables"][s][j // page]
        exists = (blocks >= 0) & (blocks < num_blocks)
        blocks = np.where(exists, blocks, 0)
        keys = key_cache[blocks, j % page]
        values = value_cache[blocks, j % page]
        keys = np.repeat(keys, heads // kv_heads, 1)
        values = np.repeat(values, heads // kv_heads, 1)
        q = query[first:last].astype(np.float64)
        logits = np.einsum("ihd,jhd->hij", q, keys) * np.float32(scale)
        cap = case.get("soft_cap", 0.0)
        if cap:
            logits = cap * np.tanh(logits / cap)
        position = np.arange(last - first)[:, None] + context - (last - first)
        seen = (j[None] <= position) & exists[None]
        window = case.get("window", 0)
        if window:
            seen &= j[None] > position - window
        logits = np.where(seen[None], logits, -np.inf)
        top = logits.max(-1, keepdims=True)
        weights = np.exp(logits - np.where(np.isinf(top), 0, top))
        total = weights.sum(-1, keepdims=True)
        weights /= np.where(total == 0, 1, total)
        out[first:last] = np.einsum("hij,jhd->ihd", weights, values)
    return out


def attention_inputs(rng, case):
    """Integer operands, padded as a bucketed graph pads them."""
    seqs = case["seqs"]
    page = case.get("page", 16)
    max_seqs = len(seqs) + case.get("pad_seqs", 0)
    longest = max([c for _, c in seqs], default=1)
    max_blocks = -(-longest // page) + case.get("pad_blocks", 1)
    used = sum(-(-c // page) for _, c in seqs)
    num_blocks = used + case.get("spare_blocks", 3)
    tables = np.full((max_seqs, max_blocks), -1, np.int32)
    free = list(rng.permutation(num_blocks))
    for row, (_, context) in zip(tables, seqs, strict=False):
        for i in range(-(-context // page)):
            row[i] = free.pop()
    starts = np.cumsum([0] + [q for q, _ in seqs]).astype(np.int32)
    starts += case.get("lead_tokens", 0)
    starts = np.concatenate([starts, np.full(max_seqs - len(seqs), starts[-1])])
    inputs = {
        "context_lens": np.array(
            [c for _, c in seqs] + [0] * (max_seqs - len(seqs)), np.int32
        ),
        "block_tables": tables,
        "query_start_loc": starts.astype(np.int32),
        "num_seqs": np.array([len(seqs)], np.int32),
    }
    tokens = int(starts[-1]) + case.get("pad_tokens", 0)
    for name, value in case.get("override", {}).items():
        inputs[name] = np.asarray(value, np.int32).reshape(inputs[name].shape)
    if case.get("bad_blocks"):
        tables[rng.random(tables.shape) < 0.2] = num_blocks
        tables[rng.random(tables.shape) < 0.1] = np.iinfo(np.int32).max
    return inputs, tokens, num_blocks


def check_attention(rng, **case):
    dtype = case["dtype"]
    heads, kv_heads, head_dim = case["heads"]
    layout = case.get("layout", "NHD")
    inputs, tokens, num_blocks = attention_inputs(rng, case)
    logical = (num_blocks, case.get("page", 16), kv_heads, head_dim)
    shape, attributes = jax_ops.geometry(layout, *logical)
    count = 2 if layout in ("NHD", "HND") else 1
    buffers = [rng.standard_normal(shape).astype(dtype) for _ in range(count)]
    query = rng.standard_normal((tokens, heads, head_dim)).astype(dtype)
    scale = case.get("scale", head_dim**-0.5)
    caches = jax_ops.logical_caches(buffers, layout, logical)
    want = attention_reference(query, caches, case, inputs, scale)
    # What no query may see must not matter: make it NaN.
    seen_blocks = np.zeros(num_blocks, bool)
    table = inputs["block_tables"]
    seen_blocks[table[(table >= 0) & (table < num_blocks)]] = True
    for cache in caches:
        cache[~seen_blocks] = np.nan
    poison(query.shape, dtype)
    run = jax.jit(
        lambda q, c, i: jax_ops.paged_attention(
            q,
            c,
            **i,
            num_kv_heads=kv_heads,
            attributes=attributes,
            scale=scale,
            sliding_window=case.get("window", 0),
            soft_cap=case.get("soft_cap", 0.0),
            num_splits=case.get("splits", 1),
        )
    )
    got = np.asarray(run(query, buffers, inputs)).astype(np.float64)
    size = np.linalg.norm(want, axis=-1)
    error = np.linalg.norm(got - want, axis=-1)
    empty = size == 0
    assert (got[empty] == 0).all(), "rows that see nothing must be zero"
    worst = float((error[~empty] / size[~empty]).max(initial=0))
    # Weights and output are rounded to the dtype: about one rounding each.
    limit = {F32: 5e-6, F16: 2e-3, BF16: 1.5e-2}[dtype]
    limit *= case.get("slack", 1)
    assert worst <= limit, f"a row's relative error is {worst:.2e} > {limit:.2e}"
    return {"worst": worst}


def rms_norm_cases(quick):
    shapes = [
        (0, 8),
        (3, 0),
        (1, 1),
        (3, 7),
        (5, 100),
        (2, 129),
        (7, 65),
        (300, 24),
        (1, 40),
    ]
    if not quick:
        shapes += [(1000, 128), (17, 192), (300, 1000), (64, 2560), (301, 2560)]
        shapes += [(1, 4096), (64, 4096), (513, 4096), (300, 5120), (3, 8192)]
        shapes += [(300, 8192), (2, 14336), (300, 16384), (5, 32768), (3, 40000)]
        shapes += [(2, 65537), (70000, 16)]
    for dtype in DTYPES:
        for tokens, hidden in shapes:
            yield check_rms_norm, {"dtype": dtype, "tokens": tokens, "hidden": hidden}


def reshape_cases(quick):
    shapes = [(1, 1, 1, 1), (13, 3, 5, 3), (37, 2, 64, 16), (9, 5, 72, 7)]
    if not quick:
        shapes += [(33, 1, 6, 16), (100, 8, 128, 16), (21, 4, 36, 5), (1, 8, 256, 1)]
        shapes += [(50, 3, 2, 8), (40, 2, 520, 9)]
    layouts = ("NHD", "HND", "stacked", "interleaved", "odd")
    nothing = {"dtype": BF16, "cache": "auto", "layout": "NHD"}
    nothing |= {"tokens": 0, "heads": 2, "head_dim": 8, "page": 4}
    yield check_reshape, nothing
    yield check_reshape, nothing | {"tokens": 5, "blocks": 0}
    yield check_reshape, nothing | {"tokens": 5, "heads": 0}
    for dtype in DTYPES:
        for cache in ("auto", "e4m3", "e5m2", "uint8"):
            for i, (tokens, heads, head_dim, page) in enumerate(shapes):
                case = {"dtype": dtype, "cache": cache, "tokens": tokens}
                case |= {"heads": heads, "head_dim": head_dim, "page": page}
                yield check_reshape, case | {"layout": layouts[i % 5]}
                if not quick:
                    yield check_reshape, case | {"layout": layouts[(i + 2) % 5]}
                    one = layouts[i % 2]
                    yield check_reshape, case | {"layout": one, "one": True}


# Query length and context of each sequence.
DECODE = [(1, 1), (1, 17), (1, 64), (1, 65), (1, 300), (1, 1023)]
PREFILL = [(5, 5), (64, 64), (1, 40), (130, 130), (33, 97), (200, 517), (3, 1000)]


def attention_cases(quick):
    def case(**values):
        return check_attention, values

    for dtype in DTYPES:
        for heads in ((4, 2, 40), (3, 3, 64), (8, 1, 128)):
            yield case(dtype=dtype, heads=heads, seqs=DECODE[:5], page=5)
            yield case(dtype=dtype, heads=heads, seqs=DECODE[2:], layout="odd")
            yield case(dtype=dtype, heads=heads, seqs=PREFILL[:5], page=5, splits=3)
        # No sequence, no page in the table, no block in the cache, no token.
        heads = (4, 2, 64)
        yield case(dtype=dtype, heads=heads, seqs=[], pad_tokens=5)
        yield case(dtype=dtype, heads=heads, seqs=[(2, 0)], pad_blocks=0, splits=2)
        yield case(dtype=dtype, heads=heads, seqs=[(9, 0)], spare_blocks=0)
        yield case(dtype=dtype, heads=heads, seqs=[(0, 30)])
        bad = {"context_lens": [9999, -5, 64, 33], "num_seqs": 9}
        yield case(
            dtype=dtype,
            heads=heads,
            seqs=[(3, 50), (5, 20), (70, 64), (1, 33)],
            pad_tokens=9,
            lead_tokens=3,
            bad_blocks=True,
            override=bad,
            slack=2,
        )
        if quick:
            continue
        for heads in ((4, 2, 8), (6, 2, 72), (8, 8, 96), (32, 4, 128), (5, 1, 256)):
            for page, layout in ((16, "NHD"), (1, "HND"), (128, "stacked")):
                for seqs in (DECODE, PREFILL, DECODE + PREFILL):
                    yield case(
                        dtype=dtype, heads=heads, seqs=seqs, page=page, layout=layout
                    )
        heads = (8, 2, 128)
        both = PREFILL[:4] + DECODE
        for seqs in (DECODE, both):
            values = {"dtype": dtype, "heads": heads, "seqs": seqs}
            yield case(**values, layout="interleaved", pad_seqs=200, pad_tokens=77)
            yield case(**values, window=1)
            yield case(**values, window=50, splits=4)
            yield case(**values, window=700, soft_cap=2.0)
            yield case(**values, soft_cap=30.0, splits=2, page=33)
            yield case(**values, splits=64, pad_blocks=500)
            yield case(**values, scale=-0.3, slack=3)
            yield case(**values, scale=3.0, slack=3)
            yield case(**values, bad_blocks=True, splits=3, slack=2)
        # Query rows without enough context, sequences without rows or tokens,
        # prefix sums in disorder.
        odd = [(9, 4), (0, 50), (70, 1), (4, 0), (16, 16), (0, 0), (1, 200)]
        yield case(dtype=dtype, heads=heads, seqs=odd, pad_tokens=40, lead_tokens=70)
        yield case(dtype=dtype, heads=heads, seqs=odd, pad_tokens=300, splits=5)
        for starts in ([-7, 5, 3, 40, 9999], [30, 20, 60, 60, 61], [0, 0, 0, 0, 0]):
            yield case(
                dtype=dtype,
                heads=heads,
                seqs=[(10, 90), (20, 64), (30, 31), (1, 128)],
                override={"query_start_loc": starts},
                pad_tokens=5,
            )
        for count in (0, -3, 2, 77):
            yield case(
                dtype=dtype,
                heads=heads,
                seqs=[(10, 90), (20, 64), (30, 31)],
                override={"num_seqs": count},
            )
        yield case(dtype=dtype, heads=(2, 1, 64), seqs=[(1, 40)] * 700, pad_seqs=99)
        yield case(dtype=dtype, heads=(2, 1, 128), seqs=[(2, 9000), (300, 3000)])
