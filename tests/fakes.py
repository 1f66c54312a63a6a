"""Builds the fake libraries of tests/testdata: the tests of the runtime need plugins,
drivers and op libraries that behave badly on purpose, on a machine with no GPU.

Each is one file with no dependencies; `build` compiles it (a second) and returns its
path. A missing compiler fails the test.
"""

from __future__ import annotations

import functools
import pathlib
import shutil
import subprocess
import tempfile

_COMPILE = ["g++", "-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Werror"]
_COMPILE += ["-Wno-unused-function", "-Wno-unused-variable"]
_TESTDATA = pathlib.Path(__file__).parent / "testdata"


@functools.cache
def _folder() -> pathlib.Path:
    # Kept until the process ends: libraries in it stay loaded.
    return pathlib.Path(tempfile.mkdtemp(prefix="xla_ops_fakes_"))


@functools.cache
def build(name: str, **macros: object) -> pathlib.Path:
    """Compiles testdata/<name>.cc with `macros`; None as a value defines it empty."""
    defines = [
        f"-D{key}" if value is None else f"-D{key}={_literal(value)}"
        for key, value in sorted(macros.items())
    ]
    number = len(list(_folder().iterdir()))
    path = _folder() / f"{name}_{number}.so"
    subprocess.run(
        [*_COMPILE, *defines, str(_TESTDATA / f"{name}.cc"), "-o", str(path)],
        check=True,
    )
    return path


def _literal(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


def copy(path: pathlib.Path, destination: pathlib.Path) -> pathlib.Path:
    """Copies a library: the loader treats the copy as another, with its own state."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, destination)
    return destination
