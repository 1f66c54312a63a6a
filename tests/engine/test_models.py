"""Every family of checkpoints answers through vLLM's engine as in transformers."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import vllm_session
from vllm_checkpoints import FAMILIES, VOCABULARY
from vllm_in_process import engine, generate, greedy, steady
from vllm_oracle import Oracle, assert_greedy, worst_difference

ANSWER = 24
# One token; less than, exactly and more than one block; more than one window; more than
# two steps of prefill. Twice as many as fit into a step, so that some wait.
LENGTHS = [1, 3, 15, 16, 17, 40, 64, 65, 130, 100, 7, 33]
PROMPTS = [
    [(start * 31 + 7 * i + i * i) % (VOCABULARY - 5) + 5 for i in range(length)]
    for start, length in enumerate(LENGTHS)
]


@dataclass
class Run:
    """What an engine gave for PROMPTS."""

    checkpoint: Path
    outputs: list

    def answers(self):
        for prompt, output in zip(PROMPTS, self.outputs, strict=True):
            yield prompt, list(output.outputs[0].token_ids), output


def run(checkpoint: Path, **options) -> Run:
    params = greedy(ANSWER, logprobs=3, prompt_logprobs=2)
    with engine(checkpoint, **options) as llm, steady(llm):
        return Run(checkpoint, generate(llm, PROMPTS, params))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def exact(family) -> Run:
    return run(vllm_session.checkpoint(family))


@pytest.fixture(scope="module")
def oracle(family) -> Oracle:
    return vllm_session.oracle(vllm_session.checkpoint(family))


def test_greedy_tokens(exact, oracle):
    seen = set()
    for prompt, answer, _ in exact.answers():
        assert len(answer) == ANSWER
        assert_greedy(oracle, prompt, answer)
        seen.update(answer)
    assert len(seen) > 20, "the checkpoint repeats itself: no test of anything"


def test_logprobs(exact, oracle):
    for prompt, answer, output in exact.answers():
        entries = output.outputs[0].logprobs
        assert worst_difference(oracle, prompt, answer, entries) < 1e-4
        for row in entries:  # the chosen token is the first of the three best
            assert sorted(entry.rank for entry in row.values()) == [1, 2, 3]


def test_prompt_logprobs(exact, oracle):
    for prompt, _, output in exact.answers():
        first, *entries = output.prompt_logprobs
        assert first is None  # nothing comes before the first token
        if entries:
            assert worst_difference(oracle, prompt[:1], prompt[1:], entries) < 1e-4


def _errors(oracle: Oracle, run: Run) -> torch.Tensor:
    """Of the log-probability of each token of prompts and answers."""
    errors = []
    for prompt, answer, output in run.answers():
        entries = output.prompt_logprobs[1:] + output.outputs[0].logprobs
        sequence = prompt + answer
        exact = oracle.after(sequence[:1], sequence[1:])
        for row, token, entry in zip(exact, sequence[1:], entries, strict=True):
            errors.append(entry[token].logprob - float(row[token]))
    return torch.tensor(errors)


def test_bfloat16(family, oracle):
    """No further from float32 than transformers in bfloat16, on the same tokens."""
    checkpoint = vllm_session.checkpoint(family)
    outcome = run(checkpoint, dtype="bfloat16")
    peer = vllm_session.oracle(checkpoint, torch.bfloat16)
    of_peer = []
    for prompt, answer, _ in outcome.answers():
        sequence = prompt + answer
        exact = oracle.after(sequence[:1], sequence[1:])
        chosen = torch.tensor(sequence[1:]).unsqueeze(1)
        of_peer.append(
            (peer.after(sequence[:1], sequence[1:]) - exact).gather(1, chosen)
        )
    allowed = torch.cat(of_peer).square().mean().sqrt()
    error = _errors(oracle, outcome).square().mean().sqrt()
    assert error <= 1.5 * allowed, (error, allowed)
