"""The cases of check_kernels.py: what is called, and what must come out.

Each check draws its operands from the generator it is given, calls one op and
compares with a float64 reference; it raises AssertionError, or returns what is
worth reporting.
"""

import itertools
import traceback

import jax
import ml_dtypes
import numpy as np

import kernel_calls
import xla_ops.jax as xj

BF16 = np.dtype(ml_dtypes.bfloat16)
F16 = np.dtype(np.float16)
F32 = np.dtype(np.float32)
DTYPES = (F32, F16, BF16)
# Half the distance between neighbours at 1.
ROUNDING = {F32: 2.0**-24, F16: 2.0**-11, BF16: 2.0**-8}


def poison(shape, dtype):
    """Leaves NaNs in memory that the next result of that size may reuse."""
    jax.block_until_ready(jax.device_put(np.full(shape, np.nan, dtype)))


def run_cases(check, cases):
    """Calls check(generator, **case) of each; returns how many, and what failed."""
    results = {"cases": 0, "failures": []}
    for i, case in enumerate(cases):
        results["cases"] += 1
        try:
            check(np.random.default_rng(i), **case)
        except Exception:  # noqa: BLE001 - reported, and the exit status
            text = f"{case}: {traceback.format_exc()}"
            print("FAIL", text[:800], flush=True)
            results["failures"].append(text)
    return results


def check_rms_norm(rng, dtype, tokens, hidden):
    x = (rng.standard_normal((tokens, hidden)) * 3).astype(dtype)
    w = (1 + 0.3 * rng.standard_normal(hidden)).astype(dtype)
    poison(x.shape, dtype)
    got = np.asarray(jax.jit(xj.rms_norm)(x, w)).astype(np.float64)
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


CACHE_DTYPES = {
    "e4m3": ("fp8_e4m3", np.dtype(ml_dtypes.float8_e4m3fn)),
    "e5m2": ("fp8_e5m2", np.dtype(ml_dtypes.float8_e5m2)),
    "uint8": ("fp8", np.dtype(np.uint8)),
}


