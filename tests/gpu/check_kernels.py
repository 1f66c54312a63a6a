#!/usr/bin/env python3
"""Checks the kernels of the op libraries against float64 references.

    check_kernels.py --lib-dir DIR --out results.json [--only attention]

Needs a GPU, JAX and numpy, and the libraries libxla_ops_*_cuda.so in DIR,
and the wheel, or its content on PYTHONPATH, without torch.
Each group of cases runs in its own process.
--quick runs a small set, for `compute-sanitizer --tool memcheck`; --cpu checks
libxla_ops_*_cpu.so by the same cases. Exit status 1 if a case fails.
"""

import argparse
import concurrent.futures
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import traceback

import jax
import jax.numpy as jnp
import numpy as np

# attention_checks describes a batch as the benchmark does.
sys.path.append(str(pathlib.Path(__file__).resolve().parents[2] / "benchmarks"))

import attention_checks
import kernel_calls
import kernel_cases
import xla_ops.jax as xj

jax.config.update("jax_enable_x64", True)


def check_report():
    """The debug mode names the values that were skipped or masked."""
    slots = np.array([0, 999], np.int64)
    rows = np.ones((2, 1, 8), np.float32)
    one = np.ones(1, np.float32)
    shape, geometry = kernel_calls.geometry("NHD", 2, 4, 1, 8)
    caches = [np.zeros(shape, np.float32)] * 2
    sys.stdout.flush()
    with tempfile.TemporaryFile() as captured:
        saved = os.dup(1)
        os.dup2(captured.fileno(), 1)
        try:
            jax.block_until_ready(
                kernel_calls.reshape_and_cache_flash(
                    rows, rows, caches, slots, (one, one), geometry, debug=True
                )
            )
            jax.block_until_ready(
                kernel_calls.paged_attention(
                    rows,
                    caches,
                    np.array([5, 99], np.int32),
                    np.array([[0, 7], [1, 1]], np.int32),
                    np.array([0, 1, 5], np.int32),
                    np.array([3], np.int32),
                    geometry=geometry,
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
        "num_seqs[0] must be from 0 to 2, got 3; clamped",
        "context_lens[1] must be from 0 to 8, got 99; clamped",
        "query_start_loc[2] must be from 1 to 2, got 5; clamped",
        "block_tables[0, 1] must be from 0 to 1, got 7; masked",
    ):
        assert piece in text, f"no {piece!r} in {text!r}"
    return {"text": text}


def check_capture(dump_dir):
    """XLA captures the ops into a CUDA graph, from their first execution."""
    rng = np.random.default_rng(5)
    x = rng.standard_normal((32, 4, 64)).astype(jnp.bfloat16)
    w = np.ones(64, jnp.bfloat16)
    shape, geometry = kernel_calls.geometry("NHD", 8, 16, 2, 64)
    caches = [np.zeros(shape, jnp.bfloat16)] * 2
    scales = np.ones(1, np.float32), np.ones(1, np.float32)

    def step(x, caches):
        x = xj.rms_norm(x, w)
        caches = kernel_calls.reshape_and_cache_flash(
            x[:, :2],
            x[:, 2:],
            caches,
            np.arange(32, dtype=np.int64),
            scales,
            geometry,
        )
        x = kernel_calls.paged_attention(
            x,
            caches,
            np.array([32], np.int32),
            np.arange(8, dtype=np.int32)[None],
            np.array([0, 32], np.int32),
            np.array([1], np.int32),
            geometry=geometry,
            scale=0.125,
            num_splits=2,
        )
        return xj.rms_norm(x, w), caches

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
    return {}


def all_groups(options):
    """Name: generator of (check, case); or a check of its own, without cases."""
    groups = {
        "rms_norm": kernel_cases.rms_norm_cases,
        "reshape_and_cache_flash": kernel_cases.reshape_cases,
        "fused_qk_norm_rope_and_cache": kernel_cases.prepare_cases,
        **attention_checks.groups(),
    }
    if not (options.quick or options.cpu):
        groups |= {
            "report": check_report,
            "capture": functools.partial(run_capture, options.lib_dir),
        }
    return {name: g for name, g in groups.items() if options.only in name}


def run_group(name, group, options, log):
    """Runs a group's cases in this process; a line of `log` before each."""
    result = {"cases": 0, "failures": [], "worst": {}}
    if name in ("report", "capture"):
        try:
            result |= group() | {"cases": 1}
        except Exception as error:  # noqa: BLE001 - reported, and the exit status
            traceback.print_exc()
            result["failures"].append(f"{name}: {error}")
        return result
    for index, (check, case) in enumerate(group(options.quick)):
        print(f"{check.__name__} {case}", file=log, flush=True)
        result["cases"] += 1
        try:
            found = check(np.random.default_rng(index), **case)
        except Exception as error:  # noqa: BLE001 - reported, and the exit status
            text = str(error)[:600]
            result["failures"].append(f"{check.__name__} {case}: {text}")
            continue
        for key, value in found.items():
            result["worst"][key] = max(value, result["worst"].get(key, 0))
    return result


def run_child(name, options):
    """Runs a group in its own process: a kernel that hangs, or ends the
    process, fails its group alone."""
    # The references are many small programs: none is worth tuning.
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"
    environment = os.environ | {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_FLAGS": flags,
    }
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "result.json"
        log = pathlib.Path(folder) / "log"
        command = [sys.executable, __file__, *sys.argv[1:]]
        command += ["--group", name, "--out", str(out), "--log", str(log)]
        with open(pathlib.Path(folder) / "stderr", "w+") as stderr:
            try:
                subprocess.run(
                    command,
                    env=environment,
                    stderr=stderr,
                    timeout=options.timeout,
                    check=True,
                )
            except subprocess.SubprocessError as error:
                stderr.seek(0)
                running = log.read_text().splitlines()[-1:] if log.exists() else []
                what = "timed out" if "timed out" in str(error) else "died"
                text = f"{what} in {running or 'set-up'}: {stderr.read()[-500:]}"
                result = {"cases": 0, "failures": [text], "worst": {}}
            else:
                result = json.loads(out.read_text())
    result["seconds"] = round(time.monotonic() - started, 1)
    failed = len(result["failures"])
    worst = {key: f"{value:.1e}" for key, value in result["worst"].items()}
    state = f"{failed} FAILED" if failed else "passed"
    print(
        f"{name}: {result['cases']} cases, {state}, {result['seconds']} s, {worst}",
        flush=True,
    )
    for text in result["failures"][:3]:
        print("   ", text[:700], flush=True)
    return name, result


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lib-dir", required=True)
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--only", default="", help="groups with this in their name")
    parser.add_argument(
        "--sm80",
        action="store_true",
        help="attention by the kernels that need no Hopper GPU",
    )
    parser.add_argument("--jobs", type=int, default=14, help="groups at a time")
    parser.add_argument("--timeout", type=float, default=400, help="seconds a group")
    parser.add_argument("--capture", help=argparse.SUPPRESS)
    parser.add_argument("--group", help=argparse.SUPPRESS)
    parser.add_argument("--log", help=argparse.SUPPRESS)
    options = parser.parse_args()
    groups = all_groups(options)
    if not (options.group or options.capture):
        with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
            results = dict(pool.map(lambda name: run_child(name, options), groups))
        # Last, for this process then holds memory of the device.
        report = kernel_calls.describe_device() | {"quick": options.quick}
        report |= {"sm80": options.sm80, "groups": results}
        if options.out:
            pathlib.Path(options.out).write_text(json.dumps(report, indent=1))
        failures = sum(len(r["failures"]) for r in results.values())
        print(f"{failures} failures in {len(results)} groups")
        return 1 if failures or not results else 0

    # A child of ours.
    platform = "cpu" if options.cpu else "cuda"
    if options.sm80:
        os.environ["XLA_OPS_ATTENTION_NO_WGMMA"] = "1"
    kernel_calls.use(options.lib_dir, platform)
    if options.capture:
        check_capture(options.capture)
        return 0
    with open(options.log, "w") as log:
        result = run_group(options.group, groups[options.group], options, log)
    pathlib.Path(options.out).write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
