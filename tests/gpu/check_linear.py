#!/usr/bin/env python3
"""Checks linear's kernels against numpy, and times them.

    check_linear.py --lib-dir DIR [--out results.json] [--quick] [--cpu]
                    [--time] [--sweep] [--shapes qkv,o] [--rows 1,64] [--no-xla]

Needs a GPU, JAX and numpy, and the library libxla_ops_grouped_matmul_cuda.so in DIR,
and the wheel, or its content on PYTHONPATH, without torch.
--quick runs a small set, for compute-sanitizer; --cpu
checks the CPU library by the same cases.

--time adds, for the layers of a model of 8 billion parameters, microseconds a product
beside those of XLA's own `x @ w.T`; --sweep those of the tiles that the Hopper kernel
can take. Products are many in one program, so that launches are hidden, each with a
weight that has left the L2 cache since it was read last. Exit status 1 if a case fails.
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
from kernel_cases import DTYPES, F16, ROUNDING, poison, run_cases

# Columns and depth.
SHAPES = {
    "gate_up": (28672, 4096),
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "down": (4096, 14336),
    "lm_head": (128256, 4096),
}
ROWS = (1, 8, 16, 32, 64, 128)


def plan_of(tile_columns, splits, stages=0, keep_weight=0):
    """The attribute `plan`: xla_ops/cc/ops/grouped_matmul/linear_plan.h."""
    return tile_columns + (splits << 12) + (stages << 16) + (keep_weight << 24)


def linear(x, weight, bias=None, plan=0):
    shape = jax.ShapeDtypeStruct((x.shape[0], weight.shape[0]), x.dtype)
    bias = jnp.zeros(0, x.dtype) if bias is None else bias
    call = jax.ffi.ffi_call("xla_ops.linear", shape)
    return call(x, weight, bias, plan=np.int64(plan))


def xla_linear(x, weight):
    return x @ weight.T


def check(rng, dtype, rows, columns, depth, bias=False, plan=0, nan=False):
    x = rng.standard_normal((rows, depth)).astype(dtype)
    weight = rng.standard_normal((columns, depth)).astype(dtype)
    added = rng.standard_normal(columns).astype(dtype) if bias else None
    if nan:
        x[rows // 2, depth // 3] = np.nan
        weight[columns // 3, depth // 2] = np.nan
    poison((rows, columns), dtype)
    got = jax.jit(lambda *args: linear(*args, plan=plan))(x, weight, added)
    got = np.asarray(got).astype(np.float64)
    a, b = x.astype(np.float64), weight.astype(np.float64)
    want, size = a @ b.T, np.abs(a) @ np.abs(b).T
    if bias:
        want += added.astype(np.float64)
        size += np.abs(added.astype(np.float64))
    if nan:
        assert np.isnan(got[rows // 2]).all() and np.isnan(got[:, columns // 3]).all()
        assert (np.isnan(got) == np.isnan(want)).all()
    bound = ROUNDING[dtype] * np.abs(want) * 1.01 + (depth + 1) * 2.0**-24 * size
    if dtype == F16:
        # What is below fp16's normal numbers has its smallest step.
        bound += 2.0**-25
    error = np.abs(got - want)
    wrong = ~(error <= bound) & ~np.isnan(want)
    assert not wrong.any(), f"{wrong.sum()} elements are off, by {error[wrong].max()}"


def cases(quick):
    rng = np.random.default_rng(0)
    # Rows, columns, depth: padded and whole tiles, odd and even columns, depths that
    # end within a step, and ones that are not aligned.
    shapes = [(1, 64, 64), (3, 33, 72), (9, 257, 200), (20, 130, 61), (64, 192, 264)]
    shapes += [(128, 72, 128), (129, 40, 64)]
    if not quick:
        shapes += [(m, 400 + m, 8 * m) for m in rng.permutation(131)[:16] if m]
        shapes += [(m, 1024, 512) for m in (7, 8, 15, 16, 17, 31, 33, 63, 65, 127)]
        shapes += [(1, 6144, 4096), (64, 4096, 4096), (16, 4096, 14336)]
        shapes += [(2, 128256, 64), (300, 1000, 1000), (5, 7, 0), (1, 1, 1)]
    for dtype, (rows, columns, depth) in itertools.product(DTYPES, shapes):
        case = {"dtype": dtype, "rows": rows, "columns": columns, "depth": depth}
        yield case | {"bias": bool((rows + columns) % 2)}
    for dtype, rows in itertools.product(DTYPES, (1, 12, 40, 70, 130)):
        case = {"dtype": dtype, "rows": rows, "columns": 200, "depth": 136}
        yield case | {"nan": True, "bias": rows == 12}
    # Every number of splits, with splits that have no step, tiles of one to four
    # warpgroups, whole and not, and rings that go round.
    tiles = (64, 136) if quick else (8, 56, 64, 72, 128, 136, 192, 200, 224, 248, 256)
    for tile, splits, stages in itertools.product(tiles, (1, 2, 4, 8), (0, 2)):
        rows = int(rng.choice((1, 8, 11, 16, 27, 32, 64, 100, 128)))
        case = {"dtype": DTYPES[1 + tile // 8 % 2], "rows": rows, "columns": 408}
        case |= {"depth": int(rng.choice((64, 256, 328, 1000))), "bias": splits == 2}
        yield case | {"plan": plan_of(tile, splits, stages, splits % 2)}


def random(seed, shape):
    make = jax.jit(lambda key: jax.random.normal(key, shape, jnp.bfloat16))
    return make(jax.random.key(seed))


def operands(rows, columns, depth):
    """Inputs, and as many weights as the L2 cache cannot hold."""
    size = 2 * columns * depth
    weights = [random(i, (columns, depth)) for i in range(max(2, 2**28 // size + 1))]
    repeats = -(-(10**9) // (size * len(weights)))
    count = repeats * len(weights)
    # Inputs of their own: XLA would make one product of two that share one.
    inputs = [random(100 + i, (rows, depth)) for i in range(count)]
    return inputs, weights


def microseconds(f, inputs, weights):
    @jax.jit
    def run(inputs, weights):
        return [f(x, weights[i % len(weights)]) for i, x in enumerate(inputs)]

    for _ in range(3):
        jax.block_until_ready(run(inputs, weights))
    best = []
    for _ in range(5):
        start = time.perf_counter()
        results = [run(inputs, weights) for _ in range(4)]
        jax.block_until_ready(results)
        best.append((time.perf_counter() - start) / 4 / len(inputs) * 1e6)
    return min(best)


def timings(shapes, rows_list, xla):
    for name, rows in itertools.product(shapes, rows_list):
        columns, depth = SHAPES[name]
        args = operands(rows, columns, depth)
        entry = {"layer": name, "rows": rows, "us": microseconds(linear, *args)}
        entry["TB/s"] = 2 * columns * depth / entry["us"] / 1e6
        if xla:
            entry["xla_us"] = microseconds(xla_linear, *args)
        print(show(entry), flush=True)
        yield entry


def plans(rows, columns, multiprocessors):
    """Tiles that fill a GPU in few waves, of one block a multiprocessor or two."""
    padded = next(n for n in (8, 16, 32, 64, 128) if n >= rows)
    found = {}
    for splits, waves, at_once in itertools.product((1, 2, 4, 8), range(1, 7), (1, 2)):
        tiles = multiprocessors * at_once // splits * waves
        tile = -(-columns // tiles)
        tile = -(-tile // 8) * 8
        if not 16 <= tile <= 256 or (waves > 1 and tile < 128):
            continue
        # Two blocks have half of 228 KB each, less what CUDA and the barriers take.
        stages = min(24, 110000 // (128 * (tile + padded))) if at_once == 2 else 0
        if stages != 1:
            found[tile, splits, stages] = plan_of(tile, splits, stages)
    for tile, splits in itertools.product((64, 96, 128, 160, 192, 224, 256), (1, 2, 4)):
        blocks = -(-columns // tile) * splits
        if 0.85 < blocks / multiprocessors % 1 or blocks % multiprocessors == 0:
            found[tile, splits, 0] = plan_of(tile, splits)
    return found


def sweep(shapes, rows_list):
    multiprocessors = jax.devices()[0].core_count
    for name, rows in itertools.product(shapes, rows_list):
        columns, depth = SHAPES[name]
        args = operands(rows, columns, depth)
        results = {"chosen": microseconds(linear, *args)}
        for plan, number in plans(rows, columns, multiprocessors).items():
            f = lambda x, w, number=number: linear(x, w, plan=number)  # noqa: E731
            results[str(plan)] = microseconds(f, *args)
        fastest = min(list(results)[1:], key=results.get)
        tile, splits, stages = json.loads(fastest.replace("(", "[").replace(")", "]"))
        keep = plan_of(tile, splits, stages, 1)
        f = lambda x, w: linear(x, w, plan=keep)  # noqa: B023, E731
        results[f"{fastest} kept"] = microseconds(f, *args)
        results = dict(sorted(results.items(), key=lambda item: item[1]))
        entry = {"layer": name, "rows": rows, "us": results}
        print(name, rows, "rows: (tile, splits, stages) us")
        for plan, us in results.items():
            print(f"  {plan:24} {us:8.2f}  {2 * columns * depth / us / 1e6:.2f} TB/s")
        sys.stdout.flush()
        yield entry


def show(entry):
    return {k: round(v, 2) if isinstance(v, float) else v for k, v in entry.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lib-dir", required=True)
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--shapes", default=",".join(SHAPES), help="of " + str(SHAPES))
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--no-xla", action="store_true", help="time ours alone")
    options = parser.parse_args()
    shapes = options.shapes.split(",")
    rows_list = [int(rows) for rows in options.rows.split(",")]
    platform = "cpu" if options.cpu else "cuda"
    results = {"archs": kernel_calls.use(options.lib_dir, platform)}
    results |= kernel_calls.describe_device()
    results |= run_cases(check, cases(options.quick))
    print(results["cases"], "cases,", len(results["failures"]), "failures", flush=True)
    if options.time:
        results["timings"] = list(timings(shapes, rows_list, not options.no_xla))
    if options.sweep:
        results["sweep"] = list(sweep(shapes, rows_list))
    if options.out:
        with open(options.out, "w") as file:
            json.dump(results, file, indent=1)
    return 1 if results["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
