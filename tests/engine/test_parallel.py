"""A model over several workers, a process and a device each, by vLLM's own executor.

On the CPU client the workers' collectives are a custom call (programs/processes.py);
what is traced and what vLLM does is the same as on GPUs. XLA_OPS_TEST_MODELS=all takes
more models, with an engine or two each.
"""

import os
import re
import signal
import time

import pytest
from vllm import SamplingParams

import vllm_session
from vllm_checkpoints import VOCABULARY, save_checkpoint
from vllm_in_process import core, engine, generate, greedy, tokens
from vllm_oracle import assert_greedy, worst_difference
from vllm_quantized import SCHEMES, base_config, save_quantized
from vllm_workers import facts

PROMPTS = [
    [(start * 31 + 7 * i + i * i) % (VOCABULARY - 5) + 5 for i in range(length)]
    for start, length in enumerate([4, 17, 40, 90, 130])
]
NGRAM = dict(
    method="ngram",
    num_speculative_tokens=3,
    prompt_lookup_min=1,
    prompt_lookup_max=3,
)
HLO = vllm_session.FOLDER / "parallel_hlo"


def of_workers(llm) -> list[dict]:
    return core(llm).model_executor.collective_rpc(facts)


@pytest.fixture(scope="module")
def one():
    """What one device makes of these requests, and the bytes of its weights."""
    with engine(vllm_session.checkpoint("llama")) as llm:
        runner = core(llm).model_executor.driver_worker.worker.model_runner
        return tokens(generate(llm, PROMPTS, random())), runner.model_memory_usage


@pytest.fixture(scope="module")
def two():
    with pytest.MonkeyPatch.context() as patch:
        flags = f"--xla_dump_to={HLO} --xla_dump_hlo_as_text"
        patch.setenv("XLA_FLAGS", f"{os.environ.get('XLA_FLAGS', '')} {flags}")
        with engine(vllm_session.checkpoint("llama"), tensor_parallel_size=2) as llm:
            yield llm


def random():
    return SamplingParams(temperature=1.0, seed=3, max_tokens=8, ignore_eos=True)


def test_tokens_and_logprobs(two, one):
    before = of_workers(two)
    outputs = generate(two, PROMPTS, greedy(12, logprobs=2, prompt_logprobs=1))
    oracle = vllm_session.oracle(vllm_session.checkpoint("llama"))
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        (answer,) = output.outputs
        assert_greedy(oracle, prompt, answer.token_ids)
        got = (answer.token_ids, answer.logprobs)
        assert worst_difference(oracle, prompt, *got) < 1e-3
    sampled, whole_bytes = one
    assert tokens(generate(two, PROMPTS, random())) == sampled
    after = of_workers(two)
    assert [f["rank"] for f in after] == [0, 1]
    for old, new in zip(before, after, strict=True):
        assert new["compiled"] == old["compiled"]
        assert new["addresses"] == old["addresses"]
        assert set(new["heads"]) == {1}  # of 2
        assert new["bytes"] < 0.6 * whole_bytes  # norms and rotary tables are whole


def test_two_sums_a_layer(two):
    """And one of the embedding; the logits are gathered."""
    counts = set()
    for path in HLO.glob("*after_optimizations.txt"):
        calls = re.findall(
            r'custom_call_target="xla_ops.host_collective".*?gathers = (\w+)',
            path.read_text(),
        )
        if "false" in calls:
            counts.add((calls.count("false"), calls.count("true")))
    assert counts == {(2 * 2 + 1, 1)}


def test_a_killed_worker_ends_the_engine(two):
    executor = core(two).model_executor
    os.kill(executor.workers[1].proc.pid, signal.SIGKILL)

    def go_on():
        while time.monotonic() < end:
            generate(two, PROMPTS[:1], greedy(4))

    end = time.monotonic() + 60
    with pytest.raises(Exception, match=r"must live|Executor failed|cancelled|died"):
        go_on()
    executor.workers[0].proc.join(30)
    assert not any(worker.proc.is_alive() for worker in executor.workers)


FAMILIES = [
    ("qwen3_moe", 2, dict(enable_expert_parallel=True)),
    # Two KV heads, which vLLM gives to two workers each.
    ("qwen3", 4, {}),
    ("gemma3", 2, {}),
    ("llama", 2, dict(speculative_config=NGRAM)),
    ("qwen3_moe", 2, {}),
]
QUANTISED = ["fp8_static", "int8_static"]
FEW = None if os.environ.get("XLA_OPS_TEST_MODELS") == "all" else 1


@pytest.mark.parametrize("family, size, options", FAMILIES[:FEW])
def test_families(family, size, options):
    folder = vllm_session.checkpoint(family)
    with engine(folder, tensor_parallel_size=size, **options) as llm:
        answers = tokens(generate(llm, PROMPTS, greedy(12)))
    oracle = vllm_session.oracle(folder)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert_greedy(oracle, prompt, answer)


@pytest.mark.parametrize("name", QUANTISED[:FEW])
def test_quantised(name, tmp_path):
    """Static scales: those that follow a token would follow its part on each worker."""
    original = save_checkpoint(base_config(), tmp_path / "original")
    folder = save_quantized(original, SCHEMES[name], tmp_path / name)
    answers = []
    for size in (1, 2):
        with engine(folder, tensor_parallel_size=size) as llm:
            answers.append(tokens(generate(llm, PROMPTS, greedy(12))))
    assert answers[0] == answers[1]
