"""Where the shared objects of an installation lie."""

from __future__ import annotations

import pathlib

LIB = pathlib.Path(__file__).parent.parent / "lib"


def bridge_path() -> str:
    """Path of the bridge. Raises RuntimeError if the installation lacks it."""
    path = LIB / "libxla_ops_pjrt.so"
    if not path.exists():
        raise RuntimeError(f"xla_ops is installed without {path}: reinstall xla_ops")
    return str(path)
