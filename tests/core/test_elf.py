"""core/elf.py: which files were cut short."""

from __future__ import annotations

import pathlib

import _XLAC
import pytest

import fakes
from xla_ops import _runtime
from xla_ops.core import elf
from xla_ops.core.errors import Problem


@pytest.mark.parametrize("path", [_XLAC.__file__, _runtime.__file__])
def test_whole_libraries_pass(path):
    elf.require_whole(path, "do it again")


def test_every_cut_is_seen(tmp_path):
    data = fakes.build("fake_ops").read_bytes()
    path = tmp_path / "cut.so"
    for size in (64, 100, 1000, 4096, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(Problem) as info:
            elf.require_whole(path, "do it again")
        assert f"{path} was cut short: it has {size} of " in info.value.what
        assert info.value.fix == "do it again"


@pytest.mark.parametrize("data", [b"", b"text", b"\x7fELF\x01\x01" + bytes(100)])
def test_what_is_no_library_is_left_to_the_loader(tmp_path, data):
    path = tmp_path / "other.so"
    path.write_bytes(data)
    elf.require_whole(path, "")
    elf.require_whole(tmp_path / "none.so", "")
    elf.require_whole(pathlib.Path("/"), "")
