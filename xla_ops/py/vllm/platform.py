"""XLA as a platform of vLLM's: what it is, what it needs set, what it refuses.

vLLM asks for it by the entry point in xla_ops_vllm.py. What cannot work is refused
here, when the engine's configuration is made: before weights are read, and by name.

Tested by tests/engine/test_platform.py.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import vllm
from vllm.logger import init_logger
from vllm.platforms.interface import DeviceCapability, Platform, PlatformEnum

from ..gpu import visible

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.utils.argparse_utils import FlexibleArgumentParser

logger = init_logger("vllm.xla_ops")

VERSIONS = ("0.12.0", "0.13.0")
# vLLM's own word for a kernel that wants nothing: the CPU client runs all of them.
_CPU_CAPABILITY = DeviceCapability(9, 0)
_BLOCK_SIZE = 16


def check_version(version: str) -> None:
    """Raises ImportError where this is another vLLM than those that are known."""
    if version.split("+")[0] not in VERSIONS:
        raise ImportError(
            f"xla_ops: vllm must be {' or '.join(VERSIONS)} to run on XLA, got"
            f" {version}: install vllm==0.13.0, or unset PJRT_DEVICE to run without XLA"
        )


check_version(vllm.__version__)


def is_gpu() -> bool:
    """Whether the client is a GPU's; asks the environment, makes no client."""
    return os.environ.get("PJRT_DEVICE") in ("GPU", "CUDA")


@functools.cache
def _device() -> Any:
    """The first visible GPU, or None."""
    from ..gpu import driver

    try:
        return driver.query().devices[0]
    except driver.DriverError:
        return None  # the client's own error says more


class XlaPlatform(Platform):
    """vLLM's platform for models that run as XLA programs with these custom calls."""

    _enum = PlatformEnum.OOT
    device_name = "xla"
    device_type = "xla"
    dispatch_key = "XLA"
    dist_backend = "gloo"
    # For helpers of vLLM's that it compiles at import: they see CPU tensors.
    simple_compile_backend = "eager"

    # Whether a command line said what --async-scheduling is to be.
    _from_command_line = False

    @classmethod
    def pre_register_and_update(
        cls, parser: FlexibleArgumentParser | None = None
    ) -> None:
        if parser is not None:
            cls._from_command_line = True
            parser.set_defaults(async_scheduling=None)

    @classmethod
    def import_kernels(cls) -> None:
        from .lowerings import register_lowerings

        register_lowerings()

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        device = _device() if is_gpu() else None
        return f"XLA on {device.name}" if device else "XLA on the CPU"

    @classmethod
    def get_device_capability(cls, device_id: int = 0) -> DeviceCapability | None:
        if not is_gpu():
            return _CPU_CAPABILITY
        device = _device()
        return DeviceCapability(*device.capability) if device else None

    @classmethod
    def get_device_total_memory(cls, device_id: int = 0) -> int:
        if is_gpu():
            device = _device()
            return device.memory_bytes if device else 0
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    @classmethod
    def supports_fp8(cls) -> bool:
        return True

    @classmethod
    def inference_mode(cls) -> Any:
        # Views of inference tensors are not tracked, and would be written by copies.
        return torch.no_grad()

    @classmethod
    def is_pin_memory_available(cls) -> bool:
        return False

    @classmethod
    def get_current_memory_usage(cls, device: object = None) -> float:
        from .memory import bytes_used

        return float(bytes_used())

    @classmethod
    def check_if_supports_dtype(cls, dtype: torch.dtype) -> None:
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(
                "xla_ops: dtype must be float32, float16 or bfloat16, got"
                f" {str(dtype).removeprefix('torch.')}"
            )

    @classmethod
    def verify_quantization(cls, quant: str) -> None:
        """Raises ValueError where a checkpoint's quantisation is not known here.

        And registers what is, before vLLM asks for it.
        """
        from . import quantization

        if quant is not None and quant not in quantization.SUPPORTED:
            raise ValueError(
                "xla_ops: quantization must be one of"
                f" {', '.join(quantization.SUPPORTED)} on XLA, got {quant}"
            )

    @classmethod
    def set_device(cls, device: torch.device) -> None:
        pass

    @classmethod
    def support_hybrid_kv_cache(cls) -> bool:
        return True

    @classmethod
    def get_attn_backend_cls(cls, *args: Any, **kwargs: Any) -> str:
        """Raises NotImplementedError for attention without heads of K and V."""
        config = args[1] if len(args) == 2 else kwargs.get("attn_selector_config")
        use_mla = config.use_mla if config is not None else bool(kwargs.get("use_mla"))
        use_sparse = (
            config.use_sparse if config is not None else bool(kwargs.get("use_sparse"))
        )
        if use_mla or use_sparse:
            raise NotImplementedError(
                "xla_ops: attention must have K and V heads, got a model with"
                " multi-head latent attention: set VLLM_MLA_DISABLE=1"
            )
        return "xla_ops.vllm.attention.XlaAttentionBackend"

    @classmethod
    def get_device_communicator_cls(cls) -> str:
        return "xla_ops.vllm.communicator.XlaCommunicator"

    @classmethod
    def get_punica_wrapper(cls) -> str:
        return "xla_ops.vllm.lora.XlaPunicaWrapper"

    @classmethod
    def can_update_inplace(cls) -> bool:
        return False  # LoRA layers then take what the wrapper returns

    @classmethod
    def check_and_update_config(cls, vllm_config: VllmConfig) -> None:
        if vllm_config.model_config is None:
            return  # vLLM makes such configurations for tests
        refuse(vllm_config)
        _update(vllm_config)


