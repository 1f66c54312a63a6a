"""Bitmasks of tokens: int32, token t in bit t % 32 of word t // 32, 1 for allowed.

Tested by tests/engine/test_sampler.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def pack(allowed: np.ndarray) -> np.ndarray:
    """Booleans [rows, V] as a bitmask, [rows, ceil(V / 32)]."""
    missing = -allowed.shape[1] % 32
    padded = np.pad(allowed, ((0, 0), (0, missing)), constant_values=True)
    return np.packbits(padded, axis=-1, bitorder="little").view("<i4")


def padded(bitmask: np.ndarray, rows: int, words: int) -> np.ndarray:
    """The bitmask as [rows, words]; tokens and rows that it lacks are allowed."""
    result = np.full((rows, words), -1, np.int32)
    width = min(words, bitmask.shape[1])
    result[: bitmask.shape[0], :width] = bitmask[:, :width]
    return result


def arrange(
    bitmask: np.ndarray,
    request_ids: Sequence[str],
    row_of: dict[str, int],
    num_rows: int,
    num_drafts: dict[str, int] | None = None,
) -> np.ndarray:
    """The scheduler's grammar bitmask in the order of the logits.

    Args:
        bitmask: GrammarOutput.grammar_bitmask, the rows of `request_ids` in turn.
        request_ids: GrammarOutput.structured_output_request_ids.
        row_of: each request's first row of the logits.
        num_rows: rows of logits. Those of other requests allow every token.
        num_drafts: how many draft tokens a request has, each with a row of its own.
    """
    arranged = np.full((num_rows, bitmask.shape[1]), -1, np.int32)
    at = 0
    for request in request_ids:
        count = 1 + (num_drafts or {}).get(request, 0)
        if (row := row_of.get(request)) is not None:
            arranged[row : row + count] = bitmask[at : at + count]
        at += count
    return arranged
