"""Whether driver, GPUs and kernels go together (gpu/driver.py, gpu/check.py); a fake
(fakes.py) stands for the NVIDIA driver."""

from __future__ import annotations

import itertools
import pathlib

import pytest

import fakes
from xla_ops.gpu import check, cuda_libraries
from xla_ops.gpu import driver as cuda_driver

_numbers = itertools.count()


@pytest.fixture
def driver(monkeypatch):
    """Has gpu/driver.py load the fake driver; returns a function that configures it."""
    path = fakes.build("fake_cuda_driver")
    monkeypatch.setattr(cuda_driver, "_DRIVER_LIBRARY", str(path))

    # ctypes.CDLL sees the environment of C, which monkeypatch.setenv changes too.
    def configure(init=0, version=13000, devices="9.0"):
        monkeypatch.setenv("FAKE_CUDA_INIT", str(init))
        monkeypatch.setenv("FAKE_CUDA_VERSION", str(version))
        monkeypatch.setenv("FAKE_CUDA_DEVICES", devices)

    configure()
    return configure


@pytest.fixture
def kernels(monkeypatch, tmp_path):
    """Puts one CUDA op library with the given architectures in place of the wheel's."""

    def install(archs, version=12000):
        folder = tmp_path / "lib"
        # Targets of its own: each stays loaded, and no two may have the same.
        prefix = f"kernels{next(_numbers)}"
        ops = fakes.build(
            "fake_ops",
            PREFIX=prefix,
            PLATFORM="CUDA",
            ARCHS=archs,
            VERSION=version,
        )
        fakes.copy(ops, folder / "libxla_ops_fake_cuda.so")
        monkeypatch.setattr(check, "LIB", folder)

    return install


PLUGIN_12 = pathlib.Path("/x/jax_plugins/xla_cuda12/xla_cuda_plugin.so")
PLUGIN_13 = pathlib.Path("/x/jax_plugins/xla_cuda13/xla_cuda_plugin.so")


def test_driver_query(driver):
    driver(version=12080, devices="9.0,7.5")
    found = cuda_driver.query()
    assert found.cuda_version == (12, 8)
    assert [device.capability for device in found.devices] == [(9, 0), (7, 5)]
    assert [device.name for device in found.devices] == ["Fake GPU 0", "Fake GPU 1"]
    assert found.devices[0].memory_bytes == 80 << 30


def test_no_driver(monkeypatch):
    monkeypatch.setattr(cuda_driver, "_DRIVER_LIBRARY", "libno_such_driver.so.1")
    with pytest.raises(RuntimeError, match="no NVIDIA driver: .*install the NVIDIA"):
        check.check_machine(PLUGIN_13)


@pytest.mark.parametrize(
    "init, text",
    [
        (100, r"CUDA_ERROR_NO_DEVICE \(100\): no GPU is visible"),
        (999, r"error 999: check that the kernel module is loaded"),
        (803, "have different versions: reboot"),
        (5, "error 5: check that nvidia-smi works"),
    ],
)
def test_driver_that_cannot_start(driver, init, text):
    driver(init=init)
    with pytest.raises(cuda_driver.DriverError, match=text):
        check.check_machine(PLUGIN_13)


def test_driver_without_devices(driver):
    driver(devices="")
    with pytest.raises(cuda_driver.DriverError, match="shows no GPU"):
        check.check_machine(PLUGIN_13)


def test_driver_too_old_for_the_plugin(driver, kernels):
    kernels("9.0")
    driver(version=12080)
    with pytest.raises(
        RuntimeError,
        match=r"runs CUDA up to 12.8, and .* needs CUDA 13: update the driver, or pip"
        r" uninstall jax-cuda13-pjrt and install xla_ops\[cuda12\]$",
    ):
        check.check_machine(PLUGIN_13)
    check.check_machine(PLUGIN_12)
    driver(version=11080)  # for which no plugin can be had
    with pytest.raises(RuntimeError, match="needs CUDA 12: update the driver$"):
        check.check_machine(PLUGIN_12)


def test_driver_too_old_for_the_kernels(driver, kernels):
    kernels("9.0", version=13020)
    driver(version=12080)
    with pytest.raises(
        RuntimeError,
        match="runs CUDA up to 12.8, and the kernels of libxla_ops_fake_cuda.so were"
        " built with CUDA 13.2: update the driver",
    ):
        check.check_machine(PLUGIN_12)
    driver(version=13000)  # any driver of a major version runs its minor ones
    check.check_machine(PLUGIN_12)


