#!/usr/bin/env python3
"""Checks the kernels of gradients against numpy: the norms'.

    check_gradients.py --lib-dir DIR [--out results.json] [--quick] [--cpu]

Options and needs are those of check_elementwise.py.
"""

import itertools
import sys

import numpy as np

from check_elementwise import call, main
from kernel_cases import BF16, F32, ROUNDING, rms_norm_cases


def drawn(rng, shape, dtype, scale=1.0):
    return (rng.standard_normal(shape) * scale).astype(dtype)


def assert_close(got, want, bound):
    got = np.asarray(got)
    # Not of what was not written, which is NaN (poison).
    error = np.abs(got.astype(np.float64) - want)
    assert (error <= bound).all(), f"{(~(error <= bound)).sum()} elements are off"


def check_rms_norm(rng, dtype, tokens, hidden, parts, added):
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
    results = [((tokens, hidden), dtype), ((parts, hidden), F32)]
    runs = [
        call("rms_norm_backward", results, g, x, w, more, eps=eps) for _ in range(2)
    ]
    (dx, sums), again = runs[0], runs[1]
    assert_close(dx, want, bound)
    total = np.asarray(sums).astype(np.float64).sum(0)
    each = np.abs(g64 * normed)
    assert_close(total, (g64 * normed).sum(0), 2.0**-17 * each.sum(0) + 2.0**-24)
    for a, b in zip(runs[0], again, strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b)), "two runs differ"
    (alone,) = call("rms_norm_backward_input", results[:1], g, x, w, more, eps=eps)
    assert_close(alone, want, bound)


def cases(quick):
    for i, (_, case) in enumerate(rms_norm_cases(quick)):
        rows = max(1, min(case["tokens"], 480))
        for parts, added in itertools.product({rows, 1 + i % 7}, (False, True)):
            yield check_rms_norm, case | {"parts": parts, "added": added}
    if not quick:
        large = {"dtype": BF16, "tokens": 16384, "hidden": 4096, "parts": 480}
        yield check_rms_norm, large | {"added": False}


if __name__ == "__main__":
    sys.exit(main(cases, __doc__))
