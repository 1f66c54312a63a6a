"""What a step leaves on the device, in the shapes in which vLLM's runner asks for it.

vLLM's runner indexes hidden states and hands logits on before anyone needs numbers.
These stand in for its tensors, so that nothing is fetched that nobody reads.

Tested by tests/engine/test_results.py.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import numpy as np
import torch
from vllm.v1.outputs import AsyncModelRunnerOutput, LogprobsTensors, ModelRunnerOutput

from ..programs.feed import FedStep
from .sampled import SampledOnDevice


class StepResult:
    """The model's output of a step; rows stay on the device.

    Attributes:
        hidden: [tokens, hidden_size], of the program's bucket.
        logits: [logit_rows, vocab_size], float32.
        greedy: [max_logit_rows] int32, each row's token of the largest logit.
        fed: the step, which has sent `greedy` to the host.
        num_tokens, num_rows: how many of them are the step's.
        logit_indices: the tensor by which vLLM will ask for the rows with logits.
        adapter_slots: of each of the tokens, or None where none has an adapter.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        logits: torch.Tensor,
        greedy: torch.Tensor,
        fed: FedStep,
        num_tokens: int,
        logit_indices: torch.Tensor,
        adapter_slots: np.ndarray | None = None,
    ):
        self.hidden = hidden
        self.logits = logits
        self.greedy = greedy
        self.fed = fed
        self.num_tokens = num_tokens
        self.num_rows = logit_indices.shape[0]
        self.logit_indices = logit_indices
        self._host_rows = HostRows(hidden, adapter_slots)

    def __getitem__(self, index: Any) -> StepResult | HostRows:
        if index is self.logit_indices:
            return self
        # vLLM's hidden_states[:num_scheduled_tokens], in case a prompt's are wanted.
        assert index == slice(None, self.num_tokens), index
        return self._host_rows


class PromptRows(NamedTuple):
    """Hidden states of a prompt's tokens, on the host, and their adapters' slots."""

    hidden: torch.Tensor
    adapter_slots: np.ndarray | None


class HostRows:
    """Hidden states that are fetched, all at once, when some are sliced out."""

    def __init__(self, hidden: torch.Tensor, adapter_slots: np.ndarray | None = None):
        self._hidden = hidden
        self._adapter_slots = adapter_slots
        self._host: torch.Tensor | None = None

    def __getitem__(self, index: slice) -> PromptRows:
        if self._host is None:
            self._host = self._hidden.cpu()
        slots = self._adapter_slots
        return PromptRows(self._host[index], None if slots is None else slots[index])


class AsyncOutput(AsyncModelRunnerOutput):
    """A step's output under async scheduling: fetched where `get_output` is called.

    That is the executor's thread, while the next step is prepared and queued.
    """

    def __init__(
        self,
        model_runner_output: ModelRunnerOutput,
        sampled_token_ids: SampledOnDevice | torch.Tensor,
        logprobs_tensors: SampledOnDevice | LogprobsTensors | None,
        invalid_req_indices: list[int],
        async_output_copy_stream: object = None,
        vocab_size: int = 0,
    ):
        self._output = model_runner_output
        self._tokens = sampled_token_ids
        self._logprobs = logprobs_tensors
        self._invalid = invalid_req_indices
        # vLLM's input batch reads the tokens here once its "event" has happened.
        with torch.inference_mode(False):  # another thread writes it
            self.sampled_token_ids_cpu = torch.empty(
                tuple(sampled_token_ids.shape), dtype=torch.int32
            )
        self.async_copy_ready_event = self
        self._lock = threading.Lock()
        self._is_there = False

    def synchronize(self) -> None:
        """Fetches the tokens, once."""
        with self._lock:
            if not self._is_there:
                self.sampled_token_ids_cpu.copy_(self._tokens.cpu())
                self._is_there = True

    def get_output(self) -> ModelRunnerOutput:
        self.synchronize()
        token_ids = self.sampled_token_ids_cpu.tolist()
        for i in self._invalid:
            token_ids[i].clear()
        self._output.sampled_token_ids = token_ids
        if self._logprobs is not None:
            self._output.logprobs = self._logprobs.tolists(None)
        return self._output
