"""Builds and loads testdata/fake_torch_ops.cc against the installed torch."""

from __future__ import annotations

import functools
import pathlib
import subprocess
import tempfile

import torch

_SOURCE = pathlib.Path(__file__).parents[1] / "testdata" / "fake_torch_ops.cc"


@functools.cache
def load() -> str:
    """Defines the operators of torch.ops.fake_torch_ops; returns their namespace."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="xla_ops_torch_ops_"))
    path = folder / "fake_torch_ops.so"
    torch_folder = pathlib.Path(torch.__file__).parent
    command = ["g++", "-std=c++17", "-O0", "-fPIC", "-shared", str(_SOURCE)]
    command += ["-isystem", str(torch_folder / "include"), "-o", str(path)]
    command += [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"]
    subprocess.run(command, check=True)
    torch.ops.load_library(path)
    return "fake_torch_ops"
