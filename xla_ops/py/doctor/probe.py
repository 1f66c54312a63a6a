"""Whether programs run on a device: tried in a process of their own.

Tested by tests/gpu/test_doctor_probe.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from .report import Report

_TIMEOUT_S = 300
_LAST_LINES = 3
_LONGEST = 800  # characters of an error in a line of the report


def check(report: Report, device: str, environ: Mapping[str, str]) -> None:
    """Runs child.py's steps on `device`, "CPU" or "GPU", and reports each."""
    # In memory: a doctor may be asked where no folder can be written.
    with open(os.memfd_create("steps"), encoding="utf-8") as file:
        end, stderr = _run(file.fileno(), {**environ, "PJRT_DEVICE": device})
        file.seek(0)
        lines = file.read().splitlines()
    steps: dict[str, dict[str, Any]] = {}
    for line in lines:
        step = json.loads(line)
        steps[step.pop("step")] = step
    unfinished = [name for name, step in steps.items() if not step]
    if end is not None:
        steps[(unfinished or ["client"])[0]] = end
    report.facts.setdefault("calls", {})[device] = {"steps": steps, "stderr": stderr}
    for name, step in steps.items():
        if "text" in step:
            report.judge(device, name, True, step["text"])
        else:
            report.judge(device, name, False, _short(step["what"]), step["fix"])


def _run(fd: int, environ: dict[str, str]) -> tuple[dict[str, str] | None, str]:
    """Runs child.py; returns what ended it before its end, if anything, and stderr."""
    command = [sys.executable, "-m", "xla_ops.doctor.child", f"/proc/self/fd/{fd}"]
    try:
        done = subprocess.run(
            command,
            check=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_S,
            env=environ,
            pass_fds=[fd],
        )
    except subprocess.TimeoutExpired as error:
        what = f"no answer in {_TIMEOUT_S} s"
        fix = "look at the machine's load, and with nvidia-smi at who uses the GPU"
        stderr = error.stderr or b""  # bytes, whatever `text` says
        text = stderr if isinstance(stderr, str) else stderr.decode(errors="replace")
        return {"what": what, "fix": fix}, text[-4000:]
    if done.returncode == 0:
        return None, done.stderr[-4000:]
    what = f"the process ended with status {done.returncode}"
    if done.returncode < 0:
        what = f"the process was ended by {_signal_name(-done.returncode)}"
    last = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    if last:
        what += ", and wrote last: " + " | ".join(last[-_LAST_LINES:])
    fix = "see all that it wrote: python -m xla_ops doctor --json"
    return {"what": what, "fix": fix}, done.stderr[-4000:]


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else text[:_LONGEST] + " ..."
