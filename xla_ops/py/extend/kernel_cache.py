"""Compiled kernels, kept in a folder by their content.

A kernel is asked for by a key, a digest of all that its code depends on: source,
options, architecture, compiler. What answers is a note, KEY.json, of the kernel's name
and parameters, and the code itself, a file named by its own digest. That name is also
what a program calls the code by, so the launcher finds it here in a process that has
not compiled it (xla_ops/cc/launch/code.h).

Files appear at once or not at all, so processes may share a folder. A file that does
not fit its name is compiled anew.

Tested by tests/extend/test_kernel_cache.py.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..core import files
from ..core.errors import warn_user

_FORMAT = 1
VARIABLE = "XLA_OPS_CACHE_DIR"


@dataclass(frozen=True)
class Code:
    """Machine code, and how to call one kernel of it.

    Attributes:
        image: cubin, or PTX that ends with a zero byte.
        kernel: the kernel's name in it.
        parameters: the PTX type of each of its parameters, such as "u64" or "f32";
            "b8[12]" for what is passed by its bytes.
        facts: what else the compiler said of it.
    """

    image: bytes
    kernel: str
    parameters: tuple[str, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def digest(self) -> str:
        return hashlib.sha256(self.image).hexdigest()


def folder() -> pathlib.Path | None:
    """Where kernels are kept; None where the environment names no place."""
    given = os.environ.get(VARIABLE, "")
    if given:
        return pathlib.Path(given, "kernels")
    for name, inner in (("XDG_CACHE_HOME", "xla_ops"), ("HOME", ".cache/xla_ops")):
        if os.environ.get(name, ""):
            return pathlib.Path(os.environ[name], inner, "kernels")
    return None


def key_of(*parts: object) -> str:
    """A digest of `parts`, of which each is written as Python shows it."""
    return hashlib.sha256(repr((_FORMAT, *parts)).encode()).hexdigest()


def load(key: str) -> Code | None:
    """What is kept under `key`; None where nothing whole is."""
    note = load_note(key)
    place = folder()
    if note is None or place is None:
        return None
    try:
        image = (place / f"{note['digest']}.cubin").read_bytes()
        code = Code(image, note["kernel"], tuple(note["parameters"]), note["facts"])
    except (OSError, KeyError, TypeError):
        return None
    return code if code.digest == note["digest"] else None


def store(key: str, code: Code) -> None:
    """Keeps `code` under `key`; says once where it cannot."""
    place = folder()
    if place is None:
        return
    if _write(place / f"{code.digest}.cubin", code.image):
        note = {
            "digest": code.digest,
            "kernel": code.kernel,
            "parameters": list(code.parameters),
            "facts": dict(code.facts),
        }
        store_note(key, note)


def load_note(key: str) -> dict[str, Any] | None:
    """The note that is kept under `key`; None where there is none that can be read."""
    place = folder()
    if place is None:
        return None
    try:
        note = json.loads((place / f"{key}.json").read_bytes())
    except (OSError, ValueError):
        return None
    return note if isinstance(note, dict) else None


def store_note(key: str, note: Mapping[str, Any]) -> None:
    place = folder()
    if place is not None:
        _write(place / f"{key}.json", json.dumps(note, sort_keys=True).encode())


def _write(path: pathlib.Path, data: bytes) -> bool:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_at_once(path, data)
    except OSError as error:
        _tell_unwritable(str(path.parent), str(error))
        return False
    return True


@functools.cache
def _tell_unwritable(place: str, error: str) -> None:
    warn_user(
        f"xla_ops.extend: kernels are compiled in every process, because {place} cannot"
        f" be written ({error}); {VARIABLE} may name another folder"
    )


def parameters_of(ptx: str, kernel: str) -> tuple[str, ...] | None:
    """The PTX type of each parameter of `kernel`; None where PTX has no such kernel."""
    entry = re.search(rf"\.entry\s+{re.escape(kernel)}\s*(?:\(([^)]*)\))?", ptx)
    if entry is None:
        return None
    return tuple(_type_of(text.split()) for text in _split(entry[1] or ""))


def _split(text: str) -> Sequence[str]:
    return [part for part in text.split(",") if part.strip()]


def _type_of(words: list[str]) -> str:
    """Of `.param .u64 .ptr .align 1 name` or `.param .align 4 .b8 name[12]`."""
    types = [w[1:] for w in words if re.fullmatch(r"\.[usfb]\d+", w)]
    array = re.search(r"\[\d+\]$", words[-1])
    return types[0] + (array[0] if array else "")
