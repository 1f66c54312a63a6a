"""What the benchmark measures: every case of every op, from one list.

A case says how to draw one set of operands, how our op and its plain torch reference
compute from them, which bytes and floating-point operations the task must cost, what
else a user could run instead, and what it has to reach on the H100. Nothing here times
anything: alone.py and in_xla.py do, and report.py judges. What a case says: case.py.

Operands are drawn anew for every call of a measurement, so that a kernel finds nothing
of its own in the L2 cache.
"""

from __future__ import annotations

from dataclasses import replace

import attention_cases
import elementwise_cases
from case import Case


def declare(device: str) -> list[Case]:
    """Returns all cases for "cuda" or "cpu", the most important ones first.

    Those for the CPU are small: they show that the runner works and how the CPU
    handlers compare with torch's own operators.
    """
    sections = (
        attention_cases.prefill,
        attention_cases.decode,
        elementwise_cases.elementwise,
        elementwise_cases.qk_norm_ropes,
        elementwise_cases.qk_norm_ropes_and_writes,
        elementwise_cases.penalties,
        elementwise_cases.cache_writes,
    )
    found = [case for section in sections for case in section(device)]
    if device == "cpu":
        found = [replace(case, target=None, xla_target=None) for case in found]
    return found
