"""vLLM's collectives between its workers, each with an XLA device.

vLLM's layers ask the communicator of their group while a step is traced, so that a
step's sums are part of its program (programs/processes.py). Tensors on the host go by
gloo.

Tested by tests/engine/test_parallel.py.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from vllm.distributed import get_tp_group
from vllm.distributed.device_communicators.base_device_communicator import (
    DeviceCommunicatorBase,
)
from vllm.model_executor.layers import vocab_parallel_embedding

from ..programs import processes


class XlaCommunicator(DeviceCommunicatorBase):
    """Made before the device is there; `join` follows, when it is."""

    _group: processes.Group | None = None

    def join(self) -> None:
        """Meets the other workers, which all have to call this."""
        self._group = processes.join(self.cpu_group)

    @property
    def group(self) -> processes.Group:
        if self._group is None:
            raise NotImplementedError(
                "xla_ops: a collective must be of the tensor parallel group on XLA, got"
                f" one of {self.unique_name}"
            )
        return self._group

    def all_reduce(self, input_: torch.Tensor) -> torch.Tensor:
        if input_.device.type != "xla":
            return super().all_reduce(input_)
        return self.group.all_reduce(input_)

    def all_gather(self, input_: torch.Tensor, dim: int = -1) -> torch.Tensor:
        if input_.device.type != "xla":
            return super().all_gather(input_, dim)
        return self.group.all_gather(input_, dim)

    def gather(
        self, input_: torch.Tensor, dst: int = 0, dim: int = -1
    ) -> torch.Tensor | None:
        if input_.device.type != "xla":
            return super().gather(input_, dst, dim)
        return self.group.all_gather(input_, dim)  # every worker runs one program

    def reduce_scatter(self, input_: torch.Tensor, dim: int = -1) -> torch.Tensor:
        if input_.device.type != "xla":
            return super().reduce_scatter(input_, dim)
        part = input_.shape[dim] // self.world_size
        total = self.group.all_reduce(input_)
        return total.narrow(dim, self.rank_in_group * part, part)


def start() -> None:
    """Joins the workers' groups, once the device is there."""
    communicator = get_tp_group().device_communicator
    if communicator is not None:
        assert isinstance(communicator, XlaCommunicator)
        communicator.join()


def in_order() -> contextlib.AbstractContextManager[Any]:
    """Inside the function of a program, see `processes.Group.in_order`."""
    communicator = get_tp_group().device_communicator
    if communicator is None:
        return contextlib.nullcontext()
    assert isinstance(communicator, XlaCommunicator)
    return communicator.group.in_order()


# vLLM compiles it by Dynamo, which has nothing to do inside a program.
vocab_parallel_embedding.get_masked_input_and_mask = getattr(
    vocab_parallel_embedding.get_masked_input_and_mask,
    "_torchdynamo_orig_callable",
    vocab_parallel_embedding.get_masked_input_and_mask,
)
