"""vLLM's engine in this process: started for a checkpoint, watched, and ended.

Needs the plugin that the wheel registers.
"""

import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path

import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.debug.metrics as met
import vllm.model_executor.models.registry as registry
from vllm import LLM, SamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

import vllm_session  # noqa: F401 (the environment)

# vLLM looks at a model's class in a process of its own, to keep CUDA out of this one:
# ten seconds for each family.
registry._run_in_subprocess = lambda function: function()

# Small: a program for each of few sizes of a step, prompts in several chunks, and more
# requests than rows.
OPTIONS = dict(
    dtype="float32",
    max_model_len=256,
    max_num_seqs=8,
    max_num_batched_tokens=64,
    num_gpu_blocks_override=256,
    disable_log_stats=False,  # LLM.get_metrics
    seed=0,
)


@contextlib.contextmanager
def engine(checkpoint: Path, **options) -> Iterator[LLM]:
    """An LLM for a checkpoint. Afterwards another may follow in this process."""
    llm = LLM(model=str(checkpoint), **OPTIONS | options)
    if "speculative_config" in options:
        _hand_drafts_on(llm)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()
        gc.collect()


def _hand_drafts_on(llm: LLM) -> None:
    """What vLLM's engine does in a process of its own, and leaves out in this one."""
    engine_core = core(llm)
    step = engine_core.step_fn

    def step_and_hand_on():
        outputs, was_executed = step()
        engine_core.post_step(was_executed)
        return outputs, was_executed

    engine_core.step_fn = step_and_hand_on


def core(llm: LLM):
    return llm.llm_engine.engine_core.engine_core


def caches(llm: LLM) -> list:
    """The KV caches, one tensor a layer."""
    runner = core(llm).model_executor.driver_worker.worker.model_runner
    return runner.kv_caches


def metric(llm: LLM, name: str) -> float:
    """The value of a counter or gauge of vLLM's, without the prefix `vllm:`."""
    (found,) = [m for m in llm.get_metrics() if m.name == "vllm:" + name]
    return found.value


def compilations() -> int:
    """How many programs XLA has compiled in this process."""
    return met.counter_value("UncachedCompile") or 0


def addresses(llm: LLM) -> list[int]:
    xm.wait_device_ops()
    return [torch_xla._XLAC._unsafe_buffer_pointer(cache) for cache in caches(llm)]


@contextlib.contextmanager
def steady(llm: LLM) -> Iterator[None]:
    """Fails if XLA compiles anything meanwhile, or a KV cache ends up elsewhere."""
    compiled, places = compilations(), addresses(llm)
    yield
    assert compilations() == compiled, "a program was compiled after the warm-up"
    assert addresses(llm) == places, "a KV cache was copied"


def greedy(count: int, **options) -> SamplingParams:
    """Greedy decoding of exactly `count` tokens."""
    return SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, **options)


def generate(llm: LLM, prompts, params) -> list:
    """The outputs for lists of token ids."""
    return llm.generate(
        [{"prompt_token_ids": list(prompt)} for prompt in prompts],
        params,
        use_tqdm=False,
    )


def tokens(outputs) -> list[list[int]]:
    """The token ids of the first answer of each output."""
    return [list(output.outputs[0].token_ids) for output in outputs]
