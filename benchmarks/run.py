#!/usr/bin/env python3
"""Measures the ops: right first, then how fast, beside what else a user could run.

    run.py [--out DIR] [--only GROUP ...] [--quick] [--budget SECONDS]
    run.py --plot RESULTS.json      draws and prints again; needs no GPU

Groups: prefill, decode, elementwise, small, cache, step; the words of a row's name
select too. On a machine without a GPU the CPU handlers are measured, on small operands.

Each part is a process of its own, one after the other:

    alone   the ops on torch CPU or CUDA tensors, by replay of CUDA graphs, beside
            torch's own operators, inductor, SDPA's backends, FlashInfer and vLLM
    in XLA  the ops inside XLA programs, lazily and compiled, beside XLA's own fusions
    step    a decode step of 32 layers: host time, re-traces, captures, copies
    inductor  the elementwise references by torch.compile, into the rows of `alone`

They may need different environments: a torch with CUDA kernels, and the torch that
torch_xla belongs to. --alone-env PYTHONPATH=DIR sets a variable for `alone` and
`inductor`.

Writes DIR/RESULTS.json (machine, clocks, versions, commit, every figure with its
spread) and plots. Exits 1 if a row is wrong or a part broke off. docs/benchmarks.md
says how things are measured and why.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import report  # noqa: E402

# The worker of each part, and by what share of the budget it must have ended. What
# matters most comes first.
PARTS = {
    "alone": (["alone.py"], 0.4),
    "step": (["decode_step.py"], 0.6),
    "in XLA": (["in_xla.py"], 0.9),
    "inductor": (["alone.py", "--inductor"], 1.0),
}
# What a part may take beyond its share, to end the row that it is in.
GRACE_SECONDS = 30


def run_part(script: list[str], options: list[str], env: dict, until: float) -> dict:
    """Runs a worker, again where it dies, and returns its report."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "report.json"
        name, *flags = script
        command = [sys.executable, str(HERE / name), str(path), *flags, *options]
        ended, rows_before = "", -1
        while True:
            try:
                status = subprocess.run(
                    [*command, "--deadline", str(until)],
                    env=env,
                    timeout=max(1, until - time.time()) + GRACE_SECONDS,
                    check=False,
                ).returncode
            except subprocess.TimeoutExpired:
                ended = f"stopped {GRACE_SECONDS} s past its share of the budget"
                break
            found = json.loads(path.read_text()) if path.exists() else {}
            rows = len(found.get("rows", {})) + ("current" in found)
            if status == 0:
                break
            if rows <= rows_before or not rows:
                ended = f"exit status {status}"
                break
            rows_before = rows
        found = json.loads(path.read_text()) if path.exists() else {}
        if found.pop("current", None) is not None:
            ended = ended or "broke off"
        return (
            {"rows": {}, "left out": []} | found | ({"ended": ended} if ended else {})
        )


def commit() -> str | None:
    """The commit that is measured, with a + if files were changed."""
    git = ["git", "-C", str(HERE)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        )
        dirty = subprocess.run(
            [*git, "diff", "--quiet", "HEAD"], capture_output=True, check=False
        )
    except FileNotFoundError:
        return None
    if head.returncode:
        return None
    return head.stdout.strip() + "+" * bool(dirty.returncode)


def device() -> dict:
    import worker

    try:
        return worker.describe_device("cuda")
    except (FileNotFoundError, subprocess.CalledProcessError):
        return worker.describe_device("cpu")


def measure(args: argparse.Namespace) -> dict:
    start = time.time()
    options = [*(["--quick"] if args.quick else [])]
    if args.only:
        options += ["--only", *args.only]
    results: dict = {
        "command": " ".join(["run.py", *sys.argv[1:]]),
        "commit": args.commit or commit(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(start)),
        "device": device(),
        "parts": {},
    }
    for part in args.parts:
        script, share = PARTS[part]
        env = dict(os.environ, PYTHONDONTWRITEBYTECODE="1")
        if script[0] == "alone.py":
            for setting in args.alone_env:
                name, _, value = setting.partition("=")
                env[name] = value
        else:
            env.setdefault(
                "PJRT_DEVICE", "CPU" if "cores" in results["device"] else "GPU"
            )
        print(f"{part}:", flush=True)
        begun = time.time()
        found = run_part(script, options, env, start + share * args.budget)
        results["parts"][part] = found | {"seconds": round(time.time() - begun, 1)}
    results["seconds"] = round(time.time() - start, 1)
    report.merge_inductor(results)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "results")
    parser.add_argument("--name", help="of the results; default: run_DEVICE")
    parser.add_argument("--only", nargs="+", default=[], metavar="GROUP")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--quick", action="store_true", help="a few rows of each group")
    parser.add_argument(
        "--budget",
        type=float,
        default=180,
        metavar="SECONDS",
        help="no row starts after that; the last rows matter least",
    )
    parser.add_argument("--alone-env", nargs="+", default=[], metavar="NAME=VALUE")
    parser.add_argument("--commit", help="what to record where there is no git")
    parser.add_argument("--plot", type=pathlib.Path, metavar="RESULTS.json")
    parser.add_argument(
        "--markdown", action="store_true", help="print a markdown table"
    )
    args = parser.parse_args()
    if args.plot:
        results = json.loads(args.plot.read_text())
        folder, stem = args.plot.parent, args.plot.stem
    else:
        results = measure(args)
        words = results["device"]["name"].split()
        stem = args.name or "run_" + (
            "_".join(words[1:2]) if "NVIDIA" in words else "cpu"
        )
        folder = args.out
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{stem}.json").write_text(json.dumps(results, indent=1) + "\n")
    print(report.markdown(results) if args.markdown else report.text(results))
    try:
        for path in report.plot(results, folder, stem):
            print(f"drawn: {path}")
    except ImportError as error:
        print(f"no plots: {error}")
    failed = report.failed(results)
    for name in failed:
        print(f"FAILED: {name}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
