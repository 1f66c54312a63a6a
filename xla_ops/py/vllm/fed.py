"""How the sampler's program gets its parameters, and the host its tokens.

As a step its vector (runner.py): a transfer would wait for the step's program.

Tested by tests/engine/test_sampler.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ..programs.feed import FedStep, HostFeed
from . import sampling

# Steps that keep their inputs, which are pinned memory. Two are under way at most.
FEED_SLOTS = 4

Program = Callable[..., Any]  # returns a sequence of tensors


class FedSample:
    """Calls of programs that sample, one after the other.

    Args:
        max_rows: of any step.
    """

    def __init__(self, max_rows: int):
        size = sampling.NUM_PARAMS * max_rows
        self._feed = HostFeed(size, max_rows, FEED_SLOTS)

    def program(self, sample: Program, rows: int) -> Program:
        """The program of logits and a call's number, of one of logits and params.

        Args:
            sample: its first result are the tokens, [max_rows] int32.
            rows: of logits.
        """

        def fed(logits: torch.Tensor, number: torch.Tensor) -> Sequence[torch.Tensor]:
            size = sampling.NUM_PARAMS * rows
            params, following = self._feed.receive(number, size)
            tokens, *rest = sample(logits, params.view(-1, rows))
            return following, self._feed.send(tokens, number), *rest

        return fed

    def number(self) -> torch.Tensor:
        """That of the next call, for those who compile the program."""
        return self._feed.number()

    def __call__(
        self, program: Program, logits: torch.Tensor, params: np.ndarray
    ) -> tuple[FedStep, Sequence[torch.Tensor]]:
        """Calls what is compiled of `program`; params [NUM_PARAMS, rows] int32."""
        self._feed.begin(params.size)[:] = params.reshape(-1)
        following, *results = program(logits, self._feed.number())
        return self._feed.end(following), results
