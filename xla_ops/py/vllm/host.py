"""What of vLLM's GPU runner has to be told that its buffers are on the host.

The runner is written for CUDA: it makes events and streams, pinned copies, and a device
tensor beside each host tensor. Here its device is the host. What cannot be said by a
subclass is replaced in vLLM's module, and only where the platform is active.

Tested by tests/engine/test_host.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.v1.sample import sampler
from vllm.v1.utils import CpuGpuBuffer
from vllm.v1.worker import gpu_model_runner
from vllm.v1.worker.gpu_input_batch import InputBatch

from .results import AsyncOutput


class XlaInputBatch(InputBatch):
    """vLLM's, which forgets the allowed tokens of a row that it has moved.

    vLLM leaves them where they were, for the next request in that row.
    """

    def condense(self) -> None:
        num_rows = self.num_reqs + len(self.batch_update_builder.removed)
        super().condense()
        if (mask := self.allowed_token_ids_mask_cpu_tensor) is not None:
            mask[self.num_reqs : num_rows] = False


class _Nothing:
    """A CUDA event or stream where there is none."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def record(self, *args: Any) -> None:
        pass

    def synchronize(self, *args: Any) -> None:
        pass

    def wait(self, *args: Any) -> None:
        pass

    def wait_stream(self, *args: Any) -> None:
        pass


@contextmanager
def without_cuda() -> Iterator[None]:
    """While vLLM's runner is made: events and streams that do nothing."""
    saved = torch.Event, torch.cuda.Stream
    torch.Event = torch.cuda.Stream = _Nothing  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        torch.Event, torch.cuda.Stream = saved  # type: ignore[misc]


def join_buffers(runner: object, input_batch: InputBatch) -> None:
    """Makes the two tensors of each pair, host and device, one.

    Without that vLLM would copy one host tensor into another in each step.
    """
    for held in vars(runner).values():
        if isinstance(held, CpuGpuBuffer):
            held.gpu = held.cpu
    for name, held in list(vars(input_batch).items()):
        device_name = name.removesuffix("_cpu_tensor")
        if device_name != name and isinstance(
            getattr(input_batch, device_name, None), torch.Tensor
        ):
            setattr(input_batch, device_name, held)
    for table in input_batch.block_table.block_tables:
        for held in vars(table).values():
            if isinstance(held, CpuGpuBuffer):
                held.gpu = held.cpu


def _count_greater(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """How many of each row are at least the row's value.

    vLLM compiles this by Dynamo for every size, which calls g++ for its guards: the
    first prompt with logprobs would wait half a minute for it.
    """
    return (x >= values).sum(-1)


gpu_model_runner.AsyncGPUModelRunnerOutput = AsyncOutput
gpu_model_runner.InputBatch = XlaInputBatch
sampler.batched_count_greater_than = _count_greater
