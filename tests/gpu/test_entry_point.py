"""xla_ops_pjrt, by which torch_xla finds the GPU: through torch_xla itself, each time
in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import fakes
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


def use_device(tmp_path, device, path, **environ):
    """Uses the device twice in a new process with the fake driver; returns stdout."""
    driver_folder = tmp_path / "driver"
    fakes.copy(fakes.build("fake_cuda_driver"), driver_folder / "libcuda.so.1")
    search = os.environ.get("LD_LIBRARY_PATH")
    done = subprocess.run(
        [sys.executable, "-c", USE_DEVICE],
        check=False,
        stdout=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "PJRT_DEVICE": device,
            "FAKE_CUDA_DEVICES": "9.0",
            "LD_LIBRARY_PATH": ":".join(filter(None, [str(driver_folder), search])),
            discover.PLUGIN_VARIABLE: str(path),
            **environ,
        },
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines[-1] == "alive", done.stdout
    errors = [line for line in lines if line.startswith("ERROR: ")]
    assert len(errors) == 2 and errors[0] == errors[1], done.stdout
    return errors[0].removeprefix("ERROR: ")


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
    ("macros", "environ", "text"),
    [
        ({"MAJOR": 1}, {}, "torch_xla needs major version 0: install another"),
        ({}, {"FAKE_CUDA_INIT": "100"}, "no GPU is visible: check nvidia-smi"),
        ({}, {"PJRT_ALLOCATOR_FRACTION": "3"}, "PJRT_ALLOCATOR_FRACTION must be"),
    ],
)
def test_error_is_torch_xlas_and_the_process_goes_on(tmp_path, macros, environ, text):
    path = fakes.build("fake_pjrt_plugin", **macros)
    assert text in use_device(tmp_path, "CUDA", path, **environ)


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
