"""What vLLM needs in its environment, and what the tests of a process share.

Import it before anything starts XLA: vllm_in_process and vllm_server do.
"""

import functools
import os
import tempfile
from pathlib import Path

import torch

import vllm_checkpoints
from vllm_oracle import Oracle

_SCRATCH = tempfile.TemporaryDirectory(prefix="xla_ops_vllm_")
FOLDER = Path(_SCRATCH.name)
# A socket's path has at most 107 characters; those of a sandbox's folders are longer.
_SOCKETS = tempfile.TemporaryDirectory(prefix="vllm-", dir="/tmp")

# Nothing is looked up, nothing reported, nothing left in the user's folders; and the
# engine is in this process, where a test can look into it.
os.environ.update(
    DO_NOT_TRACK="1",
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    VLLM_CACHE_ROOT=str(FOLDER / "cache"),
    VLLM_CONFIG_ROOT=str(FOLDER / "config"),
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_NO_USAGE_STATS="1",
    VLLM_RPC_BASE_PATH=_SOCKETS.name,
)
# tests/conftest.py has XLA write down every program; an engine has dozens.
os.environ["XLA_FLAGS"] = " ".join(
    flag for flag in os.environ.get("XLA_FLAGS", "").split() if "xla_dump" not in flag
)

# How to ask for one kind of scheduling, whatever the platform's default.
MODES = {
    "sync": dict(async_scheduling=False, additional_config={"async_scheduling": False}),
    "async": dict(async_scheduling=True),
}


@functools.cache
def checkpoint(family: str) -> Path:
    """The folder of a family's checkpoint."""
    return vllm_checkpoints.save_family(family, FOLDER / family)


@functools.cache
def oracle(folder: Path, dtype: torch.dtype = torch.float64) -> Oracle:
    """Of a checkpoint."""
    return Oracle(folder, dtype)
