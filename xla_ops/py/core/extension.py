"""Looks at the extension module, _runtime, before it is imported.

One that was cut short would end the process and name nothing.

Tested by tests/gpu/test_entry_point.py.
"""

from __future__ import annotations

import pathlib
from importlib.machinery import EXTENSION_SUFFIXES

from . import elf


def _require_whole() -> None:
    for suffix in EXTENSION_SUFFIXES:
        path = pathlib.Path(__file__).parents[1] / f"_runtime{suffix}"
        what = elf.cut_short(path)
        if what:
            raise ImportError(f"xla_ops: {what}: reinstall xla_ops")


_require_whole()
