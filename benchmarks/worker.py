"""What the runner's worker processes share: the job they are given, and its report."""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any


def first_line(error: BaseException) -> str:
    """An exception in one line."""
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text}"[:300]


def describe_device(device: str) -> dict:
    """What the machine is, and how fast it is clocked now."""
    if device != "cuda":
        with open("/proc/cpuinfo") as file:
            names = [line for line in file if line.startswith("model name")]
        name = names[0].split(":")[1].strip() if names else "CPU"
        return {"name": name, "cores": len(names)}
    fields = ("name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm",
              "power.draw", "temperature.gpu")  # fmt: skip
    query = f"--query-gpu={','.join(fields)}"
    values = subprocess.run(
        ["nvidia-smi", query, "--format=csv,noheader"],
        capture_output=True, text=True, check=True,
    ).stdout.split("\n")[0]  # fmt: skip
    return dict(zip(fields, (v.strip() for v in values.split(",")), strict=True))


class Job:
    """The rows that a process should measure, and its report, a JSON file.

    The file is written after every change. A process that is started again goes on
    where the last one stopped, and counts the row on which that one died as failed, so
    that a case that takes the process down costs no other row.
    """

    def __init__(
        self,
        path: pathlib.Path,
        only: Sequence[str] = (),
        quick: bool = False,
        deadline: float = float("inf"),
        flags: Sequence[str] = (),
    ):
        self.report: dict[str, Any] = {"rows": {}, "left out": []}
        self.flags = flags
        self._path = path
        self._only = only
        self._quick = quick
        self._deadline = deadline
        if path.exists():
            self.report = json.loads(path.read_text())
        died_in = self.report.pop("current", None)
        if died_in is not None:
            self.report["rows"][died_in] = {"failed": "the process that ran it died"}
        self.report["left out"] = []

    @classmethod
    def from_arguments(cls, *flags: str) -> Job:
        """Reads the command line; `flags` are the worker's own options."""
        parser = argparse.ArgumentParser()
        parser.add_argument("report", type=pathlib.Path)
        parser.add_argument("--only", nargs="*", default=[])
        parser.add_argument("--quick", action="store_true")
        parser.add_argument("--deadline", type=float, default=float("inf"))
        parser.set_defaults(flags=[])
        for flag in flags:
            parser.add_argument(
                f"--{flag}", dest="flags", action="append_const", const=flag
            )
        args = parser.parse_args()
        return cls(args.report, args.only, args.quick, args.deadline, args.flags)

    def wants(self, case) -> bool:
        """Whether --only and --quick choose a case."""
        words = (case.group, *case.name.split())
        return (not self._only or any(word in self._only for word in words)) and (
            case.quick or not self._quick
        )

    def wants_group(self, group: str) -> bool:
        return not self._only or group in self._only

    def set(self, key: str, value: Any) -> None:
        self.report[key] = value
        self._write()

    def measure(self, name: str, run: Callable[[], dict]) -> None:
        """Adds the row `name`, unless it is there or the time is over."""
        if name in self.report["rows"]:
            return
        if time.time() > self._deadline:
            self.report["left out"].append(name)
            return
        self.set("current", name)
        start = time.time()
        lost = False
        try:
            row = run()
        except Exception as error:  # noqa: BLE001 - the row says it
            row = {"failed": first_line(error)}
            lost = not _device_works()
        row["seconds"] = round(time.time() - start, 2)
        del self.report["current"]
        self.report["rows"][name] = row
        self._write()
        shown = row.get("failed", "")
        if "us" in row:
            shown = f"{row['us']:10.2f} us"
        elif "value" in row:
            shown = f"{row['value']:10.3g} {row['unit']}"
        print(f"  {name:44} {shown}", flush=True)
        if lost:
            sys.exit("worker: the device no longer works")

    def finish(self) -> None:
        self.set("finished", True)

    def _write(self) -> None:
        new = self._path.with_suffix(".new")
        new.write_text(json.dumps(self.report, indent=1) + "\n")
        new.replace(self._path)


def _device_works() -> bool:
    """Whether torch's CUDA context, if there is one, survived an error."""
    import torch

    try:
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
