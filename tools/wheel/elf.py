"""Reads what a shared object needs at run time, for the wheel's platform tag.

Only the few parts of ELF64 little-endian that say which libraries and which
versions of their symbols are needed. Tested by tests/tools/test_wheel.py, which
compares the tag with auditwheel's.
"""

import dataclasses
import pathlib
import struct

_PT_LOAD, _PT_DYNAMIC = 1, 2
_DT_NEEDED, _DT_STRTAB = 1, 5
_DT_VERNEED, _DT_VERNEEDNUM = 0x6FFFFFFE, 0x6FFFFFFF


@dataclasses.dataclass(frozen=True)
class Needs:
    """What a shared object needs."""

    libraries: tuple[str, ...]  # "libc.so.6"
    versions: tuple[str, ...]  # "GLIBC_2.34"


def read_needs(path: pathlib.Path) -> Needs:
    """Reads the needs of the shared object at `path`.

    Raises:
        ValueError: it is not an x86-64 ELF file.
    """
    data = path.read_bytes()
    if data[:6] != b"\x7fELF\x02\x01" or data[18:20] != b"\x3e\x00":
        raise ValueError(f"{path} must be an x86-64 ELF file, got {data[:6]!r}")

    program_offset = struct.unpack_from("<Q", data, 32)[0]
    entry_size, entries = struct.unpack_from("<HH", data, 54)
    loads, dynamic = [], None
    for i in range(entries):
        kind, _, offset, address, _, size = struct.unpack_from(
            "<IIQQQQ", data, program_offset + i * entry_size
        )
        if kind == _PT_LOAD:
            loads.append((address, size, offset))
        elif kind == _PT_DYNAMIC:
            dynamic = (offset, size)
    if dynamic is None:
        return Needs((), ())

    def file_offset(address: int) -> int:
        for start, size, offset in loads:
            if start <= address < start + size:
                return address - start + offset
        raise ValueError(f"{path}: address {address:#x} lies outside the file")

    tags = [
        struct.unpack_from("<QQ", data, dynamic[0] + i)
        for i in range(0, dynamic[1], 16)
    ]
    single = dict(tags)
    strings = file_offset(single[_DT_STRTAB])

    def text(index: int) -> str:
        end = data.index(b"\0", strings + index)
        return data[strings + index : end].decode()

    libraries = [text(value) for tag, value in tags if tag == _DT_NEEDED]
    versions = []
    if _DT_VERNEED in single:
        # A list of libraries, each with a list of versions; links are relative.
        need = file_offset(single[_DT_VERNEED])
        for _ in range(single[_DT_VERNEEDNUM]):
            _, count, _, first, following = struct.unpack_from("<HHIII", data, need)
            version = need + first
            for _ in range(count):
                name, next_version = struct.unpack_from("<II", data, version + 8)
                versions.append(text(name))
                version += next_version
            need += following
    return Needs(tuple(sorted(libraries)), tuple(sorted(set(versions))))
