"""The extras bring all that XLA's CUDA plugin opens, beside torch and what it pins."""

import importlib
import pathlib
import re
import zipfile
from importlib import metadata as installed

import pytest
from packaging.requirements import Requirement

TOOL = pathlib.Path(__file__).resolve().parents[2] / "tools" / "wheel"


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOL))
    return importlib.import_module("cuda_libraries")


@pytest.fixture(params=[12, 13])
def cuda(request):
    return request.param


def extra(name: int | str) -> dict[str, Requirement]:
    """What an extra asks for, by name; of the installed metadata. 12 is cuda12."""
    name = f"cuda{name}" if isinstance(name, int) else name
    found = {}
    for text in installed.requires("xla_ops") or ():
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is not None and marker.evaluate({"extra": name}):
            found[requirement.name] = requirement
    return found


def test_extra_holds_the_plugin_and_every_wheel_that_it_needs(tool, cuda):
    others = {f"jax-cuda{cuda}-pjrt", "cuda-bindings"}
    assert set(extra(cuda)) == tool.wheels(cuda) | others


def test_extra_is_bounded_on_both_sides(cuda):
    for requirement in extra(cuda).values():
        operators = {specifier.operator for specifier in requirement.specifier}
        assert operators == {">=", "<"}, requirement


def test_extra_of_jax_goes_from_the_oldest_to_the_newest_that_is_tested():
    lock = pathlib.Path("third_party/requirements.lock").read_text()
    pins = re.findall(r"^jax==(\S+)", lock, re.MULTILINE)
    assert len(set(pins)) >= 2
    jax = extra("jax").pop("jax").specifier
    assert [version for version in pins if version not in jax] == []
    assert "0.7.0" not in jax


def test_extra_accepts_what_torch_pins(cuda):
    """torch's wheel is a build for CUDA 12 and names its libraries by exact version."""
    pins = {}
    for text in installed.requires("torch") or ():
        requirement = Requirement(text)
        if requirement.name.startswith("nvidia-"):
            (pin,) = requirement.specifier
            pins[requirement.name] = pin.version
    assert len(pins) > 10
    asked = extra(cuda)
    for name in asked.keys() & pins.keys():
        assert asked[name].specifier.contains(pins[name]), (asked[name], pins[name])
    # All but these are there already, with CUDA 12.
    if cuda == 12:
        assert asked.keys() - pins.keys() == {
            "cuda-bindings",
            "jax-cuda12-pjrt",
            "nvidia-cuda-nvcc-cu12",
        }


def plugin(cuda: int, *names: str) -> bytes:
    """As much of a plugin as the tool reads."""
    folder = {12: "../nvidia/cuda_nvcc", 13: "../nvidia/cu13"}[cuda]
    symbols = [f"_ZN3tsl8internal10DsoLoader{len(n)}Get{n}DsoHandleEv" for n in names]
    return b"\x7fELF\0" + "\0".join([folder, "ptxas", *symbols, ""]).encode()


def test_tool_names_the_wheel_of_each_library(tool, tmp_path, capsys):
    path = tmp_path / "xla_cuda_plugin.so"
    path.write_bytes(plugin(13, "CublasLt", "CudaDriver"))
    assert tool.main([str(path)]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert lines[1:] == [
        ["CublasLt", "nvidia-cublas"],
        ["CudaDriver", "the driver"],
        ["ptxas", "nvidia-cuda-nvcc"],
    ]


def test_tool_reads_wheels_and_fails_for_an_unknown_library(tool, tmp_path, capsys):
    path = tmp_path / "jax_cuda12_pjrt-0.99.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        name = "jax_plugins/xla_cuda12/xla_cuda_plugin.so"
        archive.writestr(name, plugin(12, "Cublas", "CuTomorrow"))
    assert tool.main([str(path)]) == 1
    shown = capsys.readouterr().out.splitlines()
    assert shown[1].split() == ["CuTomorrow", "unknown"]
    assert shown[2].split() == ["Cublas", "nvidia-cublas-cu12"]


def test_tool_refuses_other_files(tool, tmp_path, capsys):
    path = tmp_path / "other.so"
    path.write_bytes(b"\x7fELF")
    assert tool.main([str(path)]) == 1
    assert "must be XLA's CUDA plugin, got" in capsys.readouterr().err
