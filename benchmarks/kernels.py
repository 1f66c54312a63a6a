#!/usr/bin/env python3
"""Times the CUDA kernels inside XLA executables, beside the copy bandwidth.

    kernels.py --lib-dir DIR --out results.json

Needs a GPU and JAX. Each figure is the median over runs of one executable
that holds a chain of calls, divided by their number: what an op costs inside
a model, launch gaps of XLA's CUDA graph included. Large operands rotate over
more memory than the L2 cache holds. GB/s counts the bytes an op must move,
TFLOP/s a causal mask as half.
"""

import argparse
import json
import pathlib
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "tests" / "gpu"))
import jax_ops

jax.config.update("jax_enable_x64", True)
BF16 = jnp.bfloat16


def random(shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape, BF16)


def measure(run, state, operands, calls, repeats=7):
    """Seconds a call. `run(state, operands)` gives a new state, in place."""
    compiled = jax.jit(run, donate_argnums=0).lower(state, operands).compile()
    state = jax.block_until_ready(compiled(state, operands))
    start = time.perf_counter()
    state = jax.block_until_ready(compiled(state, operands))
    # Enough runs in a row that dispatch hides behind the device.
    runs = max(1, int(0.02 / (time.perf_counter() - start)))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(runs):
            state = compiled(state, operands)
        jax.block_until_ready(state)
        times.append((time.perf_counter() - start) / runs / calls)
    return statistics.median(times)


def chained(call, calls):
    """`calls` dependent calls that XLA may not fuse with one another."""

    def run(x, operands):
        for _ in range(calls):
            x = jax.lax.optimization_barrier(call(x, *operands))
        return x

    return run


def bench_copy():
    x = random((1 << 28,))
    seconds = measure(chained(jnp.negative, 8), x, (), 8)
    return {"name": "copy 512 MiB", "us": seconds * 1e6, "GB/s": 4 * x.size / seconds}


def xla_rms_norm(x, weight):
    x32 = x.astype(jnp.float32)
    s = jax.lax.rsqrt((x32**2).mean(-1, keepdims=True) + 1e-6)
    return (x32 * s).astype(x.dtype) * weight


def bench_rms_norm(tokens, hidden):
    x = random((tokens, hidden))
    weight = random((hidden,), 1)
    calls = 8 if x.size > 1 << 24 else 100
    moved = 4 * x.size
    result = {"name": f"rms_norm {tokens}x{hidden}"}
    seconds = measure(chained(jax_ops.rms_norm, calls), x, (weight,), calls)
    result |= {"us": seconds * 1e6, "GB/s": moved / seconds}
    x = random((tokens, hidden))
    seconds = measure(chained(xla_rms_norm, calls), x, (weight,), calls)
    return result | {"xla_us": seconds * 1e6}


def bench_reshape(tokens, kv_cache_dtype):
    heads, head_dim, page = 8, 128, 16
    # Few tokens: calls in a chain on one cache, which the L2 cache holds.
    layers, calls = (8, 8) if tokens > 1000 else (1, 100)
    blocks = tokens // page + 8
    shape, attributes = jax_ops.geometry("NHD", blocks, page, heads, head_dim)
    fp8 = kv_cache_dtype != "auto"
    dtype = jnp.float8_e4m3fn if fp8 else BF16
    rows = [random((tokens, heads, head_dim), i) for i in range(2 * layers)]
    caches = [[jnp.zeros(shape, dtype) for _ in "kv"] for _ in range(layers)]
    order = np.random.default_rng(0).permutation(blocks * page)
    slots = jnp.asarray(order[:tokens])
    scales = (jnp.ones(1, jnp.float32),) * 2

    def run(caches, operands):
        rows, slots, scales = operands
        for i in range(calls):
            layer = i % layers
            caches[layer] = list(
                jax_ops.reshape_and_cache_flash(
                    rows[2 * layer],
                    rows[2 * layer + 1],
                    caches[layer],
                    slots,
                    scales,
                    attributes,
                    kv_cache_dtype,
                )
            )
        return caches

    seconds = measure(run, caches, (rows, slots, scales), calls)
    moved = 2 * tokens * heads * head_dim * (3 if fp8 else 4)
    name = f"reshape_and_cache_flash {tokens}x{heads}x{head_dim} {kv_cache_dtype}"
    return {"name": name, "us": seconds * 1e6, "GB/s": moved / seconds}


