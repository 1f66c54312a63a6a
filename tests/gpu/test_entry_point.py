"""xla_ops_pjrt, by which torch_xla finds the GPU: through torch_xla itself, each time
in a process of its own."""

from __future__ import annotations

import os
import pathlib
import shutil
import socket
import subprocess
import sys

import pytest

import fakes
from installation import Installation
from xla_ops.gpu import discover

USE_DEVICE = """
import torch, torch_xla
for _ in range(2):
    try:
        torch.ones(2, device="xla") + 1
    except RuntimeError as error:
        print("ERROR:", str(error).replace(chr(10), " "))
print("alive")
"""


def errors_of(done) -> str:
    """The error of each of two uses of the device, which must be the same."""
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines[-1] == "alive", (done.stdout, done.stderr)
    errors = [line for line in lines if line.startswith("ERROR: ")]
    assert len(errors) == 2 and errors[0] == errors[1], done.stdout
    return errors[0].removeprefix("ERROR: ")


def with_fake_driver(tmp_path, device, path, **environ) -> dict[str, str]:
    """The environment of a machine with a GPU, which the fake driver shows."""
    driver_folder = tmp_path / "driver"
    fakes.copy(fakes.build("fake_cuda_driver"), driver_folder / "libcuda.so.1")
    search = os.environ.get("LD_LIBRARY_PATH")
    return {
        "PJRT_DEVICE": device,
        "FAKE_CUDA_DEVICES": "9.0",
        "LD_LIBRARY_PATH": ":".join(filter(None, [str(driver_folder), search])),
        discover.PLUGIN_VARIABLE: str(path),
        **environ,
    }


def use_device(tmp_path, device, path, **environ):
    """Uses the device twice in a new process with a fake driver; returns the error."""
    done = subprocess.run(
        [sys.executable, "-c", USE_DEVICE],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, **with_fake_driver(tmp_path, device, path, **environ)},
    )
    return errors_of(done)


def test_options_reach_a_newer_plugin_through_torch_xla(tmp_path):
    error = use_device(
        tmp_path,
        "GPU",
        fakes.build("fake_pjrt_plugin"),
        PJRT_ALLOCATOR_FRACTION="0.5",
        PJRT_ALLOCATOR_PREALLOCATE="0",
        PJRT_ALLOCATOR_CUDA_ASYNC="1",
    )
    assert "fake plugin: no devices" in error
    options = error.split("options: ")[1].split(";")[0].split()
    assert sorted(options) == [
        "allocator=cuda_async",
        "memory_fraction=0.500000",
        "platform_name=gpu",
        "preallocate=false",
    ]


@pytest.mark.parametrize(
    "macros, environ, text",
    [
        ({"MAJOR": 1}, {}, "torch_xla needs major version 0: install xla_ops[cuda13]"),
        ({}, {"FAKE_CUDA_INIT": "100"}, "no GPU is visible: check nvidia-smi"),
        ({}, {"PJRT_ALLOCATOR_FRACTION": "3"}, "PJRT_ALLOCATOR_FRACTION must be"),
        ({}, {"XLA_OPS_JOIN_TIMEOUT_S": "0"}, "XLA_OPS_JOIN_TIMEOUT_S must be"),
    ],
)
def test_error_is_torch_xlas_and_the_process_goes_on(tmp_path, macros, environ, text):
    path = fakes.build("fake_pjrt_plugin", **macros)
    assert text in use_device(tmp_path, "CUDA", path, **environ)


def test_a_rank_whose_others_never_come_ends(tmp_path):
    """torch_xla waits for them with the GIL held."""
    environ = with_fake_driver(
        tmp_path,
        "GPU",
        fakes.build("fake_pjrt_plugin"),
        WORLD_SIZE="2",
        RANK="0",
        LOCAL_WORLD_SIZE="1",
        TORCHELASTIC_RUN_ID="none",
        MASTER_ADDR="127.0.0.1",
        XLA_COORDINATOR_PORT=free_port(),
        XLA_OPS_JOIN_TIMEOUT_S="2",
    )
    done = subprocess.run(
        [sys.executable, "-c", "import torch_xla; torch_xla.device(); print('alive')"],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environ},
    )
    assert done.returncode == 1 and not done.stdout
    assert "rank 0 has waited 2 s for rank 1 at 127.0.0.1:" in done.stderr


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


