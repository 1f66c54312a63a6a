"""Measures ops inside XLA programs, beside what XLA makes of their references.

A worker process of run.py. One program holds many calls and is run many times in a row,
waiting once at the end, so a figure is what one call costs within a model: launch gaps
count, the host counts only where it is slower than the device.

Two forms of program, since an operand costs the host more than a small kernel takes:
large operands come anew for every call, small ones are the results of the call before.
Between calls of a chain stands an optimization barrier, over which XLA does not fuse.
"""

from __future__ import annotations

import functools
import importlib.metadata
import statistics
import time
from collections.abc import Callable

import torch
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.runtime as xr
from torch.utils import _pytree as pytree

import alone
import cases
import worker
from case import Case
from timing import spread

OPERAND_BYTES = 512 << 20
CHAIN = {"cuda": 64, "cpu": 4}
SECONDS = 0.03

_library = torch.library.Library("xla_ops_benchmarks", "DEF")
_library.define("barrier(Tensor x) -> Tensor")


def _barrier(x):
    y = x.clone()
    xm.optimization_barrier_([y])
    return y


_library.impl("barrier", _barrier, "XLA")
_library.impl("barrier", lambda x: torch.empty_like(x), "Meta")


def case_device() -> str:
    """The device that torch_xla runs on, as torch would name it."""
    return "cpu" if xr.device_type() == "CPU" else "cuda"


def wait() -> None:
    torch_xla.sync()
    xm.wait_device_ops()


def program(case: Case, call: Callable, calls: int) -> Callable:
    """A function of a list of operand sets that calls `call` `calls` times."""
    if case.chain is None:
        return lambda sets: [call(*operands) for operands in sets]
    barrier = torch.ops.xla_ops_benchmarks.barrier

    def chained(sets):
        operands = sets[0]
        for _ in range(calls):
            result = pytree.tree_map(barrier, call(*operands))
            operands = case.chain(operands, result)
        return result

    return chained


def measure(run: Callable, sets: list[tuple], calls: int) -> dict:
    """Times a program a call of its op, and how long the host takes to start it."""

    def times(count: int) -> tuple[float, float]:
        wait()
        host = []
        start = time.perf_counter()
        for _ in range(count):
            before = time.perf_counter()
            run(sets)
            host.append(time.perf_counter() - before)
        wait()
        return time.perf_counter() - start, statistics.median(host)

    times(2)  # compiles
    seconds, _ = times(2)
    count = max(2, int(SECONDS / (seconds / 2)))
    samples = [times(count) for _ in range(5)]
    result = spread([1e6 * total / count / calls for total, _ in samples])
    return result | {
        "host_us": 1e6 * statistics.median(host for _, host in samples) / calls,
        "calls": calls,
    }


def compiled(f: Callable) -> Callable:
    torch._dynamo.reset()
    return torch.compile(f, backend="openxla", fullgraph=True)


def lazy(f: Callable) -> Callable:
    def run(sets):
        result = f(sets)
        torch_xla.sync()
        return result

    return run


def row(case: Case) -> dict:
    device = torch_xla.device()
    torch.manual_seed(0)
    calls = 1
    if case.chain is None:
        calls = max(2, min(8, OPERAND_BYTES // max(case.moved, 1)))
    # Drawn on the host's side of XLA, by whose generator the device's is seeded.
    sets = [case.make(device) for _ in range(calls)]
    wait()
    if case.chain is not None:
        calls = CHAIN[case_device()]
    peer = case.xla_peer or case.reference
    ours, theirs = (program(case, f, calls) for f in (case.ours, peer))
    error = _error(case, sets[0], peer)
    found = alone.facts(case) | {"error": error}
    found["target"] = case.xla_target and vars(case.xla_target)
    if not error <= 2 * alone.TOLERANCE:
        return found | {"failed": f"relative error {error:.2e}"}
    found |= measure(compiled(ours), sets, calls)
    found["lazy"] = measure(lazy(ours), sets, calls)
    found["peers"] = {"XLA": measure(compiled(theirs), sets, calls)}
    return found


def _error(case: Case, operands: tuple, peer: Callable) -> float:
    """Relative error against XLA's result, the two in one program."""
    ours, theirs = case.ours(*operands), peer(*operands)
    if case.check is not None:  # attention, whose reference gives no lse
        ours = pytree.tree_leaves(ours)[0]
    wait()
    to_cpu = lambda tree: pytree.tree_map(lambda t: t.cpu(), tree)  # noqa: E731
    return alone.relative_error(to_cpu(ours), to_cpu(theirs))


def main() -> None:
    job = worker.Job.from_arguments()
    device = case_device()
    versions = alone.versions(device)
    for package in ("torch_xla", "jax-cuda12-pjrt", "jax-cuda13-pjrt"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    job.set("versions", versions)
    chosen = [case for case in cases.declare(device) if case.in_xla and job.wants(case)]
    # Elementwise ops first: XLA tunes the products of its attention for long.
    chosen.sort(key=lambda case: case.flops > 0)
    with torch.no_grad():
        for case in chosen:
            job.measure(case.name, functools.partial(row, case))
    job.finish()


if __name__ == "__main__":
    main()
