"""Quantised checkpoints: the engine rounds where, and as, the checkpoint says."""

import pytest
import torch

from vllm_checkpoints import VOCABULARY, save_checkpoint
from vllm_in_process import engine, generate, greedy, steady
from vllm_oracle import Oracle
from vllm_quantized import SCHEMES, QuantizedOracle, base_config, save_quantized

PROMPTS = [
    [(start * 31 + 7 * i + i * i) % (VOCABULARY - 5) + 5 for i in range(length)]
    for start, length in enumerate([4, 17, 40, 90, 130])
]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return save_checkpoint(base_config(), tmp_path_factory.mktemp("base") / "original")


def logprobs(oracle: Oracle, sequences) -> torch.Tensor:
    """Of each token after the first, one sequence after the other."""
    return torch.cat(
        [
            oracle.after(s[:1], s[1:]).gather(1, torch.tensor(s[1:]).unsqueeze(1))[:, 0]
            for s in sequences
        ]
    )


@pytest.mark.parametrize("name", SCHEMES)
def test_rounds_as_the_checkpoint_says(name, original, tmp_path):
    """The difference to the reference is small beside what quantising changes."""
    scheme = SCHEMES[name]
    checkpoint = save_quantized(original, scheme, tmp_path / name)
    with engine(checkpoint) as llm, steady(llm):
        outputs = generate(llm, PROMPTS, greedy(16, logprobs=0, prompt_logprobs=0))
    sequences, got = [], []
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        sequence = prompt + list(output.outputs[0].token_ids)
        entries = output.prompt_logprobs[1:] + output.outputs[0].logprobs
        got += [e[t].logprob for e, t in zip(entries, sequence[1:], strict=True)]
        sequences.append(sequence)
    reference = logprobs(QuantizedOracle(original, checkpoint, scheme), sequences)
    exact = logprobs(Oracle(original), sequences)
    noise = (reference - exact).square().mean().sqrt()
    error = (torch.tensor(got) - reference).square().mean().sqrt()
    assert noise > 0.01
    assert error < 0.25 * noise, (error, noise)
