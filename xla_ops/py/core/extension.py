"""Imports the extension module, _runtime, and says what is wrong where it cannot be.

One that was cut short would end the process and name nothing; of one that is not there,
or was built for another Python, Python says that there is no such module.

Tested by tests/gpu/test_entry_point.py.
"""

from __future__ import annotations

import importlib
import pathlib
from importlib.machinery import EXTENSION_SUFFIXES

from . import elf

_FOLDER = pathlib.Path(__file__).parents[1]
_NAME = f"{__package__.rpartition('.')[0]}._runtime"


def _import() -> None:
    for suffix in EXTENSION_SUFFIXES:
        path = _FOLDER / f"_runtime{suffix}"
        what = elf.unusable(path)
        if what:
            raise ImportError(f"xla_ops: {what}: reinstall xla_ops")
    try:
        importlib.import_module(_NAME)
    except ImportError as error:
        what = str(error)
        others = sorted(path.name for path in _FOLDER.glob("_runtime.*.so"))
        if isinstance(error, ModuleNotFoundError) and error.name == _NAME:
            what = f"{_FOLDER} holds no _runtime{EXTENSION_SUFFIXES[0]}"
            if others:
                what += f" for this Python, but {', '.join(others)}"
        raise ImportError(f"xla_ops: {what}: reinstall xla_ops") from error


_import()