def check_reshape(
    rng, dtype, cache, layout, tokens, heads, head_dim, page, blocks=7, one=False
):
    kv_cache_dtype, cache_dtype = CACHE_DTYPES.get(cache, ("auto", dtype))
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

    buffer_shape, geometry = kernel_calls.geometry(
        layout, blocks, page, heads, head_dim
    )
    count = 2 if layout in ("NHD", "HND") else 1
    before = [
        rng.integers(0, 100, buffer_shape).astype(np.uint8).astype(cache_dtype)
        for _ in range(count)
    ]
    want = [b.copy() for b in before]
    caches = kernel_calls.logical_caches(want, layout, (blocks, page, heads, head_dim))
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
                kernel_calls.reshape_and_cache_flash_one(
                    k, c, s, f, geometry, kv_cache_dtype
                )
            ]
        )
        got = run(key, before[0], slots, scales[0])
    else:
        run = jax.jit(
            lambda k, v, c, s, f: kernel_calls.reshape_and_cache_flash(
                k, v, c, s, f, geometry, kv_cache_dtype
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


def check_prepare(
    rng, dtype, cache, layout, tokens, heads, head_dim, normed, is_neox, wide
):
    """fused_qk_norm_rope_and_cache of two query heads a KV head, eight tokens a page.

    With weights queries and keys are compared with float64, without bit by bit with
    every step rounded; the caches bit by bit with keys as caches of the same dtype, a
    slot for each token, take them, and with the values given.
    """
    kv_cache_dtype, cache_dtype = CACHE_DTYPES.get(cache, ("auto", dtype))
    blocks, page, turned, pairs = tokens // 8 + 2, 8, 3 * heads, head_dim // 2
    shape = (tokens, 4 * heads, head_dim)
    qkv = (rng.standard_normal(shape) * 2).astype(dtype)
    weights = [(1 + 0.3 * rng.standard_normal(head_dim)).astype(dtype) for _ in "qk"]
    table = rng.standard_normal((11, head_dim)).astype(F32 if wide else dtype)
    positions = rng.integers(-1, 12, tokens)
    slots = rng.permutation(blocks * page)[: tokens - tokens // 4].astype(np.int64)
    slots[rng.random(len(slots)) < 0.2] = -1
    slots[rng.random(len(slots)) < 0.1] = blocks * page
    scales = np.float32([0.37]), np.float32([1.9])
    buffer_shape, geometry = kernel_calls.geometry(
        layout, blocks, page, heads, head_dim
    )
    before = [
        rng.integers(0, 100, buffer_shape).astype(np.uint8).astype(cache_dtype)
        for _ in range(2 if layout in ("NHD", "HND") else 1)
    ]
    given = weights if normed else (None, None)
    rest = (*given, table, positions, slots, *scales, 2 * heads, heads, head_dim)
    rest = (*rest, 1e-5, is_neox, kv_cache_dtype, geometry, False)

    # A page for each token. Where a cache is not aligned another kernel runs, which
    # adds up squares in another order: so it is not here either.
    alike = "odd" if layout == "odd" else "NHD"
    wide_shape, wide_geometry = kernel_calls.geometry(alike, tokens, 1, heads, head_dim)
    zeros = [np.zeros(wide_shape, dtype)] * (1 if alike == "odd" else 2)
    every = (*given, table, positions, np.arange(tokens), *scales, 2 * heads, heads)
    every = (*every, head_dim, 1e-5, is_neox, "auto", wide_geometry, False)
    calls = [(before, rest), (zeros, every)]

    def run(*arrays):
        """Both calls, in one program."""
        given = iter(arrays)

        def filled(value):
            return next(given) if isinstance(value, np.ndarray) else value

        rows = next(given)
        return [
            kernel_calls.fused_qk_norm_rope_and_cache(
                rows, [filled(c) for c in caches], *(filled(r) for r in rest)
            )
            for caches, rest in calls
        ]

    arrays = [a for c, r in calls for a in (*c, *r) if isinstance(a, np.ndarray)]
    (queries, caches), (again, written) = jax.jit(run)(
        qkv.reshape(tokens, 4 * heads * head_dim), *arrays
    )
    keys, values = kernel_calls.logical_caches(
        list(map(np.asarray, written)), alike, (tokens, 1, heads, head_dim)
    )
    assert np.array_equal(queries, again), "queries depend on the caches"
    assert np.array_equal(values[:, 0], qkv[:, turned:]), "values changed"
    got = np.concatenate([queries, keys[:, 0], qkv[:, turned:]], 1)

    # numpy's and ml_dtypes' arithmetic on 16-bit floats rounds every step.
    y = qkv[:, :turned].astype(np.float64) if normed else qkv[:, :turned]
    if normed:
        mean = (y**2).mean(-1, keepdims=True)
        weight = np.repeat(np.stack(weights).astype(np.float64), [2 * heads, heads], 0)
        y = y / np.sqrt(mean + np.float32(1e-5)) * weight
    valid = (positions >= 0) & (positions < len(table))
    row = table[positions.clip(0, len(table) - 1)].astype(y.dtype)[:, None]
    cos, sin = row[..., :pairs], row[..., pairs:]
    first = np.s_[..., :pairs] if is_neox else np.s_[..., ::2]
    second = np.s_[..., pairs:] if is_neox else np.s_[..., 1::2]
    want = y.copy()
    want[first] = y[first] * cos - y[second] * sin
    want[second] = y[second] * cos + y[first] * sin
    want = np.where(valid[:, None, None], want, y)
    if normed:
        parts = np.abs(y) * 2 + np.abs(want)
        parts = np.maximum(parts, parts.max(-1, keepdims=True))
        bound = ROUNDING[dtype] * np.abs(want) + 2.0**-18 * parts + 2.0**-25
        off = np.abs(got[:, :turned].astype(np.float64) - want) > bound
        assert not off.any(), f"{off.sum()} elements are off"
    else:
        assert np.array_equal(got[:, :turned], want), "not the same to the bit"

    expected = [b.copy() for b in before]
    views = kernel_calls.logical_caches(
        expected, layout, (blocks, page, heads, head_dim)
    )
    sides = (got[:, 2 * heads : turned], got[:, turned:])
    for rows, target, scale in zip(sides, views, scales, strict=True):
        if cache != "auto":
            fp8 = ml_dtypes.float8_e4m3fn if cache == "uint8" else cache_dtype
            rows = to_fp8(rows, scale[0], fp8).view(cache_dtype)
        for i, slot in enumerate(slots):
            if 0 <= slot < blocks * page:
                target[slot // page, slot % page] = rows[i]
    for g, w in zip(caches, expected, strict=True):
        same = np.asarray(g).view(np.uint8) == w.view(np.uint8)
        assert same.all(), f"{(~same).sum()} of {same.size} bytes differ"
    return {}


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


def prepare_cases(quick):
    # Single elements; whole vectors; idle lanes; too long for 32 lanes.
    shapes = [(13, 1, 6), (37, 2, 64), (9, 2, 80)]
    if not quick:
        shapes += [(64, 8, 128), (5, 1, 1040), (0, 2, 64), (3, 0, 64), (2100, 4, 128)]
    layouts = ("NHD", "HND", "stacked", "interleaved", "odd")
    choices = itertools.product(
        DTYPES, ("auto", *CACHE_DTYPES), (True, False), (True, False), shapes
    )
    for i, (dtype, cache, normed, is_neox, shape) in enumerate(choices):
        tokens, heads, head_dim = shape
        case = {"dtype": dtype, "cache": cache, "layout": layouts[i % 5]}
        case |= {"tokens": tokens, "heads": heads, "head_dim": head_dim}
        case |= {"normed": normed, "is_neox": is_neox, "wide": i % 2 == 1}
        yield check_prepare, case
