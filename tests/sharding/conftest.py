"""Four CPU devices in this process, and torch_xla's SPMD on: both for good."""

import os

os.environ.setdefault("CPU_NUM_DEVICES", "4")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch_xla.runtime as xr  # noqa: E402
from torch_xla.distributed import spmd as xs  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def _spmd():
    xr.use_spmd()
    if xr.global_runtime_device_count() != 4:
        pytest.fail(
            "CPU_NUM_DEVICES must be 4 before torch_xla makes its client, got"
            f" {xr.global_runtime_device_count()} devices"
        )


@pytest.fixture
def mesh():
    return xs.Mesh(np.arange(4), (4,), ("tp",))


@pytest.fixture
def grid():
    return xs.Mesh(np.arange(4), (2, 2), ("dp", "tp"))
