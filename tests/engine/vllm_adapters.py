"""Requests by LoRA adapters, held to the checkpoints that they are merged into."""

from collections.abc import Mapping, Sequence

from vllm import LLM
from vllm.lora.request import LoRARequest

from vllm_checkpoints import OTHER, PROMPT
from vllm_in_process import greedy
from vllm_oracle import Oracle, assert_greedy, worst_difference

ANSWER = 12
# Fewer slots than the tests have adapters, and smaller ranks among them.
LORA = dict(enable_lora=True, max_loras=2, max_lora_rank=8)

# By an adapter's number; 0 is none.
Asked = Mapping[int, LoRARequest | None]
Oracles = Mapping[int, Oracle]


def answers(
    llm: LLM,
    prompts: Sequence[list[int]],
    requests: Sequence[LoRARequest | None],
    **options,
) -> list:
    """Greedy answers to prompts, each by an adapter, with log-probabilities."""
    return llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        greedy(ANSWER, logprobs=2, **options),
        lora_request=list(requests),
        use_tqdm=False,
    )


def assert_answers(
    llm: LLM,
    asked: Asked,
    oracles: Oracles,
    numbers: Sequence[int],
    prompts: Sequence[list[int]] = (PROMPT, OTHER),
) -> None:
    """Each prompt by each of these adapters, all at once, answers as it should."""
    pairs = [(number, prompt) for number in numbers for prompt in prompts]
    outputs = answers(
        llm, [prompt for _, prompt in pairs], [asked[i] for i, _ in pairs]
    )
    for (number, prompt), output in zip(pairs, outputs, strict=True):
        answer = list(output.outputs[0].token_ids)
        assert_greedy(oracles[number], prompt, answer)
        entries = output.outputs[0].logprobs
        assert worst_difference(oracles[number], prompt, answer, entries) < 2e-4
