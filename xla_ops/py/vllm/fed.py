"""How the sampler's programs get what they sample with, and the host its tokens.

As a step its vector (runner.py): a transfer would wait for the step's program.

Tested by tests/engine/test_sampler.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ..programs.feed import FedStep, HostFeed

# Steps that keep their inputs, which are pinned memory. Two are under way at most.
FEED_SLOTS = 4

Program = Callable[..., Any]  # returns a tensor or a sequence of them


class FedCalls:
    """Calls of programs, one after the other, each with an array of the host's.

    Args:
        in_elements: of the largest array, int32.
        out_elements: of the largest result that the host reads, int32.
    """

    def __init__(self, in_elements: int, out_elements: int = 1):
        self._feed = HostFeed(in_elements, out_elements, FEED_SLOTS)

    def program(
        self, function: Program, shape: Sequence[int], sends: bool = False
    ) -> Program:
        """The program of logits, a call's number and more, of a function of
        logits, the call's array and more.

        Args:
            function: what it computes.
            shape: of the array.
            sends: whether its first result goes to the host. If not, only that the
                array was read does.
        """

        def fed(
            logits: torch.Tensor, number: torch.Tensor, *others: torch.Tensor
        ) -> Sequence[torch.Tensor]:
            data, following = self._feed.receive(number, math.prod(shape))
            results = function(logits, data.view(*shape), *others)
            if isinstance(results, torch.Tensor):
                results = (results,)
            if sends:
                first, *rest = results
                return following, self._feed.send(first, number), *rest
            # It comes from the call that reads the array.
            return self._feed.send(following, number), *results

        return fed

    def number(self) -> torch.Tensor:
        """That of the next call, for those who compile the program."""
        return self._feed.number()

    def __call__(
        self,
        program: Program,
        logits: torch.Tensor,
        array: np.ndarray,
        *others: torch.Tensor,
    ) -> tuple[FedStep, Sequence[torch.Tensor]]:
        """Calls what is compiled of `program`, with an int32 array of its shape."""
        self._feed.begin(array.size)[:] = array.reshape(-1)
        following, *results = program(logits, self._feed.number(), *others)
        return self._feed.end(following), results
