#!/usr/bin/env python3
"""Checks the kernels of gradients against numpy: norms, activations,
merge_attn_states and grouped_matmul's weight.

    check_gradients.py --lib-dir DIR [--out results.json] [--quick] [--cpu]
                       [--only CHECK]

Options and needs are those of check_elementwise.py; `--only grouped_matmul` needs no
library but libxla_ops_grouped_matmul_cuda.so.
"""

import itertools
import math
import sys

import numpy as np

from check_elementwise import call, main
from check_grouped_matmul import BAD_OFFSETS, sorted_offsets
from kernel_cases import BF16, DTYPES, F16, F32, ROUNDING, rms_norm_cases


def drawn(rng, shape, dtype, scale=1.0):
    return (rng.standard_normal(shape) * scale).astype(dtype)


def assert_close(got, want, bound):
    got = np.asarray(got)
    # Not of what was not written, which is NaN (poison).
    error = np.abs(got.astype(np.float64) - want)
    assert (error <= bound).all(), f"{(~(error <= bound)).sum()} elements are off"


def check_rms_norm(rng, dtype, tokens, hidden, parts, added, blocks):
    """dx and parts against the derivative without roundings; equal runs."""
    g, x = (drawn(rng, (tokens, hidden), dtype, 3) for _ in "gx")
    w = (1 + 0.3 * rng.standard_normal(hidden)).astype(dtype)
    more = drawn(rng, (tokens, hidden), dtype) if added else np.zeros(0, dtype)
    eps = np.float32(1e-6)
    g64, x64, w64 = (t.astype(np.float64) for t in (g, x, w))
    s = 1 / np.sqrt((x64**2).sum(-1, keepdims=True) / max(hidden, 1) + eps)
    gw, normed = g64 * w64, x64 * s
    back = (gw * normed).sum(-1, keepdims=True) / max(hidden, 1)
    mean = np.abs(gw * normed).sum(-1, keepdims=True) / max(hidden, 1)
    want = s * (gw - normed * back)
    size = s * (np.abs(gw) + np.abs(normed) * mean)
    if added:
        want, size = want + more.astype(np.float64), size + np.abs(more)
    bound = ROUNDING[dtype] * np.abs(want) + 2.0**-18 * size + 2.0**-24
    sums = [((rows, hidden), F32) for rows in (parts, blocks)]
    results = [((tokens, hidden), dtype), *sums]
    runs = [
        call("rms_norm_backward", results, g, x, w, more, eps=eps) for _ in range(2)
    ]
    (dx, sums), again = runs[0][:2], runs[1][:2]
    assert_close(dx, want, bound)
    total = np.asarray(sums).astype(np.float64).sum(0)
    each = np.abs(g64 * normed)
    assert_close(total, (g64 * normed).sum(0), 2.0**-17 * each.sum(0) + 2.0**-24)
    for a, b in zip((dx, sums), again, strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b)), "two runs differ"
    (alone,) = call("rms_norm_backward_input", results[:1], g, x, w, more, eps=eps)
    assert_close(alone, want, bound)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def swish(x, beta):
    s = sigmoid(beta * x)
    return x * s, s + beta * x * s * (1 - s)


def gelu(x):
    erf = np.vectorize(math.erf, otypes=[np.float64])
    share = 0.5 * (1 + erf(x / math.sqrt(2)))
    return x * share, share + x * np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def gelu_tanh(x):
    scale = math.sqrt(2 / math.pi)
    t = np.tanh(scale * (x + 0.044715 * x**3))
    slope = scale * (1 + 3 * 0.044715 * x * x)
    return 0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * slope


def fatrelu(x):
    return np.where(x > 0.5, x, 0), (x > 0.5).astype(np.float64)


# Each activation's value and slope.
ACTIVATIONS = {
    "silu_and_mul": lambda x: swish(x, 1),
    "mul_and_silu": lambda x: swish(x, 1),
    "gelu_and_mul": gelu,
    "gelu_tanh_and_mul": gelu_tanh,
    "fatrelu_and_mul": fatrelu,
    "swigluoai_and_mul": lambda x: swish(x, 1.702),
    "gelu_new": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "gelu_quick": lambda x: swish(x, 1.702),
}
LIMIT = np.float32(3)


