"""Weights loaded again into a running engine, and other calls of its workers."""

import socket

import pytest
from vllm import SamplingParams

import vllm_checkpoints
import vllm_session
from vllm_checkpoints import OTHER, PROMPT
from vllm_in_process import core, engine, generate, greedy, tokens
from vllm_oracle import assert_greedy


def answers(llm):
    llm.reset_prefix_cache()
    return tokens(generate(llm, [PROMPT, OTHER], greedy(8)))


def assert_answers(llm, folder):
    oracle = vllm_session.oracle(folder)
    for prompt, answer in zip((PROMPT, OTHER), answers(llm), strict=True):
        assert_greedy(oracle, prompt, answer)


def reload(llm, folder=None):
    changed = {"load_config": {"load_format": "auto"}}
    if folder is not None:
        changed["model_config"] = {"model": str(folder)}
    llm.collective_rpc("update_config", args=(changed,))
    llm.collective_rpc("reload_weights")


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt_oss"])
def test_weights_are_reloaded(family):
    """Into an engine with dummy weights, and those of another checkpoint after them."""
    first = vllm_session.checkpoint(family)
    folder = vllm_session.FOLDER / f"{family}_other"
    second = vllm_checkpoints.save_family(family, folder, seed=7)
    with engine(first, load_format="dummy") as llm:
        before = answers(llm)
        reload(llm)
        assert_answers(llm, first)
        reload(llm, second)
        assert_answers(llm, second)
        assert answers(llm) != before


def test_calls_that_are_refused_change_nothing():
    folder = vllm_session.checkpoint("llama")
    with engine(folder, dtype="bfloat16", quantization="fp8") as llm:
        before = answers(llm)
        message = "load_weights must be of a model .* on XLA, got quantised weights"
        with pytest.raises(NotImplementedError, match=message):
            llm.collective_rpc("reload_weights")
        for name in ("save_sharded_state", "save_tensorized_model"):
            message = f"xla_ops: {name} must not be called on XLA"
            with pytest.raises(NotImplementedError, match=message):
                llm.collective_rpc(name, args=("/nowhere",))
        assert answers(llm) == before


def test_numbers_that_are_none_are_counted(monkeypatch):
    monkeypatch.setenv("VLLM_COMPUTE_NANS_IN_LOGITS", "1")
    folder = vllm_session.checkpoint("llama")
    with engine(folder) as llm:
        worker = core(llm).model_executor.driver_worker.worker
        counts, count = [], worker.model_runner._get_nans_in_logits
        worker.model_runner._get_nans_in_logits = lambda logits: (
            counts.append(count(logits)) or counts[-1]
        )
        assert_answers(llm, folder)
        found = [n for step in counts for n in step.values()]
        assert found and not any(found)
        params = SamplingParams(temperature=0, max_tokens=2)
        next(worker.model_runner.model.parameters()).data.fill_(float("nan"))
        generate(llm, [PROMPT], params)
        vocabulary = llm.llm_engine.vllm_config.model_config.get_vocab_size()
        assert [*counts[-1].values()] == [vocabulary]


def test_one_process_that_torchrun_started(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environ = dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1, MASTER_PORT=port)
    for name, value in (environ | {"MASTER_ADDR": "127.0.0.1"}).items():
        monkeypatch.setenv(name, str(value))
    folder = vllm_session.checkpoint("llama")
    with engine(folder, distributed_executor_backend="external_launcher") as llm:
        assert_answers(llm, folder)
