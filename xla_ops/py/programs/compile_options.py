"""XLA's options for one program, where XLA_FLAGS are for all of a process.

torch_xla 2.9.0 hands none to the client. The bridge adds them to what it passes on
(xla_ops/cc/bridge). The CPU client, which has no bridge, takes none.

Tested by tests/programs/test_compile_options.py.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from .. import _runtime
from ..core import handlers, paths

Value = bool | int | float | str

# Numbers of fields in CompileOptionsProto, in an entry of its map, and in
# OptionOverrideProto, by type; the same in the plugins of JAX 0.7.2 to 0.11.2.
_OVERRIDES, _KEY, _VALUE = 7, 1, 2
_TEXT, _BOOL, _INT, _DOUBLE = 1, 2, 3, 4


def encode(options: Mapping[str, Value]) -> bytes:
    """A CompileOptionsProto that has the options, serialized; empty for none.

    Raises:
        TypeError: an option is neither a bool, an int, a float nor a text.
    """
    encoded = b""
    for name, value in sorted(options.items()):
        entry = _text(_KEY, name.encode()) + _text(_VALUE, _value(name, value))
        encoded += _text(_OVERRIDES, entry)
    return encoded


@contextmanager
def given(encoded: bytes) -> Iterator[None]:
    """Has what this thread compiles within be compiled with options of `encode`."""
    if not encoded or handlers.xla_platform() != handlers.CUDA:
        yield
        return
    bridge = paths.bridge_path()
    _runtime.set_compile_options(bridge, encoded)
    try:
        yield
    finally:
        _runtime.set_compile_options(bridge, b"")


def _value(name: str, value: Value) -> bytes:
    if isinstance(value, bool):
        return _key(_BOOL, 0) + _varint(value)
    if isinstance(value, int):
        return _key(_INT, 0) + _varint(value % 2**64)
    if isinstance(value, float):
        return _key(_DOUBLE, 1) + struct.pack("<d", value)
    if isinstance(value, str):
        return _text(_TEXT, value.encode())
    raise TypeError(
        f"replay: compile_options[{name!r}] must be a bool, an int, a float or a str,"
        f" got {value!r}"
    )


def _key(field: int, kind: int) -> bytes:
    return _varint(field << 3 | kind)


def _text(field: int, content: bytes) -> bytes:
    return _key(field, 2) + _varint(len(content)) + content


def _varint(number: int) -> bytes:
    encoded = b""
    while number > 0x7F:
        encoded += bytes([number & 0x7F | 0x80])
        number >>= 7
    return encoded + bytes([number])
