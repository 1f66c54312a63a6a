#!/usr/bin/env python3
"""Checks the kernels of the op libraries against float64 references.

    check_kernels.py --lib-dir DIR --out results.json [--quick] [--cpu]

Needs a GPU, JAX and numpy, and the libraries libxla_ops_*_cuda.so in DIR;
neither torch_xla nor the wheel. --quick runs a small set, for
`compute-sanitizer --tool memcheck`; --cpu checks libxla_ops_*_cpu.so by the
same cases. Exit status 1 if a case fails.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import traceback

import jax
import jax_ops
import ml_dtypes
import numpy as np

jax.config.update("jax_enable_x64", True)

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
    s = 1 / np.sqrt((x64**2).mean(-1, keepdims=True) + np.float32(1e-6))
    normed = (x64 * s).astype(dtype).astype(np.float64)
    want = (normed * w.astype(np.float64)).astype(dtype).astype(np.float64)
    relative = np.abs(got - want) / np.maximum(np.abs(want), 1e-30)
    # s differs from fp32's in its last bits, which may flip a rounding of
    # the first product and then of the second. One rounding in place of two
    # would change a quarter of the 16-bit elements.
    worst = float(relative.max())
    changed = float((got != want).mean())
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
    slots = rng.permutation(blocks * page)[:tokens].astype(np.int64)
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
    max_blocks = max(1, -(-longest // page)) + case.get("pad_blocks", 1)
    used = sum(-(-c // page) for _, c in seqs)
    num_blocks = used + 3
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
    shapes = [(1, 1), (3, 7), (5, 100), (2, 129), (7, 65), (300, 24), (1, 40)]
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
        bad = {"context_lens": [9999, -5, 64, 33], "num_seqs": 9}
        yield case(
            dtype=dtype,
            heads=(4, 2, 64),
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


def check_report():
    """The debug mode names the values that were skipped or masked."""
    slots = np.array([0, 999], np.int64)
    rows = np.ones((2, 1, 8), np.float32)
    one = np.ones(1, np.float32)
    shape, attributes = jax_ops.geometry("NHD", 2, 4, 1, 8)
    caches = [np.zeros(shape, np.float32)] * 2
    sys.stdout.flush()
    with tempfile.TemporaryFile() as captured:
        saved = os.dup(1)
        os.dup2(captured.fileno(), 1)
        try:
            jax.block_until_ready(
                jax_ops.reshape_and_cache_flash(
                    rows, rows, caches, slots, (one, one), attributes, debug=True
                )
            )
            jax.block_until_ready(
                jax_ops.paged_attention(
                    rows,
                    caches,
                    np.array([5, 99], np.int32),
                    np.array([[0, 7], [1, 1]], np.int32),
                    np.array([0, 1, 5], np.int32),
                    np.array([3], np.int32),
                    num_kv_heads=1,
                    attributes=attributes,
                    scale=1.0,
                    debug=True,
                )
            )
            jax.effects_barrier()
        finally:
            os.dup2(saved, 1)
            os.close(saved)
        captured.seek(0)
        text = captured.read().decode()
    for piece in (
        "slot_mapping must be below num_blocks * page_size = 8, got 999 at token 1",
        "num_seqs must be from 0 to 2, got 3",
        "context_lens must be from 0 to 8, got 99 at sequence 1",
        "query_start_loc must rise from 0 to 2, got 1 and 5 at sequence 1",
        "block_tables must be from 0 to num_blocks - 1 = 1, got 7 at sequence 0",
    ):
        assert piece in text, f"no {piece!r} in {text!r}"
    return {"text": text}


def check_capture(dump_dir):
    """XLA captures the ops into a CUDA graph, from their first execution."""
    rng = np.random.default_rng(5)
    x = rng.standard_normal((32, 4, 64)).astype(BF16)
    w = np.ones(64, BF16)
    shape, attributes = jax_ops.geometry("NHD", 8, 16, 2, 64)
    caches = [np.zeros(shape, BF16)] * 2
    scales = np.ones(1, np.float32), np.ones(1, np.float32)

    def step(x, caches):
        x = jax_ops.rms_norm(x, w)
        caches = jax_ops.reshape_and_cache_flash(
            x[:, :2],
            x[:, 2:],
            caches,
            np.arange(32, dtype=np.int64),
            scales,
            attributes,
        )
        x = jax_ops.paged_attention(
            x,
            caches,
            np.array([32], np.int32),
            np.arange(8, dtype=np.int32)[None],
            np.array([0, 32], np.int32),
            np.array([1], np.int32),
            num_kv_heads=2,
            attributes=attributes,
            scale=0.125,
            num_splits=2,
        )
        return jax_ops.rms_norm(x, w), caches

    compiled = jax.jit(step).lower(x, caches).compile()
    thunks = [f for f in pathlib.Path(dump_dir).iterdir() if "thunk" in f.name]
    assert any("CommandBuffer" in f.read_text() for f in thunks), (
        f"nothing was captured: {sorted(f.name for f in thunks)}"
    )
    first = np.asarray(compiled(x, caches)[0]).astype(np.float32)
    for _ in range(5):
        again = np.asarray(compiled(x, caches)[0]).astype(np.float32)
        assert np.array_equal(first, again), "a replay gave another result"
    eager = np.asarray(step(x, caches)[0]).astype(np.float32)
    assert np.isfinite(first).all()
    assert np.array_equal(first, eager), "capture changed the result"
    return {}


def run_capture(lib_dir):
    """Runs check_capture in a process that puts single calls into graphs."""
    with tempfile.TemporaryDirectory() as dump_dir:
        flags = f"--xla_gpu_graph_min_graph_size=1 --xla_dump_to={dump_dir} "
        environment = os.environ | {
            "XLA_FLAGS": flags + os.environ.get("XLA_FLAGS", "")
        }
        command = [sys.executable, __file__, "--lib-dir", lib_dir]
        subprocess.run([*command, "--capture", dump_dir], env=environment, check=True)


def run_case(index, check, case):
    """The case's results, or the text of its failure."""
    try:
        return check(np.random.default_rng(index), **case), None
    except Exception as error:  # noqa: BLE001 - reported, and the exit status
        return {}, f"{check.__name__} {case}: {error}"


