"""vLLM's worker with one XLA device.

Tested by tests/engine.
"""

from __future__ import annotations

import os
import time
from typing import Any

import torch
import torch_xla
import torch_xla.backends
from vllm import envs
from vllm.distributed import get_world_group
from vllm.logger import init_logger
from vllm.model_executor import set_random_seed
from vllm.platforms import current_platform
from vllm.v1.worker.gpu_worker import Worker, init_worker_distributed_environment

from ..gpu import discover, flags
from ..programs import processes
from . import memory, refused
from .platform import is_gpu

try:
    from vllm.v1.worker.workspace import init_workspace_manager
except ImportError:  # vLLM 0.12.0 has none
    init_workspace_manager = None

logger = init_logger("vllm.xla_ops")


class XlaWorker(Worker):
    """Loads the model, measures what memory is left, and warms the programs up."""

    def init_device(self) -> None:
        self._began = time.perf_counter()
        if is_gpu():
            memory.set_share(self.cache_config.gpu_memory_utilization)
            flags.keep_tuning(
                os.path.join(envs.VLLM_CACHE_ROOT, "xla_ops", "tuning"),
                discover.find_plugin(),
                os.environ,
            )
        init_worker_distributed_environment(
            self.vllm_config,
            self.rank,
            self.distributed_init_method,
            self.local_rank,
            current_platform.dist_backend,
        )
        world_size = self.parallel_config.world_size
        if world_size > 1 and is_gpu():
            cpu_group = get_world_group().cpu_group
            processes.set_ranks(cpu_group, self.local_rank, world_size)
        if is_gpu():
            memory.check_free(self.cache_config.gpu_memory_utilization)
        self.device = torch_xla.device()
        _set_precision(self.model_config.dtype)
        set_random_seed(self.model_config.seed)
        if init_workspace_manager is not None:
            init_workspace_manager(torch.device("cpu"), 1)
        # They tell vLLM of layers.
        from . import communicator, layers, linear, lora, moe, quantization  # noqa: F401
        from .runner import XlaModelRunner

        communicator.start()
        self.model_runner = XlaModelRunner(self.vllm_config, self.device)

    def load_model(self) -> None:
        self.model_runner.load_model()

    def determine_available_memory(self) -> int:
        """Bytes for KV caches: what weights and the largest step leave.

        Raises ValueError where they leave nothing.
        """
        asked = self.cache_config.kv_cache_memory_bytes
        before = after = None
        if not asked and memory.memory() is not None:
            before = memory.memory()
            self.model_runner.profile_run()
            after = memory.memory()
        available = memory.for_caches(before, after, asked)
        logger.info("Memory for KV caches: %.2f GiB", available / 2**30)
        return available

    def compile_or_warm_up_model(self) -> None:
        set_random_seed(self.model_config.seed)
        self.model_runner.warm_up()
        logger.info("Ready after %.1f s", time.perf_counter() - self._began)

    # By collective_rpc; the engine's clients refuse them before that.

    def profile(self, is_start: bool = True) -> None:
        refused.refuse("profile")

    def sleep(self, level: int = 1) -> None:
        refused.refuse("sleep")

    def wake_up(self, tags: list[str] | None = None) -> None:
        refused.refuse("wake_up")

    # Both want memory of the host under every weight.

    def save_sharded_state(self, *args: Any, **kwargs: Any) -> None:
        refused.refuse("save_sharded_state")

    def save_tensorized_model(self, *args: Any, **kwargs: Any) -> None:
        refused.refuse("save_tensorized_model")


def _set_precision(dtype: torch.dtype) -> None:
    """Products of float32, which XLA rounds to TF32 on a GPU unless it is told not to.

    As vLLM's variable says, whose default is the whole precision.
    """
    asked = getattr(envs, "VLLM_FLOAT32_MATMUL_PRECISION", "ieee")
    if dtype == torch.float32 and asked in ("ieee", "highest"):
        torch_xla.backends.set_mat_mul_precision("highest")
