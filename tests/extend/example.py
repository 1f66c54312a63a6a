"""examples/extension, built outside this tree, for tests."""

from __future__ import annotations

import pathlib
import shutil
import subprocess

import xla_ops

_EXAMPLE = pathlib.Path(__file__).resolve().parents[2] / "examples" / "extension"
COMPILE = ["g++", "-shared", "-fPIC", "-O3", "-std=c++17", "-fno-math-errno"]
COMPILE += ["-fvisibility=hidden", "-I."]
SOURCES = ["scale_rows.cc", "scale_rows_cpu.cc"]


def copy(folder: pathlib.Path) -> pathlib.Path:
    shutil.copytree(_EXAMPLE, folder, ignore=shutil.ignore_patterns("*.so", "build"))
    return folder


def built(folder: pathlib.Path) -> pathlib.Path:
    """A copy with its CPU library, by the compiler's words of the README."""
    copy(folder)
    include = f"-isystem{xla_ops.include_dir()}"
    command = [*COMPILE, include, *SOURCES, "-o", "mine/libmine_cpu.so"]
    subprocess.run(command, check=True, cwd=folder)
    return folder
