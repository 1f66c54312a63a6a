"""The tensors that a function can reach without being given them.

Tested by tests/programs/test_replay_threads.py.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import CellType, CodeType, FunctionType, MethodType, ModuleType

import torch

# So many objects are looked at, and no more.
_LIMIT = 100_000


def tensors(function: object) -> list[torch.Tensor]:
    """The XLA tensors in what a function closes over and in the globals that it names.

    Looked for in functions within it and those that it calls by such names, in
    containers, and in the attributes of objects. Of an object of another kind, those in
    its elements and attributes.
    """
    found: list[torch.Tensor] = []
    seen: dict[int, object] = {}
    waiting: list[object] = [function]
    while waiting and len(seen) < _LIMIT:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value  # kept, so that no other object takes its id
        if isinstance(value, torch.Tensor):
            if value.device.type == "xla":
                found.append(value)
        else:
            waiting.extend(_parts(value))
    return found


def _parts(value: object) -> Iterator[object]:
    if isinstance(value, (type, ModuleType, str, bytes, int, float)):
        return
    if isinstance(value, FunctionType):
        yield from map(_content, value.__closure__ or ())
        yield from value.__defaults__ or ()
        yield from (value.__kwdefaults__ or {}).values()
        yield from _named(value)
    elif isinstance(value, MethodType):
        yield from (value.__func__, value.__self__)
    elif isinstance(value, functools.partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, dict):
        # Not its own method, by which a table of models imports them all.
        yield from list(dict.values(value))
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from list(value)
    yield from list(getattr(value, "__dict__", {}).values())


def _named(function: FunctionType) -> Iterator[object]:
    """The globals that a function's text names."""
    codes = [function.__code__]
    names: set[str] = set()
    while codes:
        code = codes.pop()
        names.update(code.co_names)
        codes.extend(part for part in code.co_consts if isinstance(part, CodeType))
    yield from (function.__globals__[n] for n in names & function.__globals__.keys())


def _content(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not set so far
        return None
