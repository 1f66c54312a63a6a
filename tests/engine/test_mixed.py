"""Random requests of all kinds in one engine: each answer is the one it gives alone.

They come at random times, some are aborted, and the cache holds half of what they want,
so that some are thrown out and computed again. XLA_OPS_TEST_REQUESTS says how many.
"""

import gc
import os
import random
from dataclasses import dataclass

import psutil
import pytest
import torch
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

import vllm_session
from vllm_checkpoints import VOCABULARY
from vllm_in_process import engine, generate, metric, steady, tokens
from vllm_oracle import assert_greedy
from vllm_session import MODES

REQUESTS = int(os.environ.get("XLA_OPS_TEST_REQUESTS", "60"))
# A block holds 16 tokens, a request wants up to 12 of them, and eight run at a time.
OPTIONS = dict(num_gpu_blocks_override=24, max_model_len=208)


@dataclass
class Request:
    prompt: list[int]
    params: SamplingParams
    abort_after: int | None  # tokens

    @property
    def is_plain(self) -> bool:
        return self.params.temperature == 0.0 and not (
            self.params.structured_outputs or self.params.repetition_penalty != 1.0
        )


def random_params(choose: random.Random) -> SamplingParams:
    length = dict(max_tokens=choose.randint(1, 40), ignore_eos=True)
    kind = choose.randrange(8)
    if kind < 3:
        return SamplingParams(temperature=0.0, **length)
    if kind == 3:
        return SamplingParams(temperature=0.0, repetition_penalty=1.5, **length)
    if kind == 4:
        return SamplingParams(temperature=0.0, logprobs=2, prompt_logprobs=1, **length)
    if kind == 5:
        asked = StructuredOutputsParams(regex=r"[a-f]{4}(-[0-9]{2}){3}")
        return SamplingParams(temperature=0.0, structured_outputs=asked, max_tokens=40)
    limits = dict(top_k=20, top_p=0.9) if kind == 6 else {}
    return SamplingParams(
        temperature=0.8, seed=choose.randrange(99), **limits, **length
    )


def random_requests(count: int, seed: int) -> list[Request]:
    choose = random.Random(seed)
    starts = [[choose.randrange(5, VOCABULARY) for _ in range(80)] for _ in range(3)]
    requests = []
    for _ in range(count):
        prompt = [
            choose.randrange(5, VOCABULARY)
            for _ in range(choose.choice([1, 5, 17, choose.randint(1, 80)]))
        ]
        if choose.random() < 0.3:  # in common with others, for the prefix cache
            prompt = choose.choice(starts) + prompt
        abort = choose.randint(1, 20) if choose.random() < 0.15 else None
        requests.append(Request(prompt, random_params(choose), abort))
    return requests


def serve(llm, requests: list[Request], seed: int) -> dict[int, tuple[list[int], bool]]:
    """Each request's tokens, and whether it was aborted."""
    choose = random.Random(seed)
    runner = llm.llm_engine
    waiting = list(enumerate(requests))[::-1]
    got: dict[int, list[int]] = {}
    aborted: set[int] = set()
    while waiting or runner.has_unfinished_requests():
        for _ in range(min(len(waiting), choose.choice([0, 0, 1, 3]))):
            index, request = waiting.pop()
            prompt = {"prompt_token_ids": request.prompt}
            runner.add_request(str(index), prompt, request.params.clone())
            got[index] = []
        for output in runner.step():
            index = int(output.request_id)
            got[index] = list(output.outputs[0].token_ids)
            after = requests[index].abort_after
            if after and len(got[index]) >= after and not output.finished:
                runner.abort_request([output.request_id])
                aborted.add(index)
    return {index: (answer, index in aborted) for index, answer in got.items()}


def live_tensors() -> int:
    """XLA tensors that Python holds."""
    gc.collect()
    return sum(
        isinstance(thing, torch.Tensor) and thing.device.type == "xla"
        for thing in gc.get_objects()
    )


@pytest.fixture(scope="module", params=MODES)
def llm(request):
    checkpoint = vllm_session.checkpoint("llama")
    with engine(checkpoint, **MODES[request.param], **OPTIONS) as llm:
        yield llm


def test_answers_are_those_alone(llm):
    requests = random_requests(REQUESTS, seed=1)
    with steady(llm):
        together = serve(llm, requests, seed=2)
        assert metric(llm, "num_preemptions") > 0
        assert any(was_aborted for _, was_aborted in together.values())
        oracle = vllm_session.oracle(vllm_session.checkpoint("llama"))
        for index, request in enumerate(requests):
            answer, was_aborted = together[index]
            (alone,) = tokens(generate(llm, [request.prompt], request.params))
            if was_aborted:
                assert answer == alone[: len(answer)], index
            else:
                assert answer == alone, index
            if request.is_plain:
                assert_greedy(oracle, request.prompt, alone)


def test_memory_is_flat(llm):
    """The same requests again and again leave nothing behind."""
    requests = random_requests(max(REQUESTS // 3, 20), seed=3)
    for _ in range(2):  # whatever is made once
        serve(llm, requests, seed=4)
    tensors_held, resident = live_tensors(), psutil.Process().memory_info().rss
    with steady(llm):
        for _ in range(3):
            serve(llm, requests, seed=4)
    assert live_tensors() == tensors_held
    grown = psutil.Process().memory_info().rss - resident
    assert grown < 16 << 20, (
        f"{grown >> 20} MiB more after {3 * len(requests)} requests"
    )
