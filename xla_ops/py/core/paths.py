"""Where the shared objects and headers of an installation lie."""

from __future__ import annotations

import os
import pathlib

from . import elf
from .errors import Problem

LIB = pathlib.Path(__file__).parent.parent / "lib"
INCLUDE = pathlib.Path(__file__).parent.parent / "include"


def bridge_path() -> str:
    """Path of the bridge. Raises Problem if it is not there, or not whole."""
    return _usable(LIB / "libxla_ops_pjrt.so")


def op_library(op: str, suffix: str) -> str:
    """Path of an op's library, to ask or to load; `suffix` "cpu" or "cuda".

    Raises Problem if it is not there, or not whole: loading it would end the process.
    """
    return _usable(LIB / f"libxla_ops_{op}_{suffix}.so")


def no_libraries(suffix: str) -> str:
    """How to say that there are none: where, and why where the folder is the cause."""
    text = f"no op libraries libxla_ops_*_{suffix}.so in {LIB}"
    try:
        os.listdir(LIB)
    except OSError as error:
        text += f" ({error.strerror})"
    return text


def _usable(path: pathlib.Path) -> str:
    if not path.exists():
        raise Problem(f"xla_ops is installed without {path}", "reinstall xla_ops")
    elf.require_usable(path, "reinstall xla_ops")
    return str(path)
