#!/usr/bin/env python3
"""Checks grouped_matmul's kernels against numpy, and times them.

    check_grouped_matmul.py --lib-dir DIR [--out results.json] [--quick] [--cpu]
                            [--time]

Needs a GPU, JAX and numpy, and the library libxla_ops_grouped_matmul_cuda.so in DIR,
and the wheel, or its content on PYTHONPATH, without torch.
--quick runs a small set, for compute-sanitizer; --cpu
checks the CPU library by the same cases; --time adds, for the two products of a
mixture of experts, microseconds beside those of XLA's own `jax.lax.ragged_dot`. Exit
status 1 if a case fails.
"""

import argparse
import itertools
import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

import kernel_calls
from kernel_cases import BF16, DTYPES, ROUNDING, poison, run_cases

# Of 60 rows, and not as they should be.
BAD_OFFSETS = [[-3, 20, 40, 60], [0, 40, 20, 60], [0, 20, 40, 2**31 - 1]]
BAD_OFFSETS += [[50, 10, 0, 30], [70, 80, 90, 99], [-(2**31), -1, 60, 0]]


def grouped_matmul(x, weight, offsets):
    shape = jax.ShapeDtypeStruct((x.shape[0], weight.shape[1]), x.dtype)
    return jax.ffi.ffi_call("xla_ops.grouped_matmul", shape)(x, weight, offsets)


def sorted_offsets(rng, rows, groups, outside):
    """Ascending offsets of groups of any size, some of them empty."""
    ends = np.sort(rng.integers(outside, rows - outside + 1, groups - 1))
    return np.array([outside, *ends, rows - outside], np.int32)


def check(rng, dtype, rows, columns, depth, offsets):
    groups = len(offsets) - 1
    x = rng.standard_normal((rows, depth)).astype(dtype)
    weight = rng.standard_normal((groups, columns, depth)).astype(dtype)
    poison((rows, columns), dtype)
    got = jax.jit(grouped_matmul)(x, weight, offsets)
    got = np.asarray(got).astype(np.float64)
    ends = np.maximum.accumulate(np.clip(offsets, 0, rows))
    for group in range(groups):
        part = slice(ends[group], ends[group + 1])
        a, b = x[part].astype(np.float64), weight[group].astype(np.float64)
        want = a @ b.T
        bound = ROUNDING[dtype] * np.abs(want) * 1.01
        bound += depth * 2.0**-24 * (np.abs(a) @ np.abs(b).T)
        error = np.abs(got[part] - want)
        assert (error <= bound).all(), f"{(error > bound).sum()} elements are off"
    assert (got[: ends[0]] == 0).all() and (got[ends[-1] :] == 0).all()


def cases(quick):
    rng = np.random.default_rng(0)
    # Rows, columns, depth, groups, rows outside: tiles of 16, 64 and 128 rows, whole
    # and partial; depths that end within a step; rows that are not aligned.
    shapes = [(1, 1, 1, 1, 0), (40, 33, 72, 3, 0), (70, 64, 61, 40, 2)]
    shapes += [(300, 130, 200, 2, 5), (160, 96, 64, 4, 0)]
    if not quick:
        shapes += [(512, 1536, 2048, 128, 0), (64, 2048, 768, 128, 0)]
        shapes += [(4096, 1536, 512, 32, 1), (3000, 1000, 1000, 7, 100)]
        shapes += [(2000, 777, 333, 13, 0), (1, 64, 4096, 256, 0), (5, 7, 0, 2, 0)]
    for dtype, (rows, columns, depth, groups, outside) in itertools.product(
        DTYPES, shapes
    ):
        case = {"dtype": dtype, "rows": rows, "columns": columns, "depth": depth}
        yield case | {"offsets": sorted_offsets(rng, rows, groups, outside)}
    for offsets in BAD_OFFSETS:
        for dtype in DTYPES:
            case = {"dtype": dtype, "rows": 60, "columns": 40, "depth": 48}
            yield case | {"offsets": np.array(offsets, np.int32)}


def microseconds(f, *args):
    run = jax.jit(lambda *args: f(*args))
    args = jax.device_put(args)
    jax.block_until_ready(run(*args))
    best = []
    for _ in range(5):
        start = time.perf_counter()
        results = [run(*args) for _ in range(20)]
        jax.block_until_ready(results)
        best.append((time.perf_counter() - start) / 20 * 1e6)
    return min(best)


def timings():
    """Qwen3-30B-A3B's and Mixtral's products, for a few numbers of tokens."""
    rng = np.random.default_rng(1)
    models = {"qwen3-30b-a3b": (128, 8, 2048, 768), "mixtral-8x7b": (8, 2, 4096, 14336)}
    found = []
    for name, (experts, top_k, hidden, intermediate) in models.items():
        for tokens, (columns, depth) in itertools.product(
            (1, 16, 64, 256, 2048), ((2 * intermediate, hidden), (hidden, intermediate))
        ):
            rows = tokens * top_k
            experts_of_rows = np.sort(rng.integers(0, experts, rows))
            offsets = np.searchsorted(experts_of_rows, np.arange(experts + 1))
            offsets = offsets.astype(np.int32)
            x = jnp.zeros((rows, depth), BF16)
            weight = jnp.zeros((experts, columns, depth), BF16)
            ours = microseconds(grouped_matmul, x, weight, offsets)
            swapped = jnp.swapaxes(weight, 1, 2)
            xla = microseconds(jax.lax.ragged_dot, x, swapped, np.diff(offsets))
            used = len(set(experts_of_rows.tolist()))
            entry = {"model": name, "tokens": tokens, "columns": columns}
            entry |= {"depth": depth, "us": ours, "ragged_dot_us": xla}
            entry["TB/s"] = 2 * used * columns * depth / ours / 1e6
            entry["TFLOP/s"] = 2 * rows * columns * depth / ours / 1e6
            print(entry, flush=True)
            found.append(entry)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lib-dir", required=True)
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--time", action="store_true")
    options = parser.parse_args()
    platform = "cpu" if options.cpu else "cuda"
    results = {"archs": kernel_calls.use(options.lib_dir, platform)}
    results |= kernel_calls.describe_device()
    results |= run_cases(check, cases(options.quick))
    if options.time:
        results["timings"] = timings()
    if options.out:
        with open(options.out, "w") as file:
            json.dump(results, file, indent=1)
    print(results["cases"], "cases,", len(results["failures"]), "failures")
    return 1 if results["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
