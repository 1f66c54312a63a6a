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
import jax.numpy as jnp
import jax_ops
import kernel_cases
import numpy as np

jax.config.update("jax_enable_x64", True)


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
        "slot_mapping[1] must be less than 8, got 999; skipped",
        "num_seqs must be from 0 to 2, got 3",
        "context_lens[1] must be from 0 to 8, got 99; clamped",
        "query_start_loc must rise from 0 to 2, got 1 and 5 at sequence 1",
        "block_tables[0, 1] must be from 0 to 1, got 7; masked",
    ):
        assert piece in text, f"no {piece!r} in {text!r}"
    return {"text": text}


def check_large(num_blocks=140_000):
    """Caches of more than 2^31 elements: nothing wraps around."""
    page, heads, head_dim, tokens = 16, 8, 128, 60
    rng = np.random.default_rng(3)
    shape, attributes = jax_ops.geometry("NHD", num_blocks, page, heads, head_dim)
    used = np.array([num_blocks - 1, 1, num_blocks - 2, num_blocks // 2], np.int32)
    slots = (used[:, None].astype(np.int64) * page + np.arange(page)).reshape(-1)
    key, value = (
        rng.standard_normal((tokens, heads, head_dim)).astype(jnp.bfloat16)
        for _ in "kv"
    )
    one = np.ones(1, np.float32)
    caches = jax.jit(
        lambda c: jax_ops.reshape_and_cache_flash(
            key, value, c, slots[:tokens], (one, one), attributes
        ),
        donate_argnums=0,
    )([jnp.zeros(shape, jnp.bfloat16) for _ in "kv"])
    small = []
    for cache, rows in zip(caches, (key, value), strict=True):
        small.append(np.asarray(cache[used]))
        got = small[-1].reshape(-1, heads, head_dim)[:tokens]
        assert np.array_equal(got, rows), "rows are not where they belong"
        count = int(jnp.count_nonzero(cache))
        assert count == np.count_nonzero(rows), "something else was written"
    query = rng.standard_normal((3, 32, head_dim)).astype(jnp.bfloat16)
    inputs = {
        "context_lens": np.array([tokens], np.int32),
        "query_start_loc": np.array([0, 3], np.int32),
        "num_seqs": np.array([1], np.int32),
    }
    near = np.arange(len(used), dtype=np.int32)
    want = kernel_cases.attention_reference(
        query, small, {}, inputs | {"block_tables": near[None]}, head_dim**-0.5
    )
    got = jax_ops.paged_attention(
        query,
        caches,
        block_tables=used[None],
        num_kv_heads=heads,
        attributes=attributes,
        scale=head_dim**-0.5,
        **inputs,
    )
    error = np.linalg.norm(np.asarray(got).astype(np.float64) - want)
    assert error < 1e-2 * np.linalg.norm(want), f"error {error}"
    return {"elements": int(np.prod(shape))}


def check_capture(dump_dir):
    """XLA captures the ops into a CUDA graph, from their first execution."""
    rng = np.random.default_rng(5)
    x = rng.standard_normal((32, 4, 64)).astype(jnp.bfloat16)
    w = np.ones(64, jnp.bfloat16)
    shape, attributes = jax_ops.geometry("NHD", 8, 16, 2, 64)
    caches = [np.zeros(shape, jnp.bfloat16)] * 2
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
    for group in (
        kernel_cases.rms_norm_cases,
        kernel_cases.reshape_cases,
        kernel_cases.attention_cases,
    ):
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

    results = jax_ops.describe_device()
    results |= {"archs": archs, "quick": options.quick, "failures": []}
    try:
        run_cases(options.quick, results)
        if not (options.quick or options.cpu):
            for check in (check_report, check_large):
                results[check.__name__] = check()
                print(check.__name__, "passed", flush=True)
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