def run_cases(quick, results):
    for group in (rms_norm_cases, reshape_cases, attention_cases):
        cases = list(group(quick))
        # Most of the time goes into compilation, one program a case.
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            outcomes = list(
                pool.map(lambda item: run_case(item[0], *item[1]), enumerate(cases))
            )
        worst = {}
        failures = [text for _, text in outcomes if text]
        for (_, case), (found, _) in zip(cases, outcomes, strict=True):
            name = case["dtype"].name
            worst[name] = max(worst.get(name, 0), found.get("worst", 0))
        for text in failures[:20]:
            print("FAIL", text[:500], flush=True)
        results["failures"] += failures
        results[group.__name__] = {
            "cases": len(cases),
            "failed": len(failures),
            "worst": worst,
        }
        print(group.__name__, results[group.__name__], flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lib-dir", required=True)
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--capture", help=argparse.SUPPRESS)
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args()
    archs = jax_ops.register(options.lib_dir, "cpu" if options.cpu else "cuda")
    if options.capture:  # a child of ours, below
        check_capture(options.capture)
        return 0

    device = jax.devices()[0]
    results = {"device": device.device_kind, "jax": jax.__version__}
    results |= {"archs": archs, "quick": options.quick, "failures": []}
    try:
        run_cases(options.quick, results)
        if not (options.quick or options.cpu):
            results["check_report"] = check_report()
            print("check_report passed", flush=True)
            run_capture(options.lib_dir)
            results["check_capture"] = "passed"
            print("check_capture passed", flush=True)
    except Exception:  # noqa: BLE001 - reported, and the exit status
        results["failures"].append(traceback.format_exc())
        traceback.print_exc()
    if options.out:
        with open(options.out, "w") as file:
            json.dump(results, file, indent=1)
    print(f"{len(results['failures'])} failures")
    return 1 if results["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