def bench_attention(seqs, query_len, context, heads, kv_heads, head_dim, splits):
    page = 16
    pages = context // page
    per_layer = 2 * seqs * context * kv_heads * head_dim * 2
    layers = max(2, min(32, (1 << 29) // per_layer))
    shape, attributes = jax_ops.geometry("NHD", seqs * pages, page, kv_heads, head_dim)
    caches = [[random(shape, 2 * i), random(shape, 2 * i + 1)] for i in range(layers)]
    tables = np.random.default_rng(0).permutation(seqs * pages)
    tables = jnp.asarray(tables.reshape(seqs, pages).astype(np.int32))
    lens = jnp.full(seqs, context, jnp.int32)
    starts = jnp.arange(seqs + 1, dtype=jnp.int32) * query_len
    count = jnp.full(1, seqs, jnp.int32)

    def run(x, operands):
        caches, integers = operands
        for cache in caches:
            x = jax_ops.paged_attention(
                x,
                cache,
                *integers,
                num_kv_heads=kv_heads,
                attributes=attributes,
                scale=head_dim**-0.5,
                num_splits=splits,
            )
        return x

    x = random((seqs * query_len, heads, head_dim))
    operands = (caches, (lens, tables, starts, count))
    seconds = measure(run, x, operands, layers)
    what = "decode" if query_len == 1 else "prefill"
    name = f"paged_attention {what} {seqs}x{context}, {heads}/{kv_heads}x{head_dim}"
    result = {"name": f"{name}, {splits} splits", "us": seconds * 1e6}
    if query_len == 1:
        return result | {"GB/s": per_layer / seconds}
    flops = 4 * seqs * heads * head_dim * query_len * (context - query_len / 2)
    return result | {"TFLOP/s": flops / seconds}


def benchmarks():
    yield bench_copy, ()
    for shape in ((1, 4096), (64, 4096), (4096, 4096), (16384, 8192), (131072, 128)):
        yield bench_rms_norm, shape
    for tokens in (64, 4096, 16384):
        yield bench_reshape, (tokens, "auto")
    yield bench_reshape, (16384, "fp8")
    for head_dim in (64, 128, 256):
        for length in (1024, 4096):
            seqs, heads = 16384 // length, 2048 // head_dim
            yield bench_attention, (seqs, length, length, heads, heads, head_dim, 1)
    for context, splits in ((1024, 1), (1024, 4), (4096, 1), (4096, 4)):
        yield bench_attention, (64, 1, context, 32, 8, 128, splits)
    yield bench_attention, (16, 1, 4096, 32, 32, 128, 1)
    for splits in (4, 8, 16):
        yield bench_attention, (8, 1, 4096, 32, 8, 128, splits)
    for context, splits in ((1024, 4), (4096, 8), (4096, 16), (32768, 32), (32768, 64)):
        yield bench_attention, (1, 1, context, 32, 8, 128, splits)
    yield bench_attention, (64, 1, 4096, 32, 8, 64, 1)
    yield bench_attention, (64, 1, 2048, 16, 4, 256, 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lib-dir", required=True)
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--only", default="", help="such as bench_attention(64,")
    options = parser.parse_args()
    jax_ops.register(options.lib_dir)
    results = jax_ops.describe_device() | {"rows": []}
    for bench, arguments in benchmarks():
        if options.only not in f"{bench.__name__}{arguments}":
            continue
        row = bench(*arguments)
        results["rows"].append(row)
        rate = ""
        for unit, factor in (("GB/s", 1e9), ("TFLOP/s", 1e12)):
            if unit in row:
                row[unit] = round(row[unit] / factor, 1)
                rate = f"{row[unit]:8} {unit}"
        xla = f"  (XLA {row['xla_us']:.1f} us)" if "xla_us" in row else ""
        print(f"{row['name']:60} {row['us']:9.1f} us {rate}{xla}", flush=True)
    if options.out:
        with open(options.out, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
