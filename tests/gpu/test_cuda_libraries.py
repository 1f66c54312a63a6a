"""What of CUDA is missing, and what brings it (gpu/cuda_libraries.py)."""

from __future__ import annotations

import ctypes
import pathlib

import pytest

from xla_ops.gpu import cuda_libraries

ALL = cuda_libraries.PARTS
BY_NAME = {part.name: part for part in ALL}


@pytest.fixture(params=[12, 13])
def cuda(request):
    return request.param


class Machine:
    """A folder of wheels with a plugin in it; nothing else is on the machine."""

    def __init__(self, site: pathlib.Path, cuda: int):
        self.site = site
        self.cuda = cuda
        self.plugin = site / "jax_plugins" / f"xla_cuda{cuda}" / "xla_cuda_plugin.so"
        self.environ = {"PATH": str(site / "no_such_bin")}
        self.write(self.plugin, b"stripped of its symbols")

    def write(self, path: pathlib.Path, data: bytes = b"") -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        path.chmod(0o755)

    def install(self, part: cuda_libraries.Part, folder: str = ".") -> None:
        place = part.places[self.cuda]
        self.write(self.site / folder / "nvidia" / place.path)

    @property
    def missing(self) -> list[str]:
        found = cuda_libraries.missing(self.plugin, self.cuda, self.environ)
        return [part.name for part in found]


@pytest.fixture
def machine(tmp_path, cuda, monkeypatch):
    def load(name):
        raise OSError(f"{name}: cannot open shared object file")

    # The loader finds nothing, and there is no toolkit in /usr/local or /opt.
    monkeypatch.setattr(ctypes, "CDLL", load)
    roots = cuda_libraries._roots

    def here(*args):
        return [r for r in roots(*args) if not r.is_relative_to("/usr")]

    monkeypatch.setattr(cuda_libraries, "_roots", here)
    return Machine(tmp_path, cuda)


def test_every_part_is_missing_then_found(machine):
    assert machine.missing == list(BY_NAME)
    for part in ALL:
        assert part.name in machine.missing
        machine.install(part)
        assert part.name not in machine.missing
    assert machine.missing == []


def test_wheels_may_lie_beside_the_plugins_folder_too(machine):
    machine.install(BY_NAME["cuBLAS"], "jax_plugins")
    machine.install(BY_NAME["ptxas"], "jax_plugins")
    assert {"cuBLAS", "ptxas"}.isdisjoint(machine.missing)


def test_the_other_cudas_wheels_are_no_help(machine):
    other = 25 - machine.cuda
    for part in ALL:
        machine.write(machine.site / "nvidia" / part.places[other].path)
    shared = {"cuDNN", "NCCL", "NVSHMEM"}  # the same files in both
    assert set(machine.missing) == set(BY_NAME) - shared


def test_what_the_loader_finds_is_found(machine, monkeypatch):
    names = []
    monkeypatch.setattr(ctypes, "CDLL", names.append)
    assert machine.missing == ["ptxas", "libdevice"]
    soname = {12: "libcublas.so.12", 13: "libcublas.so.13"}[machine.cuda]
    assert soname in names


def test_toolkit_of_the_flag_and_of_path(machine, tmp_path):
    toolkit = tmp_path / "toolkit"
    machine.write(toolkit / "bin" / "ptxas")
    flag = f"--xla_a=1 --xla_gpu_cuda_data_dir={toolkit} --xla_b=2"
    machine.environ["XLA_FLAGS"] = flag
    assert "ptxas" not in machine.missing and "libdevice" in machine.missing
    # XLA takes the first folder that there is, and no other where that has no file.
    (toolkit / "nvvm" / "libdevice").mkdir(parents=True)
    machine.install(BY_NAME["libdevice"])
    assert "libdevice" in machine.missing
    machine.write(toolkit / "nvvm" / "libdevice" / "libdevice.10.bc")
    assert "libdevice" not in machine.missing

    del machine.environ["XLA_FLAGS"]
    assert "ptxas" in machine.missing
    machine.environ["PATH"] = f"/no/such:{toolkit / 'bin'}"
    assert "ptxas" not in machine.missing
    (toolkit / "bin" / "ptxas").chmod(0o644)
    assert "ptxas" in machine.missing


def test_only_what_the_plugin_opens_can_be_missing(machine):
    symbols = [
        f"_ZN3tsl8internal10DsoLoader{len(n) + 12}Get{n}DsoHandleEv\0"
        for n in ("Cublas", "CudaDriver", "Cudnn")
    ]
    machine.write(machine.plugin, "".join(symbols).encode())
    assert machine.missing == ["ptxas", "libdevice", "cuBLAS", "cuDNN", "NVRTC"]


def test_an_empty_plugin_is_no_error(machine):
    machine.write(machine.plugin)
    assert machine.missing == list(BY_NAME)


def test_pip_line_names_each_wheel_once_within_the_extras_bounds(cuda):
    parts = [BY_NAME[name] for name in ("cuBLAS", "cuBLASLt", "cuDNN")]
    line = cuda_libraries.pip_line(parts, cuda)
    command, *wheels = line.replace("'", "").split(" ")[1:]
    assert line.startswith("pip install ") and command == "install"
    names = {
        12: ["nvidia-cublas-cu12", "nvidia-cudnn-cu12"],
        13: ["nvidia-cublas", "nvidia-cudnn-cu13"],
    }[cuda]
    assert [w.split(">")[0].split("<")[0] for w in wheels] == names
    assert all(">=" in w and "<" in w for w in wheels), line


def test_pip_line_without_metadata(monkeypatch, cuda):
    def no_metadata(name):
        raise cuda_libraries.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(cuda_libraries.importlib.metadata, "requires", no_metadata)
    line = cuda_libraries.pip_line([BY_NAME["NCCL"]], cuda)
    assert line == f"pip install nvidia-nccl-cu{cuda}"