def check_activation(rng, name, dtype, tokens, size):
    is_gated = name.endswith(("_and_mul", "_and_silu"))
    x = drawn(rng, (tokens, size * (1 + is_gated)), dtype, 3)
    g = drawn(rng, (tokens, size), dtype)
    attributes = {"threshold": np.float32(0.5), "alpha": np.float32(1.702)}
    attributes |= {"limit": LIMIT, "activation": name}
    (got,) = call("activation_backward", [x], g, x, **attributes)
    got, g, x = (np.asarray(t).astype(np.float64) for t in (got, g, x))
    if not is_gated:
        pairs = [(got, g * ACTIVATIONS[name](x)[1])]
        size_of = np.abs(g) * (1 + np.abs(x))
    elif name == "swigluoai_and_mul":
        a, b = x[:, ::2], x[:, 1::2]
        value, slope = ACTIVATIONS[name](np.minimum(a, LIMIT))
        da = np.where(a > LIMIT, 0, g * (np.clip(b, -LIMIT, LIMIT) + 1) * slope)
        db = np.where(np.abs(b) > LIMIT, 0, g * value)
        pairs = [(got[:, ::2], da), (got[:, 1::2], db)]
        size_of = np.abs(g) * (1 + np.abs(a)) * (1 + np.abs(b))
    else:
        halves = [x[:, :size], x[:, size:]]
        parts = [got[:, :size], got[:, size:]]
        first = 1 if name == "mul_and_silu" else 0
        value, slope = ACTIVATIONS[name](halves[first])
        pairs = [(parts[first], g * halves[1 - first] * slope)]
        pairs += [(parts[1 - first], g * value)]
        size_of = np.abs(g) * (1 + np.abs(halves[0])) * (1 + np.abs(halves[1]))
    for part, want in pairs:
        bound = ROUNDING[dtype] * np.abs(want) + 2.0**-19 * size_of + 2.0**-24
        assert_close(part, want, bound)


def check_merge(rng, dtype, tokens, heads, head_dim, has_lse):
    p, s, g = (drawn(rng, (tokens, heads, head_dim), dtype) for _ in "psg")
    pl, sl, gl = (drawn(rng, (heads, tokens), F32, 4) for _ in "psg")
    pl[0, 0], sl[-1, -1] = np.inf, -np.inf
    if tokens * heads > 1:
        p[0, 0], s[-1, -1] = np.nan, np.nan
    results = [p, pl, p, pl]
    lse = gl if has_lse else np.zeros(0, F32)
    got = call("merge_attn_states_backward", results, g, lse, p, pl, s, sl)
    p64, s64, g64 = (np.nan_to_num(t.astype(np.float64)) for t in (p, s, g))
    wp, ws = (
        np.exp(np.where(x == np.inf, -np.inf, x).astype(np.float64)) for x in (pl, sl)
    )
    empty = wp + ws == 0
    with np.errstate(divide="ignore", invalid="ignore"):
        wp, ws = (
            np.where(empty, 1.0, wp / (wp + ws)),
            np.where(empty, 0.0, ws / (wp + ws)),
        )
    change = (g64 * (p64 - s64)).sum(-1).T
    size = (np.abs(g64) * (np.abs(p64) + np.abs(s64))).sum(-1).T
    lse = np.where(empty, 0.0, gl) * has_lse
    for out, w in ((got[0], wp), (got[2], ws)):
        want = w.T[..., None] * g64
        bound = (ROUNDING[dtype] + 2.0**-20) * np.abs(want) + 2.0**-24
        assert_close(out, want, bound)
    bound = 2.0**-19 * (size + np.abs(lse)) + 2.0**-24
    assert_close(got[1], wp * ws * change + wp * lse, bound)
    assert_close(got[3], ws * lse - wp * ws * change, bound)


