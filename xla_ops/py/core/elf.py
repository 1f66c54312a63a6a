"""Tells a shared object that was cut short from a whole one, before it is loaded.

The loader maps a file without looking at its size, and the process dies (SIGBUS) where
it touches what is not there: a disk that was full, or a copy that broke off, would end
the program and name nothing.

It stands alone: the entry point, xla_ops_pjrt, loads it by its path where the package
cannot be imported.

Tested by tests/core/test_elf.py.
"""

from __future__ import annotations

import os
import struct

_LOAD = 1  # PT_LOAD


def cut_short(path: str | os.PathLike[str]) -> str:
    """Says how the 64-bit ELF file at `path` was cut short; "" if it was not.

    What else may be wrong with a file, missing or no library at all, the loader says.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(64)
            if len(head) < 64 or head[:6] != b"\x7fELF\x02\x01":
                return ""
            programs, sections = struct.unpack_from("<QQ", head, 32)
            _, entry, count, section, number = struct.unpack_from("<5H", head, 52)
            ends = [programs + entry * count, sections + section * number]
            file.seek(programs)
            table = file.read(entry * count)
    except OSError:
        return ""
    for at in range(0, len(table) - 55, max(entry, 56)):
        kind, _, offset, _, _, length = struct.unpack_from("<IIQQQQ", table, at)
        if kind == _LOAD:
            ends.append(offset + length)
    if max(ends) <= size:
        return ""
    return f"{os.fspath(path)} was cut short: it has {size} of {max(ends)} bytes"


def require_whole(path: str | os.PathLike[str], fix: str) -> None:
    """Raises Problem, with `fix`, if the file at `path` was cut short."""
    from .errors import Problem

    what = cut_short(path)
    if what:
        raise Problem(what, fix)
