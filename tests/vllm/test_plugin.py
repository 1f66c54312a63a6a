"""xla_ops_vllm: vLLM's platform is named where the environment asks for it alone."""

import importlib.metadata
import subprocess
import sys

import pytest
import xla_ops_vllm

PLATFORM = "xla_ops.vllm.platform.XlaPlatform"


@pytest.mark.parametrize(
    "environ, named",
    [
        ({}, False),
        ({"PJRT_DEVICE": "CPU"}, True),
        ({"PJRT_DEVICE": "GPU"}, True),
        ({"PJRT_DEVICE": "CUDA"}, True),
        ({"PJRT_DEVICE": "TPU"}, False),
        ({"VLLM_PLUGINS": "xla_ops"}, True),
        ({"VLLM_PLUGINS": "lora_filesystem_resolver,xla_ops"}, True),
        ({"VLLM_PLUGINS": "another"}, False),
    ],
)
def test_register(monkeypatch, environ, named):
    for name in ("PJRT_DEVICE", "VLLM_PLUGINS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert xla_ops_vllm.register() == (PLATFORM if named else None)


def test_the_wheel_names_it():
    (found,) = importlib.metadata.entry_points(
        group="vllm.platform_plugins", name="xla_ops"
    )
    assert found.load() is xla_ops_vllm.register


def test_it_imports_nothing_of_the_package():
    code = (
        "import sys, xla_ops_vllm; xla_ops_vllm.register();"
        " assert not {'xla_ops', 'torch', 'torch_xla', 'vllm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
