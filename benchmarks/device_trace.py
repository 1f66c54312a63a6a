"""What a program's kernels take, from a trace of the device by XLA's profiler."""

from __future__ import annotations

import collections
import gzip
import json
import pathlib
from collections.abc import Callable


def kernels(run: Callable[[], float], repeats: int, folder: str, most: int = 40):
    """Traces `run` and returns what each kernel took.

    Args:
      run: runs the program `repeats` times, waits for it, and returns ms a run.
      folder: where the trace is written; empty before.

    Returns: `step_ms`, as `run` says; `device_ms`, the sum of all kernels in a run; and
    `kernels`: ms and calls in a run by name, of those that take `most`.
    """
    import torch_xla.debug.profiler as xp

    xp.start_trace(folder)
    try:
        whole = run()
    finally:
        xp.stop_trace()
    (path,) = pathlib.Path(folder).rglob("*.trace.json.gz")
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    devices = {
        event["pid"]
        for event in events
        if event.get("name") == "process_name" and "/device:" in event["args"]["name"]
    }
    streams = {
        (event["pid"], event["tid"])
        for event in events
        if event.get("name") == "thread_name" and "Stream" in event["args"]["name"]
    }
    total: dict[str, float] = collections.defaultdict(float)
    calls: dict[str, float] = collections.defaultdict(float)
    for event in events:
        if event.get("ph") != "X" or event["pid"] not in devices:
            continue
        if (event["pid"], event["tid"]) in streams:
            total[event["name"]] += event["dur"] / 1e3 / repeats
            calls[event["name"]] += 1 / repeats
    return {
        "step_ms": whole,
        "device_ms": sum(total.values()),
        "kernels": {
            name: {"ms": ms, "calls": calls[name]}
            for name, ms in sorted(total.items(), key=lambda kernel: -kernel[1])[:most]
        },
    }
