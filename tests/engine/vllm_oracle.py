"""What transformers computes with a checkpoint: the engine's answers are held to it.

One forward pass over prompt and answer judges a greedy answer: it is transformers' own
exactly if each of its tokens is the most likely one after those before it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers

# Of the logits of a token and the answer before it.
Change = Callable[[torch.Tensor, list[int]], torch.Tensor]


class Oracle:
    """A checkpoint in transformers, on the CPU.

    In float64, but where it is a peer: in float32 it is up to 2.5e-4 away from that.
    """

    def __init__(self, checkpoint: Path, dtype: torch.dtype = torch.float64):
        # Eager attention alone has soft caps, sinks and windows of all families.
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=dtype, attn_implementation="eager"
        ).eval()

    @torch.no_grad()
    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """Of what follows each of `tokens`: [len(tokens), vocabulary], float32."""
        ids = torch.tensor([list(tokens)])
        return self.model(input_ids=ids, use_cache=False).logits[0].float()

    def logprobs(self, tokens: Sequence[int]) -> torch.Tensor:
        return torch.log_softmax(self.logits(tokens), dim=-1)

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """The `count` tokens that greedy decoding gives, with no end of text."""
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(self.logprobs(tokens)[-1].argmax()))
        return tokens[len(prompt) :]

    def after(self, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
        """Log-probabilities at each token of the answer, given those before it."""
        return self.logprobs([*prompt, *answer])[len(prompt) - 1 : -1]


def assert_greedy(
    oracle: Oracle,
    prompt: Sequence[int],
    answer: Sequence[int],
    change: Change = lambda logits, before: logits,
) -> None:
    """The answer is what greedy decoding gives, token by token.

    Args:
        oracle: of the checkpoint.
        prompt: token ids.
        answer: token ids.
        change: what a request asks to be done to the logits.
    """
    rows = oracle.logits([*prompt, *answer])[len(prompt) - 1 : -1]
    best = [
        int(change(row.clone(), list(answer[:i])).argmax())
        for i, row in enumerate(rows)
    ]
    assert list(answer) == best


def worst_difference(oracle: Oracle, prompt, answer, logprobs) -> float:
    """Between the engine's log-probabilities and transformers'.

    Args:
        oracle: of the same checkpoint.
        prompt: token ids.
        answer: token ids.
        logprobs: what the engine gave for each token of the answer: a mapping of
            token ids to objects with a `logprob`.
    """
    expected = oracle.after(prompt, answer)
    assert len(logprobs) == len(expected)
    return max(
        abs(entry.logprob - float(row[token]))
        for row, entries in zip(expected, logprobs, strict=True)
        for token, entry in entries.items()
    )
