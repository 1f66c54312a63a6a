"""Helpers of these tests: sharded tensors, and what XLA made of a program."""

import math
import os
import re
from contextlib import contextmanager

import torch
import torch_xla
from torch_xla.distributed import spmd as xs

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "all-to-all",
    "collective-permute",
    "reduce-scatter",
    "collective-broadcast",
)
_BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "s64": 8, "pred": 1}


def put(t, mesh=None, spec=None):
    """A copy on the XLA device, sharded where a spec is given."""
    moved = t.clone().to(torch_xla.device())
    if spec is not None:
        xs.mark_sharding(moved, mesh, spec)
    return moved


def spec_of(t) -> str:
    return torch_xla._XLAC._get_xla_sharding_spec(t)


def tiles_of(t) -> list[int]:
    """Into how many pieces each dimension of a tensor is cut."""
    match = re.match(r"\{devices=\[([\d,]+)\]", spec_of(t))
    if not match:
        return [1] * t.dim()
    return [int(n) for n in match[1].split(",")][: t.dim()]


class Programs:
    """The programs that XLA compiled in a `compiled` block, with a call of ours."""

    def __init__(self):
        self.texts = []

    def count(self, instruction: str) -> int:
        pattern = rf" {instruction}(?:-start)?\("
        return sum(len(re.findall(pattern, text)) for text in self.texts)

    @property
    def collectives(self) -> dict[str, int]:
        return {name: n for name in COLLECTIVES if (n := self.count(name))}

    @property
    def bytes_moved(self) -> int:
        """Of all results of collectives, on one device."""
        total = 0
        names = "|".join(COLLECTIVES)
        for text in self.texts:
            for types in re.findall(rf"= (.*?) (?:{names})(?:-start)?\(", text):
                for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", types):
                    size = math.prod(int(n) for n in dims.split(",") if n)
                    total += size * _BYTES[dtype]
        return total


@contextmanager
def compiled(hlo_dump):
    """Yields `Programs`, filled as the block ends."""
    before = set(os.listdir(hlo_dump))
    programs = Programs()
    yield programs
    torch_xla.sync(wait=True)
    for name in sorted(set(os.listdir(hlo_dump)) - before):
        if name.endswith("after_optimizations.txt"):
            text = (hlo_dump / name).read_text()
            if 'target="xla_ops.' in text:
                programs.texts.append(text)


def run(how, function):
    """The function as it is called lazily, by a backend, or replayed."""
    if how == "lazy":
        return function
    if how == "replay":
        from xla_ops.programs.replay import replay

        return replay(function)
    return torch.compile(function, backend=how, fullgraph=True)