def check_grouped_matmul(rng, dtype, rows, columns, depth, offsets):
    """Each group's matrix, sums in order: equal runs; NaN where no group looks."""
    groups = len(offsets) - 1
    g, x = drawn(rng, (rows, columns), dtype), drawn(rng, (rows, depth), dtype)
    ends = np.maximum.accumulate(np.clip(offsets, 0, rows))
    g[: ends[0]], x[ends[-1] :] = np.nan, np.nan
    results = [((groups, columns, depth), dtype)]
    (got,), (again,) = (
        call("grouped_matmul_backward_weight", results, g, x, offsets) for _ in range(2)
    )
    assert np.array_equal(np.asarray(got), np.asarray(again)), "two runs differ"
    for group, matrix in enumerate(np.asarray(got)):
        part = slice(ends[group], ends[group + 1])
        a, b = g[part].astype(np.float64), x[part].astype(np.float64)
        want = a.T @ b
        bound = ROUNDING[dtype] * np.abs(want) * 1.01 + 2.0**-25 * (dtype == F16)
        # A rounding each row, and tensor cores, which cut products off.
        bound = bound + (len(a) + 8) * 2.0**-24 * (np.abs(a).T @ np.abs(b))
        assert_close(matrix, want, bound)


def norm_cases(quick):
    for i, (_, case) in enumerate(rms_norm_cases(quick)):
        rows = max(1, min(case["tokens"], 480))
        sums = {(rows, 0), (1 + i % 7, 0), (1, rows), (1 + i % 7, 2 * rows)}
        for (parts, blocks), added in itertools.product(sums, (False, True)):
            counts = {"parts": parts, "blocks": blocks}
            yield check_rms_norm, case | counts | {"added": added}
    if not quick:
        large = {"dtype": BF16, "tokens": 16384, "hidden": 4096, "added": False}
        for parts, blocks in ((480, 0), (1, 528), (8, 528)):
            yield check_rms_norm, large | {"parts": parts, "blocks": blocks}


def activation_cases(quick):
    sizes = [(1, 1), (3, 7), (5, 40)]
    if not quick:
        sizes += [(0, 8), (3, 0), (1, 14336), (300, 257), (5000, 96), (2000, 4096)]
    for name, dtype, (tokens, size) in itertools.product(ACTIVATIONS, DTYPES, sizes):
        case = {"name": name, "dtype": dtype, "tokens": tokens, "size": size}
        yield check_activation, case


def merge_cases(quick):
    sizes = [(2, 3, 7), (5, 2, 64)]
    if not quick:
        sizes += [(1, 1, 1), (17, 5, 40), (900, 8, 128), (3, 1, 4096), (9, 2, 1000)]
        sizes += [(7, 3, 255), (2, 1, 33)]
    for dtype, has_lse, (tokens, heads, dim) in itertools.product(
        DTYPES, (True, False), sizes
    ):
        case = {"tokens": tokens, "heads": heads, "head_dim": dim}
        yield check_merge, case | {"dtype": dtype, "has_lse": has_lse}


def grouped_matmul_cases(quick):
    rng = np.random.default_rng(0)
    # Rows, columns, depth, groups, rows outside: tiles whole and partial; groups that
    # end within a step; rows that are not aligned.
    shapes = [(1, 1, 1, 1, 0), (40, 33, 72, 3, 0), (70, 64, 61, 40, 2)]
    shapes += [(300, 136, 200, 2, 5), (160, 96, 64, 4, 0), (100, 8, 8, 3, 1)]
    if not quick:
        shapes += [(512, 768, 512, 64, 0), (3000, 1000, 1000, 7, 100)]
        shapes += [(2000, 777, 333, 13, 0), (20000, 128, 256, 4, 1)]
        shapes += [(0, 40, 48, 3, 0), (5, 0, 8, 2, 0), (5, 8, 0, 2, 0)]
        shapes += [(64, 2056, 1032, 5, 3), (300, 129, 8, 40, 0)]
    for dtype, (rows, columns, depth, groups, outside) in itertools.product(
        DTYPES, shapes
    ):
        case = {"dtype": dtype, "rows": rows, "columns": columns, "depth": depth}
        case["offsets"] = sorted_offsets(rng, rows, groups, outside)
        yield check_grouped_matmul, case
    for dtype, offsets in itertools.product(DTYPES, (*BAD_OFFSETS, [3])):
        case = {"dtype": dtype, "rows": 60, "columns": 40, "depth": 48}
        yield check_grouped_matmul, case | {"offsets": np.array(offsets, np.int32)}


def cases(quick):
    yield from norm_cases(quick)
    yield from activation_cases(quick)
    yield from merge_cases(quick)
    yield from grouped_matmul_cases(quick)


if __name__ == "__main__":
    sys.exit(main(cases, __doc__))
