#!/usr/bin/env python3
"""Compares the ways to update KV caches in place (examples/in_place).

    in_place_ways.py [--out FOLDER] [--megabytes 16 256 1024]
    in_place_ways.py [--out FOLDER] --plot

Each way writes four tokens into eight caches (four layers of K and V) a step, lazily
and under torch.compile, with three sizes of all caches together; 64 MB, 1 GB and 8 GB
on a GPU. Into FOLDER go in_place_<device>.json, .md (the table) and .svg (the plot,
which takes matplotlib); --plot makes the last two again from the first. The table in
docs/in_place.md follows where FOLDER is the default, benchmarks/results.

    cache bytes copied   instructions of the optimised HLO that make an array of a
                         cache's shape (examples/llm/hlo.py), and for what runs on the
                         host instead what was sent there and back
    device bytes         all buffers of the step's program, by XLA's buffer assignment
    ms per step          from the call to the end of the device's work; the fastest of
                         the runs after the first, since other programs only add to it

A step that takes long is run fewer times, at least once; a way is not run at a size
for which a step would take over MAX_STEP_S, to judge by the size before.
"""

import argparse
import importlib
import json
import os
import pathlib
import re
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "in_place.md"
sys.path += [str(ROOT / "examples" / "in_place"), str(ROOT / "examples" / "llm")]

from hlo import dump_flags, step_programs  # noqa: E402

WAYS = {
    "front": "xla_ops front",
    "copy_with_donation": "copy_ with donation",
    "direct_call": "direct call",
    "clone_and_return": "clone and return",
    "other_library": "other library's op",
}
LAYERS, STEPS, BUDGET_S = 4, 12, 2.0
MAX_STEP_S = {"CPU": 10.0, "GPU": 2.0}
NUM_CACHES = 2 * LAYERS
MEGABYTES = {"CPU": [16, 256, 1024], "GPU": [64, 1024, 8192]}


def device_kind() -> str:
    return "CPU" if os.environ.setdefault("PJRT_DEVICE", "CPU") == "CPU" else "GPU"


def measure(way: str, compiled: bool, num_blocks: int, dump: pathlib.Path) -> dict:
    """Times one way; the fields it returns belong to a row of the table."""
    import torch
    import torch_xla.core.xla_model as xm
    import torch_xla.debug.metrics as met

    import common

    module = importlib.import_module(way)
    torch._dynamo.reset()
    step = module.step
    if compiled:
        step = torch.compile(step, backend=module.BACKEND)
    caches = common.make_caches(LAYERS, num_blocks)
    cache = caches[0][0]
    x, slots = common.make_inputs(num_blocks)
    bytes_each, shape = cache.nbytes, tuple(cache.shape)
    del cache

    def over_host() -> int:
        metrics = (met.metric_data(n) for n in ("InboundData", "OutboundData"))
        return sum(int(m[1]) for m in metrics if m)

    times: list[float] = []
    start = time.perf_counter()
    try:
        while len(times) < 2 or (
            len(times) < STEPS and time.perf_counter() - start < BUDGET_S
        ):
            common.addresses(caches)  # nothing is pending
            sent, began = over_host(), time.perf_counter()
            out, caches = common.run(step, caches, x, slots)
            xm.wait_device_ops()
            times.append(1e3 * (time.perf_counter() - began))
            sent = over_host() - sent
            del out
    except RuntimeError as error:
        return {"error": f"raises: {str(error).partition(':')[0]}"}
    # The caches go to the host whole; x and slots, of some kilobytes, do not count.
    sent = sent // bytes_each * bytes_each
    programs = step_programs(dump, shape, "bfloat16")
    copies = max((p.cache_copies for p in programs), default=0)
    return {
        "ms_per_step": min(times[1:]),
        "steps": len(times) - 1,
        "cache_bytes_copied": copies * bytes_each + sent,
        "over_host": sent > 0,
        "device_bytes": max((_device_bytes(dump, p) for p in programs), default=0),
    }


def _device_bytes(dump: pathlib.Path, program) -> int:
    stem = program.name.removesuffix(".txt")
    report = dump / f"{stem}-memory-usage-report.txt"
    if not report.exists():  # a plugin that writes none
        return 0
    # One total on the CPU, one of each memory space on a GPU.
    totals = re.findall(r"Total bytes(?: used)?: (\d+)", report.read_text())
    return sum(map(int, totals))


