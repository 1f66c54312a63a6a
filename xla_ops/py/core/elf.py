"""Tells a shared object that cannot be loaded here from others, before it is loaded.

The loader maps a file without looking at its size, and the process dies (SIGBUS) where
it touches what is not there: a disk that was full, or a copy that broke off, would end
the program and name nothing. Opening a pipe would wait for ever. And of a file for
another machine the loader says that there is none.

It stands alone: the entry point, xla_ops_pjrt, loads it by its path where the package
cannot be imported.

Tested by tests/core/test_elf.py.
"""

from __future__ import annotations

import functools
import os
import stat
import struct

_LOAD = 1  # PT_LOAD
_MACHINES = {3: "i386", 62: "x86_64", 183: "aarch64"}


def unusable(path: str | os.PathLike[str]) -> str:
    """Says why the 64-bit ELF file at `path` must not be loaded; "" if it may be.

    What else may be wrong with a file, missing or no library at all, the loader says.
    """
    name = os.fspath(path)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return f"{name} is no file"
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(64)
            if len(head) < 64 or head[:6] != b"\x7fELF\x02\x01":
                return ""
            (machine,) = struct.unpack_from("<H", head, 18)
            programs, sections = struct.unpack_from("<QQ", head, 32)
            _, entry, count, section, number = struct.unpack_from("<5H", head, 52)
            ends = [programs + entry * count, sections + section * number]
            table = b""
            if ends[0] <= size:
                file.seek(programs)
                table = file.read(entry * count)
    except OSError:
        return ""
    if machine != (_own_machine() or machine):
        return f"{name} is for {_MACHINES.get(machine, f'machine {machine}')} alone"
    for at in range(0, len(table) - 55, max(entry, 56)):
        kind, _, offset, _, _, length = struct.unpack_from("<IIQQQQ", table, at)
        if kind == _LOAD:
            ends.append(offset + length)
    if max(ends) <= size:
        return ""
    return f"{name} was cut short: it has {size} of {max(ends)} bytes"


@functools.cache
def _own_machine() -> int | None:
    """What this process runs on, as ELF numbers it; None where nothing tells."""
    try:
        with open("/proc/self/exe", "rb") as file:
            return int(struct.unpack_from("<H", file.read(20), 18)[0])
    except (OSError, struct.error):
        return None


def require_usable(path: str | os.PathLike[str], fix: str) -> None:
    """Raises Problem, with `fix`, if the file at `path` must not be loaded."""
    from .errors import Problem

    what = unusable(path)
    if what:
        raise Problem(what, fix)
