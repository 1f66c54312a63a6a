"""Layers of vLLM's alone: what they need to be built outside of an engine."""

import contextlib
import logging

import pytest
import torch
import torch_xla
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import (
    cleanup_dist_env_and_memory,
    ensure_model_parallel_initialized,
    init_distributed_environment,
)


@contextlib.contextmanager
def built_as(dtype: torch.dtype):
    """What vLLM's model loader sets while it builds layers."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with set_current_vllm_config(VllmConfig()):
            yield
    finally:
        torch.set_default_dtype(before)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    """vLLM's process groups, of this process alone."""
    store = f"file://{tmp_path_factory.mktemp('store')}/store"
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, store, 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
    yield
    cleanup_dist_env_and_memory()


@pytest.fixture(name="lazily", params=[False, True], ids=["host", "xla"])
def host_and_xla(request):
    return request.param


def on_xla(module: torch.nn.Module) -> torch.nn.Module:
    """Moves a layer as the engine does."""
    from xla_ops.vllm import loading

    loading.move(module, torch_xla.device())
    return module


def hlo(*tensors: torch.Tensor) -> str:
    """What XLA is given to compute these, before it runs."""
    return torch_xla._XLAC._get_xla_tensors_hlo(list(tensors))


@pytest.fixture(name="log")
def engine_log(caplog):
    """What the engine says; every line again, though vLLM says it once a process."""
    from vllm import logger

    for name in ("_print_info_once", "_print_warning_once"):
        getattr(logger, name).cache_clear()
    logging.getLogger("vllm").propagate = True
    caplog.set_level(logging.INFO, logger="vllm.xla_ops")
    yield caplog
    logging.getLogger("vllm").propagate = False


def w8a8(kind, weights, inputs, **more):
    """A compressed-tensors configuration of 8-bit codes."""
    args = {"num_bits": 8, "type": kind, "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": args | {"dynamic": False} | weights,
        "input_activations": None if inputs is None else args | inputs,
    }
    form = "float-quantized" if kind == "float" else "int-quantized"
    return {"format": form, "ignore": [], "config_groups": {"group_0": group}} | more