def compare(megabytes: list[int], dump: pathlib.Path) -> dict:
    import common
    import xla_ops

    rows = []
    block = common.PAGE * common.HEADS * common.HEAD_DIM * 2
    modes = [(way, compiled) for way in WAYS for compiled in (False, True)]
    for index, (way, compiled) in enumerate(modes):
        last: dict | None = None
        for size in megabytes:
            row: dict = {"way": way, "compiled": compiled, "megabytes": size}
            # A shape for each row, by which its programs are found.
            blocks = size * 2**20 // (NUM_CACHES * block) + index
            slow = last["ms_per_step"] * size / last["megabytes"] if last else 0.0
            if slow > 1e3 * MAX_STEP_S[device_kind()]:
                row["error"] = f"about {slow / 1e3:.0f} s a step: not run"
            else:
                row |= measure(way, compiled, blocks, dump)
            last = row if "ms_per_step" in row else last
            rows.append(row)
            print(table_row(row), flush=True)
    return {
        "device": device_name(),
        "version": xla_ops.__version__,
        "layers": LAYERS,
        "rows": rows,
    }


def device_name() -> str:
    if device_kind() == "CPU":
        return f"CPU, {os.cpu_count()} cores"
    from xla_ops.gpu import driver

    return driver.query().devices[0].name


def human(count: int) -> str:
    if not count:
        return "0"
    unit, name = (2**30, "GB") if count >= 2**30 else (2**20, "MB")
    return f"{count / unit:.3g} {name}"


def table_row(row: dict) -> str:
    mode = "compiled" if row["compiled"] else "lazy"
    start = f"| {WAYS[row['way']]} | {mode} | {human(row['megabytes'] * 2**20)} |"
    if "error" in row:
        return f"{start} {row['error']} | | |"
    copied = human(row["cache_bytes_copied"])
    copied += " over the host" if row["over_host"] else ""
    memory = human(row["device_bytes"]) if row["device_bytes"] else "-"
    return f"{start} {copied} | {memory} | {row['ms_per_step']:.2f} |"


def table(result: dict) -> str:
    head = [
        f"{result['device']}, xla_ops {result['version']}; "
        f"{2 * result['layers']} caches, bf16",
        "",
        "| way | mode | caches | cache bytes copied a step | device bytes "
        "| ms a step |",
        "|---|---|---|---|---|---|",
    ]
    return "\n".join([*head, *map(table_row, result["rows"])]) + "\n"


def update_page(kind: str, text: str) -> None:
    """Puts the table between the marks that docs/in_place.md has for it."""
    start, end = f"<!-- table: {kind} -->\n", "<!-- end -->"
    before, mark, after = PAGE.read_text().partition(start)
    if mark:
        after = after[after.index(end) :]
        PAGE.write_text(f"{before}{mark}{text}{after}")


def plot(result: dict, path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "xla_ops"  # the same file each time
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, 2, figsize=(9, 3.4), sharey=True, layout="constrained"
    )
    for axis, compiled in zip(axes, (False, True), strict=True):
        for way, name in WAYS.items():
            points = [
                (row["megabytes"], row["ms_per_step"])
                for row in result["rows"]
                if row["way"] == way
                and row["compiled"] == compiled
                and "ms_per_step" in row
            ]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=name)
        axis.set(xscale="log", yscale="log", xlabel="MB of caches")
        axis.set_title("compiled" if compiled else "lazy")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("ms a step")
    figure.legend(
        *axes[1].get_legend_handles_labels(), loc="outside right upper", fontsize=8
    )
    figure.suptitle(result["device"], fontsize=9)
    figure.savefig(path, metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--megabytes", type=int, nargs=3)
    parser.add_argument("--plot", action="store_true", help="only draw, from the JSON")
    args = parser.parse_args()
    kind = device_kind()
    path = args.out / f"in_place_{kind.lower()}.json"
    if not args.plot:
        with tempfile.TemporaryDirectory(prefix="xla_ops_hlo_") as dump:
            flags = f"{os.environ.get('XLA_FLAGS', '')} {dump_flags(dump)}"
            os.environ["XLA_FLAGS"] = flags.strip()
            result = compare(args.megabytes or MEGABYTES[kind], pathlib.Path(dump))
        args.out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
    result = json.loads(path.read_text())
    path.with_suffix(".md").write_text(table(result))
    if args.out == RESULTS:
        update_page(kind.lower(), table(result))
    try:
        plot(result, path.with_suffix(".svg"))
    except ImportError:
        print("no plot: pip install matplotlib, then --plot")


if __name__ == "__main__":
    main()
