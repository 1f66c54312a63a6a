"""Drafts of n-grams change no answer, whatever a request asks for."""

import pytest
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

import vllm_session
from vllm_checkpoints import EOS, VOCABULARY
from vllm_in_process import engine, generate, greedy, metric, steady, tokens

NGRAM = dict(
    method="ngram",
    num_speculative_tokens=3,
    prompt_lookup_min=1,
    prompt_lookup_max=3,
)
ANSWER = 24
# The same few tokens again and again, so that there is something to look up.
PROMPTS = [[(11 * i + 7 * k) % 256 + 64 for i in range(5)] * 6 for k in range(4)]


def seeded(**options) -> SamplingParams:
    return SamplingParams(seed=3, max_tokens=ANSWER, ignore_eos=True, **options)


ASKED = {
    "plain": greedy(ANSWER),
    "logit_bias": greedy(ANSWER, logit_bias={70: 30.0, 80: 29.0, PROMPTS[0][0]: -9.0}),
    "min_tokens": SamplingParams(
        temperature=0.0,
        max_tokens=ANSWER,
        min_tokens=9,
        stop_token_ids=[*range(0, VOCABULARY, 2)],
    ),
    "min_p": seeded(min_p=0.3),
    "top_k and top_p": seeded(top_k=30, top_p=0.8),
    "penalties": seeded(frequency_penalty=-2.0, repetition_penalty=0.8),
    "bad_words": greedy(ANSWER, bad_words=["the", "e", "a"], repetition_penalty=0.6),
    "allowed_token_ids": greedy(ANSWER, allowed_token_ids=[*range(70, 76), EOS]),
    "structured_outputs": SamplingParams(
        temperature=0.0,
        max_tokens=ANSWER,
        structured_outputs=StructuredOutputsParams(regex="(ab|abc){9}"),
    ),
}


def answers(llm) -> dict[str, list]:
    with steady(llm):
        return {
            name: tokens(generate(llm, PROMPTS, params))
            for name, params in ASKED.items()
        }


@pytest.fixture(scope="module")
def checkpoint():
    return vllm_session.checkpoint("llama")


@pytest.fixture(scope="module")
def without(checkpoint):
    with engine(checkpoint) as llm:
        return answers(llm)


@pytest.fixture(scope="module")
def drafted(checkpoint):
    with engine(checkpoint, speculative_config=NGRAM) as llm:
        found = answers(llm)
        assert metric(llm, "spec_decode_num_accepted_tokens") > 20
        return found


@pytest.mark.parametrize("name", ASKED)
def test_answers_are_those_without_drafts(name, drafted, without):
    assert drafted[name] == without[name]
    assert name == "plain" or drafted[name] != without["plain"]
