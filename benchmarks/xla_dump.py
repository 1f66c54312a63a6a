"""Reads what XLA dumps of the programs that it compiles."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def copies(program: str, shape: Sequence[int]) -> int:
    """Counts the instructions of an HLO program that copy an array of `shape`.

    A fusion that gives such an array counts too: it writes all of it.
    """
    dims = ",".join(map(str, shape))
    pattern = rf"= \w+\[{dims}\]\S* (?:copy|copy-start|fusion)\("
    return len(re.findall(pattern, program))


def launches(sequences: Iterable[str]) -> dict[str, int]:
    """Tells how XLA:GPU starts the program that has the most custom calls.

    Args:
        sequences: texts of *thunk_sequence*.txt, in which each thunk is a line that
            begins with its kind, and those inside a CUDA graph (kCommandBuffer) are
            indented. XLA writes one before and, if it captured anything, one after.

    Returns:
        `launches`, the thunks that the host starts one by one, and of the custom
        calls those `inside` and `outside` of CUDA graphs.

    Raises:
        ValueError: no sequence has a custom call.
    """
    found = [_count(text) for text in sequences]
    found = [counts for counts in found if counts["inside"] + counts["outside"]]
    if not found:
        raise ValueError("XLA dumped no sequence of thunks with a custom call")
    # The one after capture has the same calls in fewer launches.
    return max(found, key=lambda c: (c["inside"] + c["outside"], -c["launches"]))


def _count(sequence: str) -> dict[str, int]:
    counts = {"launches": 0, "inside": 0, "outside": 0}
    for line in sequence.splitlines():
        thunk = re.match(r"( *)(?:\d+: *)?k([A-Z]\w+)", line)
        if thunk:
            top = not thunk[1]
            counts["launches"] += top
            if thunk[2] == "CustomCall":
                counts["outside" if top else "inside"] += 1
    return counts