def _refused_models(model: ModelConfig) -> Iterator[tuple[str, str]]:
    """What is wrong with a model that vLLM would start, and what is taken instead."""
    names, config = set(model.architectures), model.hf_config
    # They call vLLM's kernels themselves.
    if "ArcticForCausalLM" in names or (
        "MiniCPMForCausalLM" in names and getattr(config, "num_experts", 0) > 0
    ):
        yield "one with experts of its own", "one whose experts are vLLM's layer"
    # It looks embeddings of each layer up beside the model's program.
    if "Gemma3nForConditionalGeneration" in names:
        yield "Gemma 3n", "one that takes tokens alone"
    if getattr(model, "uses_xdrope_dim", 0):
        yield "one with XD-RoPE", "one whose tokens have one position or three"
    if getattr(config, "dual_chunk_attention_config", None):
        yield "one with dual chunk attention", "one without"


def refuse(config: VllmConfig) -> None:
    """Raises NotImplementedError for what the engine on XLA cannot do."""
    model, parallel, cache = (
        config.model_config,
        config.parallel_config,
        config.cache_config,
    )
    speculative = config.speculative_config
    # vLLM 0.12 may have it in the environment alone.
    attention = getattr(getattr(config, "attention_config", None), "backend", None)
    asynchronous = config.additional_config.get("async_scheduling")
    profiler = getattr(getattr(config, "profiler_config", None), "profiler", None)
    observability = config.observability_config
    # With fewer, a long request would wait for ever. vLLM keeps one for padding.
    num_blocks, least_blocks = cache.num_gpu_blocks_override, 2
    if model.get_sliding_window() is None:
        block_size = max(cache.block_size or _BLOCK_SIZE, 1)
        least_blocks = -(-model.max_model_len // block_size) + 1
    num_devices = visible.count(os.environ) if is_gpu() else None
    # What is asked for; the argument that asks; what is taken.
    rules = [
        (
            config.lora_config is not None and parallel.tensor_parallel_size != 1,
            "tensor_parallel_size",
            parallel.tensor_parallel_size,
            "1 with enable_lora",
        ),
        (model.runner_type != "generate", "runner", model.runner_type, "generate"),
        (model.is_encoder_decoder, "model", "an encoder-decoder", "a decoder"),
        (model.has_inner_state, "model", "one with Mamba layers", "attention only"),
        (model.is_attention_free, "model", "one without attention", "attention"),
        *((True, "model", got, rule) for got, rule in _refused_models(model)),
        (
            model.attention_chunk_size is not None
            and model.max_model_len > model.attention_chunk_size,
            "max_model_len",
            model.max_model_len,
            f"at most {model.attention_chunk_size}, the model's attention_chunk_size,",
        ),
        (model.enable_prompt_embeds, "enable_prompt_embeds", True, "False"),
        (model.enable_sleep_mode, "enable_sleep_mode", True, "False"),
        *(
            (getattr(parallel, name) != 1, name, getattr(parallel, name), "1")
            for name in (
                "pipeline_parallel_size",
                "data_parallel_size",
                "decode_context_parallel_size",
                "prefill_context_parallel_size",
            )
            if hasattr(parallel, name)
        ),
        (
            parallel.world_size != 1 and parallel.distributed_executor_backend != "mp",
            "distributed_executor_backend",
            parallel.distributed_executor_backend,
            "mp with tensor_parallel_size",
        ),
        (getattr(parallel, "nnodes", 1) != 1, "nnodes", "more", "1"),
        (
            num_devices is not None and parallel.world_size > num_devices,
            "tensor_parallel_size",
            parallel.world_size,
            f"at most {num_devices}, the visible GPUs,",
        ),
        (parallel.enable_eplb, "enable_eplb", True, "False"),
        (getattr(parallel, "enable_dbo", False), "enable_dbo", True, "False"),
        (config.kv_transfer_config is not None, "kv_transfer_config", "one", "None"),
        (
            getattr(config, "ec_transfer_config", None) is not None,
            "ec_transfer_config",
            "one",
            "None",
        ),
        (
            speculative is not None and speculative.method != "ngram",
            "speculative_config",
            f"method {speculative.method}" if speculative else None,
            "None or of the method ngram",
        ),
        (
            config.lora_config is not None and config.lora_config.fully_sharded_loras,
            "fully_sharded_loras",
            True,
            "False",
        ),
        (cache.calculate_kv_scales, "calculate_kv_scales", True, "False"),
        (
            cache.cache_dtype not in ("auto", "fp8", "fp8_e4m3", "fp8_e5m2", "bfloat16")
            or (cache.cache_dtype == "bfloat16" and model.dtype != torch.bfloat16),
            "kv_cache_dtype",
            cache.cache_dtype,
            "auto, fp8, fp8_e4m3 or fp8_e5m2",
        ),
        (
            cache.block_size is not None and cache.block_size < 1,
            "block_size",
            cache.block_size,
            "at least 1",
        ),
        (
            num_blocks is not None and num_blocks < least_blocks,
            "num_gpu_blocks_override",
            num_blocks,
            f"at least {least_blocks}, those of a request of max_model_len and one,",
        ),
        (cache.cpu_offload_gb != 0, "cpu_offload_gb", cache.cpu_offload_gb, "0"),
        (
            getattr(cache, "kv_offloading_size", None) is not None,
            "kv_offloading_size",
            getattr(cache, "kv_offloading_size", None),
            "None",
        ),
        (
            attention is not None,
            "attention_backend",
            getattr(attention, "name", attention),
            "None, since there is one backend",
        ),
        (
            asynchronous not in (None, True, False),
            'additional_config["async_scheduling"]',
            repr(asynchronous),
            "True or False",
        ),
        (
            getattr(cache, "kv_sharing_fast_prefill", False),
            "kv_sharing_fast_prefill",
            True,
            "False",
        ),
        (profiler is not None, "profiler_config", f"one of {profiler}", "None"),
        (
            getattr(observability, "enable_layerwise_nvtx_tracing", False),
            "enable_layerwise_nvtx_tracing",
            True,
            "False",
        ),
        (
            os.environ.get("VLLM_BATCH_INVARIANT", "0") == "1",
            "VLLM_BATCH_INVARIANT",
            1,
            "0",
        ),
        (
            os.environ.get("VLLM_USE_V2_MODEL_RUNNER", "0") == "1",
            "VLLM_USE_V2_MODEL_RUNNER",
            1,
            "0",
        ),
    ]
    for is_refused, name, got, rule in rules:
        if is_refused:
            raise NotImplementedError(
                f"xla_ops: {name} must be {rule} on XLA, got {got}"
            )


def _update(config: VllmConfig) -> None:
    """Sets what the engine on XLA needs."""
    from vllm.config import CompilationMode, CUDAGraphMode

    if config.cache_config.block_size is None:
        config.cache_config.block_size = _BLOCK_SIZE
    # The runner has programs of its own.
    compilation = config.compilation_config
    compilation.mode = CompilationMode.NONE
    compilation.cudagraph_mode = CUDAGraphMode.NONE
    compilation.cudagraph_capture_sizes = []
    # vLLM's runner would pad steps for sequence parallelism, a pass that does not run.
    passes = compilation.pass_config
    has_sp = hasattr(passes, "enable_sp")  # vLLM 0.12 has the other name
    setattr(passes, "enable_sp" if has_sp else "enable_sequence_parallelism", False)
    config.model_config.disable_cascade_attn = True
    if config.parallel_config.worker_cls == "auto":
        config.parallel_config.worker_cls = "xla_ops.vllm.worker.XlaWorker"
    config.parallel_config.disable_custom_all_reduce = True
    # Weights are read and repacked on the host, and moved tensor by tensor.
    config.load_config.device = "cpu"
    # Neither torch_xla nor the CUDA driver, which has been asked for the GPU's name,
    # survives a fork.
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    from . import refused

    refused.install()
    if config.lora_config is not None:
        from . import preload

        preload.install()
    _set_async_scheduling(config)
    _take_text_alone(config)


def _set_async_scheduling(config: VllmConfig) -> None:
    """On, unless the command line or additional_config says no."""
    scheduler = config.scheduler_config
    asked = config.additional_config.get("async_scheduling")
    if config.speculative_config is not None:
        scheduler.async_scheduling = False
    elif asked is not None:
        scheduler.async_scheduling = asked
    elif not XlaPlatform._from_command_line:
        scheduler.async_scheduling = True


def _take_text_alone(config: VllmConfig) -> None:
    """Sets the number of images and the like that a request may have to none."""
    multimodal = config.model_config.multimodal_config
    if multimodal is None:
        return
    from vllm.config.multimodal import BaseDummyOptions

    logger.info("xla_ops: this model takes text alone here, no images, video or audio")
    for modality in ("image", "video", "audio"):
        multimodal.limit_per_prompt[modality] = BaseDummyOptions(count=0)