def test_gpu_older_than_the_kernels(driver, kernels):
    kernels("8.0 9.0a")
    driver(devices="9.0,8.6")
    check.check_machine(PLUGIN_13)
    driver(devices="9.0,7.5")
    with pytest.raises(RuntimeError) as info:
        check.check_machine(PLUGIN_13)
    assert str(info.value).startswith(
        "GPU 1 (Fake GPU 1) has compute capability 7.5, and the kernels of"
        " libxla_ops_fake_cuda.so were built for 8.0 9.0a: build xla_ops with 7.5"
    )


def test_library_without_device_code_runs_anywhere(driver, kernels):
    kernels("", version=0)
    driver(devices="9.0,7.5")
    check.check_machine(PLUGIN_13)


def test_only_the_gpu_of_this_process_counts(driver, kernels, monkeypatch):
    kernels("9.0")
    driver(devices="9.0,7.5")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    check.check_machine(PLUGIN_13)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(RuntimeError, match="compute capability 7.5"):
        check.check_machine(PLUGIN_13)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(RuntimeError, match="is to use GPU 2, and 2 are visible"):
        check.check_machine(PLUGIN_13)


@pytest.mark.parametrize(
    "archs, runs, not_on",
    [
        ("8.0", ["8.0", "8.6", "8.9"], ["7.5", "9.0", "12.0"]),
        ("8.6", ["8.6", "8.9"], ["8.0"]),
        ("9.0a", ["9.0"], ["8.0", "10.0", "12.0"]),
        ("10.0", ["10.0", "10.3"], ["9.0", "12.0"]),
        ("10.0f", ["10.0", "10.3"], ["12.0"]),
        ("12.0+PTX", ["12.0", "12.1", "13.0"], ["10.0"]),
        ("7.5 8.0 9.0a 12.0+PTX", ["7.5", "8.9", "9.0", "12.0", "15.0"], ["10.0"]),
        ("7.5,8.0", ["7.5", "8.0"], ["7.0"]),
        ("", [], ["9.0"]),
    ],
)
def test_runs_on(archs, runs, not_on):
    for text, expected in [(t, True) for t in runs] + [(t, False) for t in not_on]:
        major, minor = map(int, text.split("."))
        assert check.runs_on(archs, (major, minor)) is expected, text


def test_malformed_architecture_raises():
    with pytest.raises(ValueError, match="malformed architecture 'sm_90'"):
        check.runs_on("8.0 sm_90", (9, 0))


@pytest.mark.parametrize("cuda", [12, 13])
@pytest.mark.parametrize("part", cuda_libraries.PARTS, ids=lambda part: part.name)
def test_broken_files_of_cuda(tmp_path, part, cuda):
    """Each of which a program would have found at the end of its process, or not."""
    plugin = tmp_path / f"jax_plugins/xla_cuda{cuda}/xla_cuda_plugin.so"
    file = tmp_path / "nvidia" / part.places[cuda].path
    library = fakes.build("fake_ops").read_bytes()
    whole = b"BC\xc0\xde and more" if part.name == "libdevice" else library
    assert check.broken_cuda_files(plugin) is None
    fakes.copy(fakes.build("fake_ops"), file)
    file.write_bytes(whole)
    assert check.broken_cuda_files(plugin) is None
    kind = {"ptxas": "program", "libdevice": "LLVM bitcode"}
    pointer = b"version https://git-lfs.github.com/spec/v1"
    contents = {
        f"{file} is empty": b"",
        f"{file} is no {kind.get(part.name, 'shared object')}": pointer,
    }
    if whole is library:
        total = len(library)
        cut = f"{file} was cut short: it has 9000 of {total} bytes"
        contents[cut] = library[:9000]
    for what, data in contents.items():
        file.write_bytes(data)
        found = check.broken_cuda_files(plugin)
        assert found.what == what
        assert found.fix.startswith("pip install --force-reinstall --no-deps ")
        assert part.places[cuda].wheel in found.fix


def test_broken_files_of_one_wheel_are_brought_once(tmp_path):
    for name in ("libcublas.so.13", "libcublasLt.so.13"):
        file = tmp_path / "nvidia/cu13/lib" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    found = check.broken_cuda_files(tmp_path / "jax_plugins/xla_cuda13/plugin.so")
    assert found.what.count(" is empty") == 2 and found.fix.count("cublas") == 1
    # Of a plugin from elsewhere nothing is known.
    assert check.broken_cuda_files(tmp_path / "plugin.so") is None
