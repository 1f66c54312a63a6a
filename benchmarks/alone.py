"""Measures each op alone, on torch CPU or CUDA tensors, beside its peers.

A worker process of run.py. With --inductor it measures that peer alone, which takes
seconds to compile and so comes last.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

import cases
import peers
import worker
from case import Case
from timing import COPIES, CpuTimer, CudaTimer, ceilings

# The operands of one measurement: enough that nothing is still in the L2 cache, and
# enough calls that a replay is long against the clock's ticks.
OPERAND_BYTES = 2 << 30
MAX_CALLS = {"cuda": 200, "cpu": 8}
# Largest error of bf16 results that is rounding, as a part of the result's norm.
TOLERANCE = 1e-2


def relative_error(got: Any, want: Any) -> float:
    """||got - want|| / ||want||, the largest over a tree of tensors; inf for NaN."""
    worst = 0.0
    for a, b in zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True):
        size = b.double().norm().item()
        error = (a.double() - b.double()).norm().item() / (size or 1.0)
        worst = max(worst, math.inf if math.isnan(error) else error)
    return worst


def check(case: Case, operands: tuple) -> float:
    """Runs our op once and returns its relative error."""

    def fresh():
        return pytree.tree_map(torch.clone, operands) if case.in_place else operands

    result = case.ours(*fresh())
    if case.check is not None:
        return case.check(operands, result)
    return relative_error(result, case.reference(*fresh()))


class Alone:
    """Measures cases on one device."""

    def __init__(self, device: str, seconds: float):
        self.device = torch.device(device)
        self._timer = (CudaTimer if device == "cuda" else CpuTimer)(seconds)

    def ceilings(self) -> dict[str, float]:
        return ceilings(self.device.type, self._timer)

    def describe_busy_device(self) -> dict:
        """The machine's clocks under load."""
        if self.device.type == "cuda":
            a = torch.randn(8192, 8192, dtype=torch.bfloat16, device=self.device)
            for _ in range(200):  # about as long as the query takes
                a @ a
        return worker.describe_device(self.device.type)

    def row(self, case: Case) -> dict:
        """Our op, checked first, and its peers but for inductor."""
        torch.manual_seed(0)
        operands = self._operands(case)
        row = facts(case) | {"error": check(case, operands[0])}
        if not row["error"] <= TOLERANCE:
            return row | {"failed": f"relative error {row['error']:.2e}"}
        row |= self._time(case.ours, operands)
        if case.target and case.target.metric == "of copy":
            row["copy"] = self._copy(case.moved // 2, len(operands))
        return row | self._peers(case, operands, compiled=False)

    def inductor_row(self, case: Case) -> dict:
        torch.manual_seed(0)
        return self._peers(case, self._operands(case), compiled=True)

    def _copy(self, size: int, count: int) -> dict:
        """The faster way to copy so many bytes: a few lose more to start and end."""
        draw = functools.partial(torch.zeros, size // 2, dtype=torch.bfloat16)
        pairs = [tuple(draw(device=self.device) for _ in "sd") for _ in range(count)]
        times = [self._time(way, pairs) for way in COPIES]
        return min(times, key=lambda time: time["us"])

    def _operands(self, case: Case) -> list[tuple]:
        limit = OPERAND_BYTES if self.device.type == "cuda" else 1 << 22
        count = max(2, min(MAX_CALLS[self.device.type], limit // max(case.moved, 1)))
        return [case.make(self.device) for _ in range(count)]

    def _time(self, function: Callable, operands: list[tuple]) -> dict:
        return self._timer([lambda o=o: function(*o) for o in operands])

    def _peers(self, case: Case, operands: list[tuple], compiled: bool) -> dict:
        chosen = {
            name: self._peer(peer, operands)
            for name, peer in case.peers.items()
            if isinstance(peer, peers.Compiled) == compiled
        }
        return {"peers": chosen}

    def _peer(self, peer: Callable, operands: list[tuple]) -> dict:
        try:
            return self._time(peer, operands)
        except ImportError as error:
            return {"absent": str(error)}
        except Exception as error:  # noqa: BLE001 - a peer's limits are its own
            if self.device.type == "cuda":
                torch.cuda.synchronize()  # raises if the device is lost
            return {"failed": worker.first_line(error)}


def versions(device: str) -> dict:
    import importlib.util
    import platform

    found: dict = {"python": platform.python_version(), "torch": torch.__version__}
    if device == "cuda":
        found["cuda"] = torch.version.cuda
        found["cudnn"] = torch.backends.cudnn.version()
    for library in ("flashinfer", "vllm"):
        if importlib.util.find_spec(library) is None:
            found[library] = None
    return found


def main() -> None:
    job = worker.Job.from_arguments("inductor")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    alone = Alone(device, seconds=0.02 if device == "cuda" else 0.01)
    chosen = [case for case in cases.declare(device) if job.wants(case)]
    job.set("versions", versions(device))
    if "inductor" in job.flags:
        row = alone.inductor_row
        chosen = [case for case in chosen if "inductor" in case.peers]
    else:
        row = alone.row
        if "ceilings" not in job.report:
            job.set("ceilings", alone.ceilings())
            job.set("device while busy", alone.describe_busy_device())
    with torch.no_grad():
        for case in chosen:
            job.measure(case.name, functools.partial(row, case))
            if device == "cuda":
                torch.cuda.empty_cache()
    job.finish()


def facts(case: Case) -> dict:
    """What a row repeats of its case, so that a report needs no case."""
    target = case.target
    return {
        "op": case.op,
        "group": case.group,
        "bytes": case.moved,
        "flops": case.flops,
        "target": target and vars(target),
    }


if __name__ == "__main__":
    main()
