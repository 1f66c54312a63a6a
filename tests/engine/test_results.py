"""The stand-ins for vLLM's tensors fetch what is read, and nothing else."""

import threading

import numpy as np
import pytest
import torch
from vllm.v1.outputs import ModelRunnerOutput

from xla_ops.vllm.results import AsyncOutput, StepResult
from xla_ops.vllm.sampled import SampledOnDevice


class Unread:
    """A tensor that may not be read."""

    def cpu(self):
        pytest.fail("was fetched")


def test_rows_with_logits_stay_on_the_device():
    indices = torch.tensor([1, 2])
    result = StepResult(Unread(), Unread(), Unread(), None, 3, indices)
    assert result[indices] is result
    result[:3]
    assert result.num_rows == 2


def test_a_prompts_rows_are_fetched_once():
    class Counted:
        fetched = 0

        def cpu(self):
            self.fetched += 1
            return torch.arange(8)

    hidden = Counted()
    result = StepResult(hidden, Unread(), Unread(), None, 6, torch.tensor([5]))
    assert result[:6][2:4].hidden.tolist() == [2, 3]
    assert result[:6][:6].hidden.tolist() == [0, 1, 2, 3, 4, 5]
    assert result[:6][:6].adapter_slots is None
    assert hidden.fetched == 1


def test_a_prompts_rows_come_with_their_adapters():
    hidden, slots = torch.arange(8), np.array([-1, -1, 2, 2, 0, 0])
    result = StepResult(hidden, Unread(), Unread(), None, 6, torch.tensor([5]), slots)
    rows = result[:6][1:4]
    assert rows.hidden.tolist() == [1, 2, 3]
    assert rows.adapter_slots.tolist() == [-1, 2, 2]


def output(rows):
    return ModelRunnerOutput(
        req_ids=[str(i) for i in range(rows)],
        req_id_to_index={str(i): i for i in range(rows)},
        sampled_token_ids=[],
        logprobs=None,
        prompt_logprobs_dict={},
        pooler_output=[],
    )


def test_tokens_come_where_get_output_is_called():
    tokens = SampledOnDevice(torch.tensor([5, 6, 7, 0], dtype=torch.int32), 3)
    with torch.inference_mode():  # as vLLM makes it
        made = AsyncOutput(output(3), tokens, None, [1])
    got = []
    thread = threading.Thread(target=lambda: got.append(made.get_output()))
    thread.start()
    thread.join(60)
    assert got[0].sampled_token_ids == [[5], [], [7]]
    assert made.sampled_token_ids_cpu.tolist() == [[5], [6], [7]]
