"""The tokens of a step before anybody has fetched them.

Tested by tests/engine/test_sampler.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import torch
from vllm.v1.outputs import LogprobsLists, SamplerOutput

from ..programs.calls import is_lost
from .edits import PENDING


class SampledOnDevice:
    """The tokens of a step, [rows, 1], and their logprobs, both still on the device.

    Has what `_bookkeeping_sync` and `AsyncGPUModelRunnerOutput` ask of a tensor.

    Attributes:
        tokens: int32 on the device, as long as the largest step.
        shape: that of the tensor of vLLM's this stands for.

    Args:
        read: waits for the first so many tokens, int32 on the host, where the step has
            sent them there; it may give up.
    """

    def __init__(
        self,
        tokens: torch.Tensor,
        num_rows: int,
        logprobs: torch.Tensor | None = None,
        num_logprobs: int | None = None,
        read: Callable[[int], np.ndarray | None] | None = None,
    ):
        self.tokens = tokens
        self._read = read
        self.shape = (num_rows, 1)
        self._logprobs = logprobs
        self._num_logprobs = num_logprobs
        self._lock = threading.Lock()
        self._host: torch.Tensor | None = None
        self._lists: LogprobsLists | None = None
        # Rows of logprobs that the host made.
        self._host_logprobs: dict[int, torch.Tensor] = {}
        # Where the tokens belong in vLLM's lists: by the list's id, the list, the
        # place in it and the row. vLLM puts a placeholder there.
        self._outputs: dict[int, tuple[list[int], int, int]] = {}

    def row_of(self, output: list[int]) -> int | None:
        """The row whose token ends this list of a request's tokens."""
        _, place, row = self._outputs.get(id(output), (None, -1, None))
        return row if place == len(output) - 1 else None

    def fetch(self) -> torch.Tensor:
        """Waits for the step, and returns its tokens, [rows, 1] int32 on the host.

        Any thread may call it, and as often as it likes.
        """
        with self._lock:
            if self._host is None:
                self._host = self._fetch()
            return self._host

    def _fetch(self) -> torch.Tensor:
        rows = self.shape[0]
        if self._logprobs is None or self._num_logprobs is None:
            sent = self._read(rows) if self._read is not None else None
            tokens = self._fetch_tokens() if sent is None else torch.from_numpy(sent)
            host = tokens[:rows].unsqueeze(-1)
        elif self._num_logprobs == -1:
            host = self._fetch_tokens()[:rows].unsqueeze(-1)
            self._lists = self._all_logprobs(self._logprobs.cpu()[:rows])
        else:
            columns = self._logprobs.cpu()[:rows]
            for row, values in self._host_logprobs.items():
                columns[row] = values
            host = columns[:, :1].to(torch.int32)
            self._lists = self._likeliest(columns, self._num_logprobs)
        for output, place, row in self._outputs.values():
            if place < len(output) and output[place] == PENDING:
                output[place] = int(host[row, 0])
        return host

    def _fetch_tokens(self) -> torch.Tensor:
        if self.tokens.device.type == "xla" and is_lost(self.tokens):
            # The thread that launched the next program has been told why.
            raise RuntimeError(
                "xla_ops: a step must have tokens, got one whose program could not be"
                " started: the error before this one says why"
            )
        return self.tokens.cpu()

    def _all_logprobs(self, values: torch.Tensor) -> LogprobsLists:
        for row, own in self._host_logprobs.items():
            values[row] = own
        empty = np.zeros(0, np.float32)
        return LogprobsLists(empty, values.numpy(), empty)

    def _likeliest(self, columns: torch.Tensor, n: int) -> LogprobsLists:
        most = (columns.shape[1] - 3) // 2
        values, ids = columns[:, 2 : 3 + n], columns[:, 3 + most : 3 + most + n]
        return LogprobsLists(
            torch.cat([columns[:, :1], ids], 1).to(torch.int32).numpy(),
            values.contiguous().numpy(),
            columns[:, 1].to(torch.int32).numpy(),
        )

    def cpu(self) -> torch.Tensor:
        """The tokens, [rows, 1] int32."""
        return self.fetch()

    def tolist(self) -> list[list[int]]:
        return self.cpu().tolist()

    def tolists(self, cu_num_tokens: list[int] | None = None) -> LogprobsLists | None:
        """The logprobs as LogprobsTensors.tolists gives them."""
        self.fetch()
        if self._lists is None:
            return None
        return self._lists._replace(cu_num_generated_tokens=cu_num_tokens)

    def sampler_output(self) -> SamplerOutput:
        """For vLLM: this as the tokens, and as the logprobs if there are any."""
        return SamplerOutput(
            sampled_token_ids=self,
            logprobs_tensors=None if self._logprobs is None else self,
        )
