#!/usr/bin/env python3
"""Everything that has to be shown on a GPU, in one run.

    proof.py --out DIR [--only PART ...] [--jobs N] [--cache-mb 8192]
             [--kernel-races PROGRAM]

Needs an NVIDIA GPU and the installed wheel; uses this checkout's tests, examples and
benchmarks. Writes DIR/proof.json (device, driver, versions, and for every part what
passed, what failed and how long it took) and each part's log, prints a short table last
and exits 1 if a part failed.

Parts: doctor; demo; one a test file, named as it is (test_rms_norm, ...; three of
test_flash_attn_varlen, which is long), on lazy and compiled tensors and, with
XLA_OPS_TEST_TORCH_CUDA=1, torch CUDA tensors; test_in_place with caches of --cache-mb;
memcheck (compute-sanitizer on op tests); kernels, elementwise, gradients,
grouped_matmul and linear (the kernels alone, under JAX); attention_backward and
one_call (alone, under torch); compiled_update (torch.compile of CUDA tensors, timed);
user_kernels (xla_ops.extend, timed); large (arrays past 2^31 elements); table (ms per
step against cache size); ways (examples/in_place, compared). With --kernel-races, the
program that `bazel build //tests/gpu:kernel_races` makes: races (it alone, with graph
capture) and races_TOOL for each tool of compute-sanitizer. `tests` stands for all test
files. Up to --jobs parts share the GPU, but for large and what is timed.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import re
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Of each op, and of all ops alike.
OPS = tuple(sorted(path.stem for path in (ROOT / "tests/ops").glob("test_*.py")))
# Of everything together, on the GPU as on the CPU.
TOGETHER = (
    "core/test_autocast",
    "core/test_custom_call",
    "core/test_gradients",
    "core/test_mutable",
    "core/test_ownership",
    "core/test_written_tensors",
    "llm/test_llm",
    "programs/test_backend",
    "programs/test_replay",
    "vllm/test_lowerings",
)
# Need the GPU, or most of its memory, for themselves.
ALONE = ("large", "demo", "table", "ways", "compiled_update", "user_kernels")

LONG = "test_flash_attn_varlen"
LONG_SHARES = {
    "lazy": "lazy",
    "compiled": "compiled",
    "rest": "not lazy and not compiled",
}


def pytest(*args):
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
            "--show-capture=no", "--tb=short", *args]  # fmt: skip


def libraries():
    import xla_ops

    return str(pathlib.Path(xla_ops.__file__).parent / "lib")


def race_parts(program):
    """Every kernel alone; the sanitizer slows it down, so a graph's replays are left
    to the part without."""
    found = {"races": ([program, libraries()], {})}
    for tool in ("memcheck", "initcheck", "racecheck", "synccheck"):
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "86"]
        found[f"races_{tool}"] = ([*command, program, "--eager", libraries()], {})
    return found


def parts(out, cache_mb):
    tests = [f"tests/ops/{op}.py" for op in OPS if op != "test_conformance"]
    cuda = {"XLA_OPS_TEST_TORCH_CUDA": os.environ.get("XLA_OPS_TEST_TORCH_CUDA", "1")}
    in_place = {"XLA_OPS_TEST_CACHE_MB": str(cache_mb)}
    generate = [sys.executable, "examples/llm/generate.py", "--device", "gpu"]
    sanitizer = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "86",
                 "--target-processes", "all", "--launch-timeout", "120"]  # fmt: skip
    # Memory errors show in any call; the smallest set that reaches every kernel.
    small = pytest(*tests, "-k", "(lazy or cuda) and (numerics or auto or fp8 or"
                   " out_of_range or bad_block or window or split)")  # fmt: skip
    # Others may hold memory too: each takes what it needs.
    shared = {**cuda, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    found = {"doctor": ([sys.executable, "-m", "xla_ops", "doctor"], {})}
    for name in (*(f"ops/{op}" for op in OPS), *TOGETHER):
        found[name.rpartition("/")[2]] = (pytest(f"tests/{name}.py"), shared)
    whole = found.pop(LONG)
    for share, words in LONG_SHARES.items():
        found[f"{LONG}_{share}"] = ([*whole[0], "-k", words], shared)
    found["test_in_place"] = (pytest("tests/core/test_in_place.py"), shared | in_place)
    table = [sys.executable, "benchmarks/in_place.py"]
    table += ["--out", str(out / "in_place.json"), "--megabytes", "64", "2048", "16384"]
    large = [sys.executable, "tests/gpu/check_large.py", "--lib-dir", libraries()]
    ways = [sys.executable, "benchmarks/in_place_ways.py", "--out", str(out / "ways")]
    alone = {
        name: [sys.executable, f"tests/gpu/check_{name}.py", "--lib-dir", libraries(),
               "--out", str(out / f"{name}.json")]
        for name in ("kernels", "elementwise", "grouped_matmul", "linear",
                     "gradients", "attention_backward", "one_call")
    }  # fmt: skip
    update = [sys.executable, "benchmarks/compiled_update.py", "--device", "cuda",
              "--out", str(out / "compiled_update.json")]  # fmt: skip
    user = [sys.executable, "tests/gpu/check_user_kernels.py"]
    user += ["--out", str(out / "user_kernels.json")]
    return found | {
        "user_kernels": (user, {}),
        **{name: (command, shared) for name, command in alone.items()},
        "compiled_update": (update, {}),
        "memcheck": (sanitizer + small, shared),
        "large": (large, {}),
        "demo": (generate, {}),
        "table": (table, {}),
        "ways": (ways, {}),
    }


def run(name, command, env, out, timeout):
    start = time.time()
    log = out / f"{name}.log"
    with log.open("w") as file:
        try:
            status = subprocess.run(
                command,
                cwd=ROOT,
                env={**os.environ, "PJRT_DEVICE": "GPU", **env},
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=timeout,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            status = 124
    text = log.read_text()
    result = {"status": status, "seconds": round(time.time() - start, 1)}
    for word in ("passed", "failed"):
        found = re.findall(rf"(\d+) {word}", text)
        if found:
            result[word] = int(found[-1])
    found = re.findall(r"ERROR SUMMARY: (\d+) error", text)
    if found:
        result["sanitizer_errors"] = sum(map(int, found))
    return result, text


def versions():
    import importlib.metadata as metadata

    query = "--query-gpu=name,driver_version,clocks.sm,clocks.mem"
    gpu = subprocess.run(
        ["nvidia-smi", query, "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    found = {}
    ours = ("xla_ops", "torch", "torch_xla", "jax-cuda12-pjrt", "jax-cuda13-pjrt")
    for package in ours:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return {"gpu": gpu, "python": sys.version.split()[0], **found}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--cache-mb", type=int, default=8192)
    parser.add_argument("--timeout", type=int, default=400, help="seconds a part")
    parser.add_argument("--kernel-races", help="the built program")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    report = {"versions": versions(), "command": sys.argv[1:], "parts": {}}
    todo = parts(args.out, args.cache_mb)
    if args.kernel_races:
        todo |= race_parts(args.kernel_races)
    names = []
    for name in args.only or todo:
        names += (
            [n for n in todo if n.startswith("test_")] if name == "tests" else [name]
        )

    def measure(name):
        result, text = run(name, *todo[name], args.out, args.timeout)
        report["parts"][name] = result
        (args.out / "proof.json").write_text(json.dumps(report, indent=1) + "\n")
        tail = 6 if result["status"] == 0 else 45
        if name in ("doctor", *ALONE):
            tail = 45
        lines = [f"--- {name}: {result}", *text.splitlines()[-tail:]]
        print("\n".join(lines), flush=True)

    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(measure, [n for n in names if n not in ALONE]))
    for name in names:
        if name in ALONE:
            measure(name)
    print(json.dumps(report["versions"]))
    for name, result in report["parts"].items():
        print(f"{name:28s} {result}")
    sys.exit(any(r["status"] for r in report["parts"].values()))


if __name__ == "__main__":
    main()
