"""core/elf.py: which files were cut short."""

from __future__ import annotations

import os

import _XLAC
import pytest

import fakes
from xla_ops import _runtime
from xla_ops.core import elf
from xla_ops.core.errors import Problem


@pytest.mark.parametrize("path", [_XLAC.__file__, _runtime.__file__])
def test_whole_libraries_pass(path):
    elf.require_usable(path, "do it again")


def test_every_cut_is_seen(tmp_path):
    data = fakes.build("fake_ops").read_bytes()
    path = tmp_path / "cut.so"
    for size in (64, 100, 1000, 4096, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(Problem) as info:
            elf.require_usable(path, "do it again")
        assert f"{path} was cut short: it has {size} of " in info.value.what
        assert info.value.fix == "do it again"


@pytest.mark.parametrize("data", [b"", b"text", b"\x7fELF\x01\x01" + bytes(100)])
def test_what_is_no_library_is_left_to_the_loader(tmp_path, data):
    path = tmp_path / "other.so"
    path.write_bytes(data)
    elf.require_usable(path, "")
    elf.require_usable(tmp_path / "none.so", "")


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_no_file_is_not_opened(tmp_path, make):
    make(tmp_path / "lib.so")
    with pytest.raises(Problem, match="lib.so is no file: do it again"):
        elf.require_usable(tmp_path / "lib.so", "do it again")


@pytest.mark.parametrize("machine, name", [(183, "aarch64"), (3, "i386"), (243, "243")])
def test_another_machines_is_named(tmp_path, machine, name):
    """The loader says of it that there is no such file."""
    data = bytearray(fakes.build("fake_ops").read_bytes())
    data[18:20] = machine.to_bytes(2, "little")
    (tmp_path / "lib.so").write_bytes(data)
    assert f" {name} alone" in elf.unusable(tmp_path / "lib.so")


@pytest.mark.parametrize("at", [32, 40])
@pytest.mark.parametrize("value", [2**62, 2**63, 2**64 - 1])
def test_a_header_of_nonsense_is_a_cut(tmp_path, at, value):
    data = bytearray(fakes.build("fake_ops").read_bytes())
    data[at : at + 8] = value.to_bytes(8, "little")
    (tmp_path / "lib.so").write_bytes(data)
    assert "was cut short: it has " in elf.unusable(tmp_path / "lib.so")
