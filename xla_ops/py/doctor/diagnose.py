"""The command: which checks, in which order, and the exit status.

The status is 0 if the device that PJRT_DEVICE asks for (the CPU, where it is not set)
works.

Tested by tests/gpu/test_doctor.py.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping

from . import checks, probe
from .report import Report


def diagnose(environ: Mapping[str, str] | None = None) -> Report:
    """Runs all checks for the device that PJRT_DEVICE in `environ` asks for."""
    environ = dict(os.environ if environ is None else environ)
    asked = (environ.get("PJRT_DEVICE") or "CPU").upper()
    report = Report("GPU" if asked == "CUDA" else asked)
    # XLA's remarks at loading a plugin are not for a report.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
    checks.versions(report)
    checks.device(report, environ)
    checks.libraries(report)
    probe.check(report, "CPU", environ)
    # What stands against a client was said by then; making one only repeats it.
    if checks.gpu(report, environ):
        probe.check(report, "GPU", environ)
    return report


def main(argv: list[str]) -> int:
    """Runs the doctor; returns 0 if healthy, 1 if not."""
    parser = argparse.ArgumentParser(
        prog="python -m xla_ops doctor",
        description="Says what is installed, what works, and how to mend the rest."
        " The exit status is 0 if the device that PJRT_DEVICE asks for works.",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="name every op and library"
    )
    arguments = parser.parse_args(argv)
    report = diagnose()
    if arguments.json:
        print(json.dumps(report.as_json(), indent=2))
    else:
        print(report.as_text(arguments.verbose))
    return 0 if report.healthy else 1
