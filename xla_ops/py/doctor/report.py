"""What the doctor found, and how it says so."""

from __future__ import annotations

import dataclasses
import textwrap
from typing import Any

from ..core.errors import Problem

OK = "ok"
NOTE = "note"  # worth knowing, nothing to mend
FAIL = "FAIL"

_SECTIONS = ("Versions", "Libraries", "CPU", "GPU")
_WIDTH = 88


@dataclasses.dataclass
class Check:
    """One line of the report.

    Attributes:
        section, name: where it stands.
        status: OK, NOTE or FAIL.
        text: what was found.
        fix: what to do; "" where there is nothing.
        details: what only a reader who asks for it wants.
    """

    section: str
    name: str
    status: str
    text: str
    fix: str = ""
    details: str = ""


class Report:
    """The checks so far and, for --json, the facts behind them."""

    def __init__(self, requested: str):
        self.requested = requested
        self.checks: list[Check] = []
        self.facts: dict[str, Any] = {"requested_device": requested}

    def add(
        self,
        section: str,
        name: str,
        status: str,
        text: str,
        fix: str = "",
        details: str = "",
    ) -> None:
        self.checks.append(Check(section, name, status, text, fix, details))

    def judge(
        self,
        section: str,
        name: str,
        good: bool,
        text: str,
        fix: str = "",
        details: str = "",
    ) -> None:
        """A check of a device: bad is a failure only if it is the one asked for."""
        status = OK if good else FAIL if self._is_asked_for(section) else NOTE
        self.add(section, name, status, text, "" if good else fix, details)

    def problem(self, section: str, name: str, problem: Problem) -> None:
        self.judge(section, name, False, problem.what, problem.fix)

    def _is_asked_for(self, section: str) -> bool:
        return section not in ("CPU", "GPU") or (section == "GPU") == (
            self.requested == "GPU"
        )

    @property
    def healthy(self) -> bool:
        return all(check.status != FAIL for check in self.checks)

    @property
    def verdict(self) -> str:
        if not self.healthy:
            count = sum(check.status == FAIL for check in self.checks)
            return f"Not healthy: {count} to mend, marked {FAIL}."
        if self.requested == "GPU":
            return "Healthy: the ops run on the GPU."
        if self.requested != "CPU":
            return f"Healthy, but on {self.requested} the ops run their references."
        calls = {c.section: c.status for c in self.checks if c.name == "custom call"}
        if calls.get("GPU") == OK:
            return (
                "Healthy: the ops run on the CPU, and on the GPU with PJRT_DEVICE=GPU."
            )
        return "Healthy: the ops run on the CPU."

    def as_json(self) -> dict[str, Any]:
        checks = [dataclasses.asdict(check) for check in self.checks]
        return {"healthy": self.healthy, **self.facts, "checks": checks}

    def as_text(self, verbose: bool = False) -> str:
        lines = [f"xla_ops doctor, for PJRT_DEVICE={self.requested}"]
        width = max(len(check.name) for check in self.checks) + 2
        indent = " " * (8 + width)
        for section in _SECTIONS:
            checks = [check for check in self.checks if check.section == section]
            if not checks:
                continue
            asked = self._is_asked_for(section)
            lines += ["", section if asked else f"{section} (not asked for)"]
            for check in checks:
                first = f"  {check.status:<6}{check.name:<{width}}"
                lines.append(_wrap(check.text, first, indent))
                if check.details and verbose:
                    lines.append(_wrap(check.details, indent, indent))
                if check.fix:
                    lines.append(_wrap(check.fix, f"{indent}-> ", f"{indent}   "))
        return "\n".join([*lines, "", self.verdict])


def _wrap(text: str, first: str, rest: str) -> str:
    return textwrap.fill(
        text,
        _WIDTH,
        initial_indent=first,
        subsequent_indent=rest,
        break_on_hyphens=False,
        break_long_words=False,
    )
