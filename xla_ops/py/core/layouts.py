"""The layouts that a `sharding.Rule` is written in, taken apart."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple


class Dim(NamedTuple):
    """A dimension of an operand or a result, as its layout has it.

    Attributes:
        name: dimensions of one name are split alike.
        may_split: whether it may be.
        must_be_said: whether it cannot be taken for granted that it is whole.
        units: how many there are that cannot be split further.
        unit: elements of each.
    """

    name: str
    may_split: bool
    must_be_said: bool
    units: int
    unit: int = 1

    @property
    def called(self) -> str:
        has_name = self.name and not self.name.startswith("dimension")
        return f" ({self.name})" if has_name else ""


@functools.lru_cache(maxsize=1024)
def layout_of(words: str | None, shape: Sequence[int]) -> tuple[Dim, ...]:
    """Takes a layout apart."""
    if words is None:
        return tuple(Dim("", False, False, n) for n in shape)
    if not shape:
        return ()
    names = words.split()
    if names[0].endswith("..."):
        mark = names[0][:-3]
        leading = len(shape) - len(names) + 1
        names[:1] = [f"{mark}tokens{i or ''}" for i in range(leading)]
    dims = []
    for word, size in zip(names, shape, strict=True):
        name, _, unit = word.lstrip("!~").partition("*")
        elements = int(unit or 1)
        may_split, must_be_said = word[0] not in "!~", word[0] != "!"
        dims.append(Dim(name, may_split, must_be_said, size // elements, elements))
    return tuple(dims)
