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

import numpy as np
import torch
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.utils import CpuGpuBuffer
from vllm.v1.worker import gpu_model_runner
from vllm.v1.worker.gpu_input_batch import InputBatch

from .results import AsyncOutput


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


def grammar_bitmask(
    scheduler_output: SchedulerOutput,
    grammar_output: GrammarOutput,
    input_batch: InputBatch,
    num_rows: int,
) -> np.ndarray:
    """Which tokens the grammars allow: int32 [num_rows, words], a bit a token.

    Rows of requests without a grammar are all ones.
    """
    given = grammar_output.grammar_bitmask
    mask = np.full((num_rows, given.shape[1]), -1, np.int32)
    drafts = scheduler_output.scheduled_spec_decode_tokens
    rows, start = {}, 0
    for request, i in sorted(input_batch.req_id_to_index.items(), key=lambda x: x[1]):
        rows[request] = start + i
        start += len(drafts.get(request, ()))
    source = 0
    for request in grammar_output.structured_output_request_ids:
        count = 1 + len(drafts.get(request, ()))
        if (row := rows.get(request)) is not None:
            mask[row : row + count] = given[source : source + count]
        source += count
    return mask


def _apply_grammar_bitmask(
    scheduler_output: SchedulerOutput,
    grammar_output: GrammarOutput,
    input_batch: InputBatch,
    logits: torch.Tensor,
) -> None:
    """vLLM's function of this name, for logits on the host.

    Its own asks for pinned memory, and names rows in a way that the grammar library's
    CPU kernel refuses.
    """
    mask = grammar_bitmask(
        scheduler_output, grammar_output, input_batch, logits.shape[0]
    )
    bits = torch.from_numpy(mask)[..., None] >> torch.arange(32, dtype=torch.int32)
    allowed = (bits & 1).flatten(1)[:, : logits.shape[1]].bool()
    logits.masked_fill_(~allowed, -float("inf"))


gpu_model_runner.AsyncGPUModelRunnerOutput = AsyncOutput
gpu_model_runner.apply_grammar_bitmask = _apply_grammar_bitmask
