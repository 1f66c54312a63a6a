"""What the engine on XLA cannot do is refused before weights are read, by name."""

import pytest
from vllm import envs
from vllm.engine.arg_utils import EngineArgs

import vllm_session
from xla_ops.vllm import platform

REFUSED = {
    "runner": dict(runner="pooling"),
    "enable_prompt_embeds": dict(enable_prompt_embeds=True),
    "distributed_executor_backend": dict(
        tensor_parallel_size=2, distributed_executor_backend="uni"
    ),
    "pipeline_parallel_size": dict(pipeline_parallel_size=2),
    "fully_sharded_loras": dict(enable_lora=True, fully_sharded_loras=True),
    "calculate_kv_scales": dict(calculate_kv_scales=True, kv_cache_dtype="fp8"),
    "kv_cache_dtype": dict(kv_cache_dtype="fp8_inc"),
    "block_size": dict(block_size=0),
    "num_gpu_blocks_override": dict(num_gpu_blocks_override=8, max_model_len=128),
    "cpu_offload_gb": dict(cpu_offload_gb=1),
    "kv_offloading_size": dict(kv_offloading_size=1),
    "attention_backend": dict(attention_backend="TRITON_ATTN"),
    "additional_config": dict(additional_config={"async_scheduling": "no"}),
    "kv_sharing_fast_prefill": dict(kv_sharing_fast_prefill=True),
    "enable_dbo": dict(enable_dbo=True, all2all_backend="deepep_low_latency"),
    "enable_layerwise_nvtx_tracing": dict(enable_layerwise_nvtx_tracing=True),
    "profiler_config": dict(
        profiler_config={"profiler": "torch", "torch_profiler_dir": "/nowhere"}
    ),
}


def config(family="llama", **options):
    checkpoint = vllm_session.checkpoint(family)
    return EngineArgs(model=str(checkpoint), **options).create_engine_config()


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    with pytest.raises(
        NotImplementedError, match=rf"xla_ops: {name}\S* must be .+, got"
    ):
        config(**REFUSED[name])


def test_a_request_fits_into_the_cache():
    config(num_gpu_blocks_override=9, max_model_len=128)
    config(num_gpu_blocks_override=5, max_model_len=128, block_size=32)


def test_lora_on_several_devices_is_refused():
    with pytest.raises(NotImplementedError, match="must be 1 with enable_lora on XLA"):
        config(enable_lora=True, tensor_parallel_size=2)


def test_more_workers_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(platform, "is_gpu", lambda: True)
    monkeypatch.setattr(platform.visible, "count", lambda environ: 1)
    with pytest.raises(NotImplementedError, match="at most 1, the visible GPUs, on"):
        config(tensor_parallel_size=2)


def refused(made):
    with pytest.raises(NotImplementedError) as raised:
        platform.refuse(made)
    return str(raised.value)


@pytest.mark.parametrize(
    "architecture, options, message",
    [
        ("ArcticForCausalLM", {}, "experts are vLLM's layer on XLA, got one with exp"),
        ("MiniCPMForCausalLM", {"num_experts": 4}, "got one with experts of its own"),
        ("Gemma3nForConditionalGeneration", {}, "takes tokens alone on XLA, got Gemma"),
        (None, {"dual_chunk_attention_config": {"chunk_size": 8}}, "got one with dual"),
    ],
)
def test_models_that_are_refused(architecture, options, message):
    made = config()
    hf_config = made.model_config.hf_config
    if architecture is not None:
        hf_config.architectures = [architecture]
    hf_config.update(options)
    assert message in refused(made)


def test_positions_in_four_rows_are_refused(monkeypatch):
    made = config()
    kind = type(made.model_config)
    monkeypatch.setattr(kind, "uses_xdrope_dim", 4, raising=False)
    assert "must be one whose tokens have one position or three" in refused(made)


def test_chunks_of_attention_are_refused_where_a_request_may_leave_one():
    made = config(max_model_len=128)
    made.model_config.attention_chunk_size = 128
    platform.refuse(made)
    made.model_config.attention_chunk_size = 64
    assert "max_model_len must be at most 64, the model's att" in refused(made)


def test_batch_invariance_is_refused(monkeypatch):
    made = config()
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert "VLLM_BATCH_INVARIANT must be 0 on XLA, got 1" in refused(made)


def test_no_pass_pads_steps():
    passes = {"pass_config": {"enable_sp": True}}
    made = config(tensor_parallel_size=2, compilation_config=passes)
    assert made.compilation_config.pass_config.enable_sp is False


def test_defaults():
    made = config()
    assert made.scheduler_config.async_scheduling
    assert made.cache_config.block_size == 16
    assert made.parallel_config.worker_cls == "xla_ops.vllm.worker.XlaWorker"
    # As vLLM reads it: torch_xla and the CUDA driver do not survive a fork.
    assert envs.VLLM_WORKER_MULTIPROC_METHOD == "spawn"


def test_sleep_mode_is_refused_by_vllm():
    with pytest.raises(ValueError, match="[Ss]leep mode is not supported"):
        config(enable_sleep_mode=True)
