"""Chooses the next token from logits, on the host.

SPDX-License-Identifier: Apache-2.0
"""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sampling:
    """How to choose. Temperature 0 is greedy: always the likeliest token.

    Attributes:
      temperature: logits are divided by it; finite, at least 0.
      top_p: keep the likeliest tokens that together have this probability
        (nucleus sampling, arXiv:1904.09751); over 0, at most 1.
      seed: of the random numbers; each prompt has its own stream. In 0..2^64 - 1.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise ValueError(
                "sampling: temperature must be finite and at least 0, "
                f"got {self.temperature}"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sampling: top_p must be in (0, 1], got {self.top_p}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"sampling: seed must be in 0..2^64 - 1, got {self.seed}")

    def generator(self, index: int) -> torch.Generator:
        """The random numbers of the prompt with that index."""
        return torch.Generator().manual_seed((self.seed + index) % 2**64)


GREEDY = Sampling()


def sample(logits: torch.Tensor, how: Sampling, generator: torch.Generator) -> int:
    """Draws a token id from logits, fp32 [vocab_size]."""
    if how.temperature == 0:
        return int(logits.argmax())
    most = logits.max()
    if not math.isfinite(most):
        raise ValueError(
            f"sampling: logits must be finite, got {most.item()}: the model overflows "
            "its dtype, take bfloat16 or float32"
        )
    # Less their maximum, and divided in float64: no temperature is too small for that.
    logits = ((logits - most).double() / how.temperature).float()
    probs, ids = torch.softmax(logits, dim=-1).sort(descending=True)
    # A token stays if those before it do not yet reach top_p: the first always.
    before = probs.cumsum(dim=-1) - probs
    probs = torch.where(before < how.top_p, probs, 0.0)
    return int(ids[torch.multinomial(probs, 1, generator=generator)])
