"""examples/extension: built outside this tree against the wheel's headers, its tests
pass. The compiler and CMake are called as the example's README says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest

import example
import xla_ops


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A copy of the example, with its CPU library."""
    return example.built(tmp_path_factory.mktemp("outside") / "extension")


def run(folder, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(folder), os.environ["PYTHONPATH"]])
    return subprocess.run(
        [sys.executable, *arguments],
        check=False,
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path, "XLA_OPS_STRICT": "1"},
    )


def test_its_own_tests_pass(folder):
    result = run(folder, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"^\d\d passed", result.stdout, re.MULTILINE), result.stdout


def test_cmake_builds_it(tmp_path):
    """By the README's words, but for the Python that is asked for the headers."""
    folder = example.copy(tmp_path / "extension")
    python = f"-DPython3_EXECUTABLE={sys.executable}"
    for words in (
        ["-B", "build", python],
        ["--build", "build"],
        ["--install", "build", "--prefix", "."],
    ):
        result = run(folder, "-m", "cmake", *words)
        assert result.returncode == 0, result.stdout + result.stderr
    assert (folder / "mine" / "libmine_cpu.so").is_file()
    result = run(folder, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"^\d\d passed", result.stdout, re.MULTILINE), result.stdout


def test_handlers_check_their_operands_themselves(folder):
    """A program may come from elsewhere than the package."""
    code = """
import torch, mine
from xla_ops import _runtime
x, scale, out = torch.ones(4, 2), torch.ones(3), torch.empty(4, 2)
buffer = lambda t: (t.data_ptr(), 11, tuple(t.shape))
args = [buffer(x), buffer(scale)]
_runtime.call("mine.scale_rows", "Host", 0, args, [buffer(out)], {})
"""
    result = run(folder, "-c", code)
    assert "scale_rows: scale must have shape [4], got [3]" in result.stderr


def test_all_ways_to_build_name_the_same_files_and_options(folder):
    readme = (folder / "README.md").read_text()
    cmake = (folder / "CMakeLists.txt").read_text()
    bazel = (folder / "BUILD.bazel").read_text()
    assert " ".join(example.COMPILE) in re.sub(r"\s*\\\s*", " ", readme)
    assert " ".join(example.SOURCES) in readme
    assert f"op_library(mine_cpu {' '.join(example.SOURCES)})" in cmake
    for source in example.SOURCES:
        assert f'"{source}"' in bazel
    for option in ("-fno-math-errno", "-fvisibility=hidden", "-std=c++17"):
        assert f'"{option}"' in bazel


def test_tables_of_libraries_stay_apart_however_they_are_compiled(folder, tmp_path):
    """Without -fvisibility=hidden the loader shares what is inline and static."""
    options = [option for option in example.COMPILE if "visibility" not in option]
    libraries = []
    for prefix in ("left.", "right."):
        path = tmp_path / f"lib{prefix}so"
        header = (folder / "scale_rows.h").read_text()
        source = tmp_path / prefix
        source.mkdir()
        for file in folder.glob("scale_rows*"):
            shutil.copy(file, source)
        (source / "scale_rows.h").write_text(header.replace('"mine."', f'"{prefix}"'))
        command = [
            *options,
            f"-isystem{xla_ops.include_dir()}",
            *example.SOURCES,
            "-o",
            str(path),
        ]
        subprocess.run(command, check=True, cwd=source)
        libraries.append(str(path))
    code = f"""
from xla_ops.extend import register_library
for path in {libraries}:
    print(sorted(register_library(path)["Host"]))
"""
    result = run(tmp_path, "-c", code)
    assert result.stdout.splitlines() == ["['left.scale_rows']", "['right.scale_rows']"]
