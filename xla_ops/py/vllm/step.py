"""One step's input: what the host knows, as one vector of integers.

A step has many small tensors (tokens, positions, slots, lengths, block tables). They go
to the device as one int32 vector, whose layout is fixed by the program's bucket.

Tested by tests/engine/test_step.py.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes of a program.

    Attributes:
        tokens: rows of the model.
        rows: sequences, at most.
        logit_rows: rows of which logits are computed.
        blocks: of each KV group, width of the block table.
        position_rows: 1, or 3 where positions have three axes (M-RoPE).
        has_adapters: whether tokens may have an adapter (LoRA).
    """

    tokens: int
    rows: int
    logit_rows: int
    blocks: tuple[int, ...]
    position_rows: int = 1
    has_adapters: bool = False

    @functools.cached_property
    def fields(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes, in the order in which they lie in the vector."""
        shapes: dict[str, tuple[int, ...]] = {
            "token_ids": (self.tokens,),
            "sources": (self.tokens,),
            "positions": (self.position_rows, self.tokens),
            "query_start_loc": (self.rows + 1,),
            "context_lens": (self.rows,),
            "logit_indices": (self.logit_rows,),
            "num_seqs": (1,),
        }
        for group, blocks in enumerate(self.blocks):
            shapes[f"slots_{group}"] = (self.tokens,)
            shapes[f"block_tables_{group}"] = (self.rows, blocks)
        if self.has_adapters:
            shapes["adapter_slots"] = (self.tokens,)
        return shapes

    @functools.cached_property
    def size(self) -> int:
        """Elements of the vector."""
        return sum(_size(shape) for shape in self.fields.values())

    def pack(self, step: Step, vector: np.ndarray | None = None) -> np.ndarray:
        """Returns the vector, padded: slots by -1, `query_start_loc` by its end.

        A step without adapters may go to a program that has them.

        Args:
            vector: [size] int32, to be written and returned; a new one if None.
        """
        if vector is None:
            vector = np.zeros(self.size, np.int32)
        else:
            vector.fill(0)
        views = _views(vector, self.fields)
        n, r = step.token_ids.shape[0], step.context_lens.shape[0]
        views["token_ids"][:n] = step.token_ids
        views["sources"].fill(-1)
        if step.sources is not None:
            views["sources"][:n] = step.sources
        views["positions"][:, :n] = step.positions
        views["query_start_loc"][: r + 1] = step.query_start_loc
        views["query_start_loc"][r + 1 :] = step.query_start_loc[-1]
        views["context_lens"][:r] = step.context_lens
        views["logit_indices"][: step.logit_indices.shape[0]] = step.logit_indices
        views["num_seqs"][0] = r
        for group, (slots, table) in enumerate(step.groups):
            views[f"slots_{group}"][:n] = slots
            views[f"slots_{group}"][n:] = -1
            views[f"block_tables_{group}"][:r, : table.shape[1]] = table
        if self.has_adapters:
            views["adapter_slots"].fill(-1)
            if step.adapter_slots is not None:
                views["adapter_slots"][:n] = step.adapter_slots
        return vector

    def unpack(self, vector: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns the fields by name: views of an int32 vector on any device."""
        fields = self.fields
        parts = vector.split([_size(shape) for shape in fields.values()])
        return {
            name: part.view(shape)
            for (name, shape), part in zip(fields.items(), parts, strict=True)
        }


class Step(NamedTuple):
    """What one step computes, unpadded, on the host.

    Attributes:
        token_ids, positions: of each token; positions [n] or [3, n].
        sources: of each token the row of the last step's sampled tokens that it is, or
            -1; None: of none.
        query_start_loc: [num_seqs + 1].
        context_lens: [num_seqs].
        logit_indices: tokens of which logits are wanted.
        groups: of each KV group the tokens' slots and the sequences' block table.
        adapter_slots: of each token the slot of its adapter (lora.py), -1 where it has
            none; None: no token has one.
    """

    token_ids: np.ndarray
    positions: np.ndarray
    sources: np.ndarray | None
    query_start_loc: np.ndarray
    context_lens: np.ndarray
    logit_indices: np.ndarray
    groups: Sequence[tuple[np.ndarray, np.ndarray]]
    adapter_slots: np.ndarray | None = None

    @staticmethod
    def empty(groups: int, position_rows: int = 1) -> Step:
        """A step of no sequence, with which programs are compiled."""
        none = np.zeros(0, np.int32)
        return Step(
            none,
            np.zeros((position_rows, 0), np.int32),
            None,
            np.zeros(1, np.int32),
            none,
            none,
            [(none, np.zeros((0, 0), np.int32))] * groups,
        )


# Sizes from each power of two to the next, from so many tokens on.
_PARTS = ((4096, 8), (2048, 4), (256, 2), (0, 1))


def buckets(smallest: int, largest: int) -> list[int]:
    """Sizes of programs, of which a step takes the smallest that holds it.

    Powers of two times `smallest`, and `largest`, which ends them. Between large ones
    are more: there a step takes as long as it has tokens, and is padded by no more than
    a half from 256 on, a quarter from 2048 on, an eighth from 4096 on.
    """
    sizes = []
    size = smallest
    while size < largest:
        parts = next(p for least, p in _PARTS if size >= least)
        sizes += [size + size * part // parts for part in range(parts)]
        size *= 2
    return [*(size for size in sizes if size < largest), largest]


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


def _views(
    vector: np.ndarray, fields: dict[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    views, start = {}, 0
    for name, shape in fields.items():
        end = start + _size(shape)
        views[name] = vector[start:end].reshape(shape)
        start = end
    return views