def test_a_device_in_small_letters_is_told_its_name(tmp_path):
    error = use_device(tmp_path, "cuda", fakes.build("fake_pjrt_plugin"))
    what = "PJRT_DEVICE must be in capitals, got 'cuda': set PJRT_DEVICE=CUDA"
    assert error == what


def test_import_of_torch_xla_registers_both_names_and_looks_at_nothing():
    code = (
        "import sys, torch_xla\n"
        "from torch_xla.experimental import plugins\n"
        "from xla_ops_pjrt import GpuPlugin\n"
        "for name in ('GPU', 'CUDA'):\n"
        "    assert type(plugins._plugin_registry[name]) is GpuPlugin\n"
        "assert 'xla_ops' not in sys.modules\n"
        "maps = open('/proc/self/maps').read()\n"
        "assert 'libxla_ops_' not in maps and 'libcuda.so' not in maps\n"
        "import torch\n"
        "print((torch.ones(2, device='xla') + 1).sum().item())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "PJRT_DEVICE": "CPU",
            # Would raise if anything looked.
            discover.PLUGIN_VARIABLE: "/no/such.so",
            "PJRT_ALLOCATOR_FRACTION": "7",
        },
    )
    assert done.stdout.strip() == "4.0"


# ------------------------------------------------------------ broken installations


@pytest.fixture
def installation(tmp_path) -> Installation:
    return Installation(tmp_path / "site")


def without_runtime(installation):
    for path in installation.package.glob("_runtime*.so"):
        path.unlink()


def with_a_cut_runtime(installation):
    for path in installation.package.glob("_runtime*.so"):
        path.write_bytes(path.read_bytes()[:5000])


def without_bridge(installation):
    (installation.lib / "libxla_ops_pjrt.so").unlink()


def with_a_cut_bridge(installation):
    path = installation.lib / "libxla_ops_pjrt.so"
    path.write_bytes(path.read_bytes()[:9000])


def with_a_cut_op_library(installation):
    data = fakes.build("fake_ops", PREFIX="cut", PLATFORM="CUDA").read_bytes()
    (installation.lib / "libxla_ops_cut_cuda.so").write_bytes(data[:9000])


def with_a_syntax_error(installation):
    (installation.package / "gpu" / "options.py").write_text("def options(:\n")


def with_a_long_error(installation):
    without_bridge(installation)
    text = "raise ImportError('a/b\\n' * 3000 + 'the end')"
    (installation.package / "gpu" / "options.py").write_text(text)


def without_anything(installation):
    shutil.rmtree(installation.package)


REINSTALL = "reinstall xla_ops, or run on the CPU with PJRT_DEVICE=CPU"
BROKEN = {
    without_runtime: f".so: reinstall xla_ops): {REINSTALL}",
    with_a_cut_runtime: ".so was cut short: it has 5000 of ",
    without_bridge: "libxla_ops_pjrt.so: reinstall xla_ops",
    with_a_cut_bridge: "libxla_ops_pjrt.so was cut short: it has 9000 of ",
    with_a_cut_op_library: "libxla_ops_cut_cuda.so was cut short: it has 9000 of ",
    with_a_syntax_error: "xla_ops cannot be imported (SyntaxError: invalid syntax"
    f" (options.py, line 1)): {REINSTALL}",
    with_a_long_error: f"a/b a/b the end): {REINSTALL}",
    without_anything: "xla_ops cannot be imported (ModuleNotFoundError:",
}


