"""Where the shared objects and headers of an installation lie."""

from __future__ import annotations

import pathlib

from . import elf
from .errors import Problem

LIB = pathlib.Path(__file__).parent.parent / "lib"
INCLUDE = pathlib.Path(__file__).parent.parent / "include"


def bridge_path() -> str:
    """Path of the bridge. Raises Problem if it is not there, or not whole."""
    path = LIB / "libxla_ops_pjrt.so"
    if not path.exists():
        raise Problem(f"xla_ops is installed without {path}", "reinstall xla_ops")
    elf.require_whole(path, "reinstall xla_ops")
    return str(path)
