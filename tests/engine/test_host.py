"""Where vLLM's runner asks CUDA, the host answers, and only while it is made."""

import torch
from vllm.v1.worker import gpu_model_runner

from xla_ops.vllm import host
from xla_ops.vllm.results import AsyncOutput


def test_events_and_streams_are_nothing_for_a_while():
    before = torch.Event, torch.cuda.Stream
    with host.without_cuda():
        event, stream = torch.Event(), torch.cuda.Stream()
        event.record(stream)
        event.synchronize()
        event.wait()
        stream.wait_stream(stream)
    assert (torch.Event, torch.cuda.Stream) == before


def test_they_come_back_after_an_error():
    before = torch.Event
    try:
        with host.without_cuda():
            raise KeyError
    except KeyError:
        pass
    assert torch.Event is before


def test_outputs_are_fetched_our_way():
    assert gpu_model_runner.AsyncGPUModelRunnerOutput is AsyncOutput


def test_pairs_become_one():
    class Batch:
        pass

    batch = Batch()
    batch.temperature_cpu_tensor, batch.temperature = torch.ones(2), torch.zeros(2)
    batch.lone_cpu_tensor = torch.ones(2)
    batch.block_table = Batch()
    batch.block_table.block_tables = []
    host.join_buffers(Batch(), batch)
    assert batch.temperature is batch.temperature_cpu_tensor
    assert not hasattr(batch, "lone")