@pytest.mark.parametrize("harm", BROKEN, ids=lambda harm: harm.__name__)
def test_a_gpu_client_of_a_broken_installation_fails_with_the_cause(
    installation, tmp_path, harm
):
    harm(installation)
    plugin = fakes.build("fake_pjrt_plugin")
    # Where the tests run on an installed wheel, that one would be found instead.
    gone = "import sys; sys.modules['xla_ops'] = None\n"
    code = (gone if harm is without_anything else "") + USE_DEVICE
    done = installation.run("-c", code, **with_fake_driver(tmp_path, "GPU", plugin))
    error = errors_of(done)
    assert BROKEN[harm] in error
    if harm in (with_a_cut_op_library, with_a_syntax_error):
        # Through the bridge: the reason and nothing else.
        assert error.count("xla_ops") <= 4 and "Failed to open" not in error


def of_another_python(path):
    path.rename(path.with_name("_runtime.cpython-27-x86_64-linux-gnu.so"))


def of_zeros(path):
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize(
    "harm, what",
    [
        (pathlib.Path.unlink, "holds no _runtime.cpython-"),
        (of_another_python, "for this Python, but _runtime.cpython-27-"),
        (of_zeros, "invalid ELF header"),
    ],
)
def test_an_extension_that_cannot_be_imported_is_named(installation, harm, what):
    (path,) = installation.package.glob("_runtime*.so")
    harm(path)
    done = installation.run("-c", "import xla_ops")
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and what in last
    assert last.startswith("ImportError: xla_ops: ")
    assert str(installation.package) in last and last.endswith(": reinstall xla_ops")


def test_a_cut_extension_does_not_end_the_process(installation):
    with_a_cut_runtime(installation)
    for arguments in (("-c", "import xla_ops"), ("-m", "xla_ops", "doctor")):
        done = installation.run(*arguments)
        assert done.returncode == 1
        assert done.stderr.strip().endswith(" bytes: reinstall xla_ops")
        assert "ImportError: xla_ops: " in done.stderr


@pytest.mark.parametrize(
    "harm", [without_runtime, with_a_cut_runtime, without_anything]
)
def test_the_cpu_works_in_a_broken_installation(installation, harm):
    harm(installation)
    gone = "import sys; sys.modules['xla_ops'] = None\n"
    code = (gone if harm is without_anything else "") + (
        "import torch, torch_xla\nprint((torch.ones(2, device='xla') + 1).sum().item())"
    )
    done = installation.run("-c", code, PJRT_DEVICE="CPU")
    assert done.stdout.splitlines()[-1:] == ["4.0"], done.stderr


@pytest.mark.parametrize(
    "size, what",
    [
        (9000, "was cut short: it has 9000 of "),
        (0, "is empty: "),
        (None, "is no shared object: "),  # as where Git LFS left a pointer to it
    ],
)
def test_a_plugin_that_is_broken_is_named(tmp_path, size, what):
    path = tmp_path / "jax_plugins" / "xla_cuda13" / "xla_cuda_plugin.so"
    fakes.copy(fakes.build("fake_pjrt_plugin"), path)
    data = b"version https://git" if size is None else path.read_bytes()[:size]
    path.write_bytes(data)
    error = use_device(tmp_path, "CUDA", path)
    assert error.startswith(f"{path} {what}")
    assert error.endswith("reinstall jax-cuda13-pjrt, which xla_ops[cuda13] brings")


@pytest.mark.parametrize(
    "size, what", [(0, "is empty"), (9000, "was cut short: it has 9000 of ")]
)
def test_a_broken_library_of_cuda_is_named(tmp_path, size, what):
    """XLA opened it when a program needed it, and the process ended there."""
    path = tmp_path / "jax_plugins" / "xla_cuda13" / "xla_cuda_plugin.so"
    fakes.copy(fakes.build("fake_pjrt_plugin"), path)
    broken = tmp_path / "nvidia" / "cu13" / "lib" / "libcublas.so.13"
    fakes.copy(fakes.build("fake_ops"), broken)
    assert "fake plugin: no devices" in use_device(tmp_path, "CUDA", path)
    broken.write_bytes(broken.read_bytes()[:size])
    error = use_device(tmp_path, "CUDA", path)
    assert error.startswith(f"{broken} {what}")
    assert ": pip install --force-reinstall --no-deps 'nvidia-cublas>=" in error
