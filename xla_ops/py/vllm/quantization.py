"""Quantised checkpoints in vLLM's engine on XLA.

    import xla_ops.vllm.quantization  # registers; before a model's configuration

| checkpoint | what runs |
|---|---|
| fp8 (static or dynamic; and `quantization="fp8"`, quantised while loading) | fp8 |
| compressed-tensors fp8, per tensor or channel, static or per token | fp8 products |
| compressed-tensors int8, static or per token, with zero points or without | int8 |
| fp8 in blocks; fp8 weights alone; compressed-tensors of 4 and 8 bits; GPTQ; AWQ | the
model's dtype, dequantised while loading, and a line of the log says so |

`scaled_mm` has the products, `unpack` the numbers of few bits, `moe_weights` quantised
experts. Everything goes by registries of vLLM's: configurations of the same names
(`register_quantization_config`), and the tables of kernels for int8 and for weights of
few bits. A weight keeps the layout [out, in] of its checkpoint, which XLA's products
want; vLLM's own methods would transpose it.

Tested by tests/engine/test_quantization.py.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationStrategy
from torch.nn import functional as F
from vllm.logger import init_logger
from vllm.model_executor.layers import linear
from vllm.model_executor.layers.fused_moe.layer import FusedMoE
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.awq import AWQConfig, AWQLinearMethod
from vllm.model_executor.layers.quantization.compressed_tensors import (
    compressed_tensors,
)
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    CompressedTensorsW8A8Fp8,
    CompressedTensorsW8A8Int8,
    CompressedTensorsW8A16Fp8,
    CompressedTensorsWNA16,
)
from vllm.model_executor.layers.quantization.fp8 import Fp8Config, Fp8LinearMethod
from vllm.model_executor.layers.quantization.gptq import GPTQConfig, GPTQLinearMethod
from vllm.model_executor.layers.quantization.kernels import mixed_precision, scaled_mm
from vllm.model_executor.layers.quantization.kernels.mixed_precision import (
    MPLinearKernel,
    MPLinearLayerConfig,
)
from vllm.model_executor.layers.quantization.kernels.scaled_mm import (
    ScaledMMLinearKernel,
    ScaledMMLinearLayerConfig,
)
from vllm.model_executor.layers.quantization.mxfp4 import Mxfp4Config
from vllm.model_executor.layers.quantization.utils.gptq_utils import (
    get_linear_quant_method,
)
from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped
from vllm.model_executor.parameter import permute_param_layout_
from vllm.platforms import PlatformEnum

from ..ops import dynamic_scaled_fp8_quant
from . import moe_weights, unpack
from .scaled_mm import fp8_linear, int8_linear

logger = init_logger("vllm.xla_ops")

# What a user may name, for `Platform.supported_quantization`.
SUPPORTED = ["fp8", "compressed-tensors", "gptq", "awq", "mxfp4"]
_FLOATS = [torch.float32, torch.float16, torch.bfloat16]
_CODES = torch.float8_e4m3fn
_FP8_MIN = torch.finfo(torch.float32).min  # what vLLM has in scales not yet loaded

_registry = logging.getLogger("vllm.model_executor.layers.quantization")


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """vLLM warns of every configuration that takes the place of one of its own."""
    _registry.disabled = True
    try:
        yield
    finally:
        _registry.disabled = False


def _set(layer: Any, name: str, value: torch.Tensor | None) -> None:
    """Makes `value` the layer's parameter of that name, None to have none."""
    if name in layer._parameters or hasattr(layer, name):
        delattr(layer, name)
    if value is not None:
        value = torch.nn.Parameter(value.data.contiguous(), requires_grad=False)
    layer.register_parameter(name, value)


def _tell_dequantised(what: str, dtype: torch.dtype) -> None:
    logger.info_once(
        "xla_ops: %s weights are dequantised to %s while they are loaded, and take"
        " as much memory as a model that was never quantised",
        what,
        str(dtype).removeprefix("torch."),
    )


def shard_scales(scales: torch.Tensor, widths: list[int]) -> torch.Tensor:
    """One scale a shard of a fused layer, as one for each of its outputs, or for all.

    A checkpoint may have fused the layer itself, and then has loaded the first alone.
    """
    scales = scales.detach().float().reshape(-1)
    loaded = scales[scales > _FP8_MIN]
    if len(loaded) == 0:  # dummy weights
        return torch.ones(1)
    if len(loaded) == 1 or len(widths) == 1:
        return loaded.max().reshape(1)
    return torch.repeat_interleave(scales, torch.tensor(widths))


def _process_fp8(layer: Any, channels: bool) -> None:
    """After loading: the weight as it is, float32 scales for all or for each output."""
    if channels:
        scale = layer.weight_scale.detach().float().reshape(-1)
    else:
        scale = shard_scales(layer.weight_scale, layer.logical_widths)
    input_scale = getattr(layer, "input_scale", None)
    if input_scale is not None:
        input_scale = input_scale.detach().float().max().reshape(1)
    _set(layer, "weight", layer.weight)
    _set(layer, "weight_scale", scale)
    _set(layer, "input_scale", input_scale)


def _dequantise_blocks(layer: Any, scale: str) -> None:
    dtype = layer.orig_dtype
    _tell_dequantised("fp8 (in blocks)", dtype)
    scales = getattr(layer, scale).detach()
    weight = unpack.blocks(
        layer.weight.detach(), scales, layer.weight_block_size, dtype
    )
    for name in (scale, "input_scale"):
        _set(layer, name, None)
    _set(layer, "weight", weight)


def _apply_fp8(layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if layer.weight.dtype != torch.float8_e4m3fn:  # dequantised
        return F.linear(x, layer.weight, bias)
    return fp8_linear(x, layer.weight, layer.weight_scale, layer.input_scale, bias)


class XlaFp8LinearMethod(Fp8LinearMethod):
    """Checkpoints of `quant_method: fp8`, and models quantised while loading."""

    def __init__(self, quant_config: Fp8Config):
        # Not vLLM's: it looks for its own kernels.
        self.quant_config = quant_config
        self.weight_block_size = quant_config.weight_block_size
        self.block_quant = self.weight_block_size is not None
        self.act_q_static = quant_config.activation_scheme == "static"
        self.use_marlin = False
        self.marlin_input_dtype = None

    def process_weights_after_loading(self, layer: Any) -> None:
        if getattr(layer, "_already_called_process_weights_after_loading", False):
            return
        if self.block_quant:
            _dequantise_blocks(layer, "weight_scale_inv")
        elif self.quant_config.is_checkpoint_fp8_serialized:
            _process_fp8(layer, channels=False)
        else:
            codes, scale = dynamic_scaled_fp8_quant(layer.weight.detach())
            _set(layer, "weight", codes)
            _set(layer, "weight_scale", scale)
            _set(layer, "input_scale", None)

    def leave_empty(self, layer: Any) -> None:
        """Codes and scale of dummy weights, which `loading` then makes."""
        _set(layer, "weight", torch.empty(layer.weight.shape, dtype=_CODES))
        _set(layer, "weight_scale", torch.empty(1))
        _set(layer, "input_scale", None)
        layer._already_called_process_weights_after_loading = True

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return _apply_fp8(layer, x, bias)


class XlaFp8Config(Fp8Config):
    @property
    def quantises_on_load(self) -> bool:
        """Whether the checkpoint has weights of the model's dtype."""
        return not self.is_checkpoint_fp8_serialized

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return _FLOATS

    @classmethod
    def get_min_capability(cls) -> int:
        return 0  # XLA widens codes where the GPU has no fp8 product

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        if not isinstance(layer, LinearBase | FusedMoE):
            return super().get_quant_method(layer, prefix)
        skipped = is_layer_skipped(
            prefix=prefix,
            ignored_layers=self.ignored_layers,
            fused_mapping=self.packed_modules_mapping,
        )
        if isinstance(layer, FusedMoE):
            if skipped:
                return moe_weights.unquantised(layer)
            if not self.is_checkpoint_fp8_serialized:
                return moe_weights.left_unquantised(layer)
            return moe_weights.XlaFp8MoEMethod(self, layer)
        return UnquantizedLinearMethod() if skipped else XlaFp8LinearMethod(self)


class XlaW8A8Fp8(CompressedTensorsW8A8Fp8):
    def __init__(self, weight_quant: Any, is_static_input_scheme: bool):
        self.weight_quant = weight_quant
        self.strategy = weight_quant.strategy
        self.is_static_input_scheme = is_static_input_scheme
        self.weight_block_size = weight_quant.block_structure

    def process_weights_after_loading(self, layer: Any) -> None:
        if self.strategy == QuantizationStrategy.BLOCK:
            _dequantise_blocks(layer, "weight_scale")
        else:
            _process_fp8(layer, self.strategy == QuantizationStrategy.CHANNEL)

    def apply_weights(
        self,
        layer: Any,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return _apply_fp8(layer, x, bias)


class XlaW8A16Fp8(CompressedTensorsW8A16Fp8):
    def process_weights_after_loading(self, layer: Any) -> None:
        _tell_dequantised("fp8 (weights alone)", layer.orig_dtype)
        _process_fp8(layer, self.strategy == QuantizationStrategy.CHANNEL)
        weight = layer.weight.float() * layer.weight_scale.reshape(-1, 1)
        _set(layer, "weight_scale", None)
        _set(layer, "input_scale", None)
        _set(layer, "weight", weight.to(layer.orig_dtype))

    def apply_weights(
        self,
        layer: Any,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return F.linear(x, layer.weight, bias)


class XlaCompressedTensorsConfig(compressed_tensors.CompressedTensorsConfig):
    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def _check_scheme_supported(*args: Any, **kwargs: Any) -> bool:
        return True  # the schemes below run on any device

    @staticmethod
    def supports_cutlass_24(
        weight_quant: Any, input_quant: Any, sparsity_scheme: Any = None
    ) -> bool:
        if sparsity_scheme is not None and sparsity_scheme.format != "dense":
            raise NotImplementedError(
                "compressed-tensors: sparsity must be dense on XLA, got"
                f" {sparsity_scheme.format}"
            )
        return False

    def _get_scheme_from_parts(
        self,
        weight_quant: Any,
        input_quant: Any,
        format: str | None = None,
        layer_name: str | None = None,
    ) -> Any:
        format = format if format is not None else self.quant_format
        if input_quant is None:
            packed = format == "pack-quantized" and weight_quant.num_bits in (4, 8)
            if packed and self._is_wNa16_group_channel(weight_quant, None):
                return CompressedTensorsWNA16(
                    num_bits=weight_quant.num_bits,
                    strategy=weight_quant.strategy,
                    symmetric=weight_quant.symmetric,
                    group_size=weight_quant.group_size,
                    actorder=weight_quant.actorder,
                )
            if (
                weight_quant.num_bits == 8
                and self._is_fp8_w8a16(weight_quant, None)
                and weight_quant.strategy != QuantizationStrategy.BLOCK
            ):
                return XlaW8A16Fp8(weight_quant.strategy, False)
        elif weight_quant.num_bits == input_quant.num_bits == 8:
            if self._is_fp8_w8a8(weight_quant, input_quant):
                return XlaW8A8Fp8(weight_quant, not input_quant.dynamic)
            is_static = self._is_static_tensor_w8a8(weight_quant, input_quant)
            if is_static or self._is_dynamic_token_w8a8(weight_quant, input_quant):
                return CompressedTensorsW8A8Int8(
                    strategy=weight_quant.strategy,
                    is_static_input_scheme=is_static,
                    input_symmetric=input_quant.symmetric,
                )
        inputs = input_quant.num_bits if input_quant is not None else 16
        raise NotImplementedError(
            "compressed-tensors: a layer must be fp8 or int8 w8a8, or have packed"
            f" weights of 4 or 8 bits on XLA, got w{weight_quant.num_bits}a{inputs}"
            f" {weight_quant.type} by {weight_quant.strategy} in format {format}"
        )

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        if isinstance(layer, FusedMoE):
            return moe_weights.compressed_tensors_method(self, layer, prefix)
        return super().get_quant_method(layer, prefix)


class XlaInt8Kernel(ScaledMMLinearKernel):
    """int8 w8a8 of compressed-tensors."""

    @classmethod
    def is_supported(
        cls, compute_capability: int | None = None
    ) -> tuple[bool, str | None]:
        return True, None

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @classmethod
    def can_implement(cls, c: ScaledMMLinearLayerConfig) -> tuple[bool, str | None]:
        return True, None

    def process_weights_after_loading(self, layer: Any) -> None:
        weight = getattr(layer, self.w_q_name).detach()
        scale = getattr(layer, self.w_s_name).detach().float().reshape(-1)
        if not self.config.is_channelwise:
            scale = shard_scales(scale, layer.logical_widths)
        input_scale = zero_point = sums = None
        if self.config.is_static_input_scheme:
            input_scale = getattr(layer, self.i_s_name).detach().float()
            if self.config.input_symmetric:
                input_scale = input_scale.max()
            else:
                input_scale, zero_point = _one_range(
                    input_scale, getattr(layer, self.i_zp_name).detach()
                )
                zero_point = zero_point.reshape(1)
            input_scale = input_scale.reshape(1)
        if not self.config.input_symmetric:
            sums = weight.sum(1, dtype=torch.int32)
        _set(layer, self.w_q_name, weight)
        _set(layer, self.w_s_name, scale)
        _set(layer, self.i_s_name, input_scale)
        _set(layer, self.i_zp_name, zero_point)
        _set(layer, self.azp_adj_name, sums)

    def apply_weights(
        self,
        layer: Any,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        weight, scale, input_scale, zero_point, sums = self._get_weight_params(layer)
        return int8_linear(x, weight, scale, input_scale, zero_point, sums, bias)


def _one_range(
    scales: torch.Tensor, zero_points: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale and zero point whose range holds those of all shards."""
    zero_points = zero_points.to(torch.int32)
    high = (scales * (127 - zero_points)).max()
    low = (scales * (-128 - zero_points)).min()
    scale = (high - low) / 255
    return scale, (-128 - low / scale).round().to(torch.int32)


class XlaDequantisingKernel(MPLinearKernel):
    """Weights of 4 or 8 bits beside activations that are not quantised."""

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        if c.weight_type.size_bits not in (4, 8) or c.weight_type.is_floating_point():
            return False, "only integers of 4 or 8 bits"
        return True, None

    def process_weights_after_loading(self, layer: Any) -> None:
        c = self.config
        bits = c.weight_type.size_bits
        _tell_dequantised(f"{bits}-bit", c.act_type)
        packed, scales, zeros, group_of = self._get_weight_params(layer)
        permute_param_layout_(packed, input_dim=1, output_dim=0, packed_dim=1)
        permute_param_layout_(scales, input_dim=1, output_dim=0)
        numbers = unpack.integers(packed.data, bits, 1)
        in_features = numbers.shape[1]
        if c.zero_points:
            permute_param_layout_(zeros, input_dim=1, output_dim=0, packed_dim=0)
            offset = unpack.integers(zeros.data, bits, 0)
        else:
            offset = c.weight_type.bias
        if not c.has_g_idx:
            size = in_features if c.group_size == -1 else c.group_size
            group_of = torch.arange(in_features) // size
        weight = unpack.grouped(numbers, scales.data, offset, group_of, c.act_type)
        for name in (self.w_q_name, self.w_s_name, self.w_zp_name, self.w_gidx_name):
            if name is not None and hasattr(layer, name):
                _set(layer, name, None)
        _set(layer, "weight", weight)

    def apply_weights(
        self,
        layer: Any,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return F.linear(x, layer.weight, bias)


class XlaGPTQLinearMethod(GPTQLinearMethod):
    def process_weights_after_loading(self, layer: Any) -> None:
        config = self.quant_config
        dtype = layer.scales.dtype
        _tell_dequantised(f"{config.weight_bits}-bit GPTQ", dtype)
        numbers = unpack.integers(layer.qweight.data, config.weight_bits, 0)
        zeros = unpack.integers(layer.qzeros.data, config.weight_bits, 1)
        if not self.use_v2_format:
            zeros = zeros + 1
        in_features = numbers.shape[0]
        if config.desc_act:
            group_of = layer.g_idx.data
        else:
            size = in_features if config.group_size == -1 else config.group_size
            group_of = torch.arange(in_features) // size
        weight = unpack.grouped(
            numbers.t(), layer.scales.data.t(), zeros.t(), group_of, dtype
        )
        for name in ("qweight", "qzeros", "scales", "g_idx"):
            _set(layer, name, None)
        _set(layer, "weight", weight)

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return F.linear(x, layer.weight, bias)


class XlaGPTQConfig(GPTQConfig):
    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return _FLOATS

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        if isinstance(layer, FusedMoE):
            moe_weights.refuse("gptq")
        return get_linear_quant_method(self, layer, prefix, XlaGPTQLinearMethod)


class XlaAWQLinearMethod(AWQLinearMethod):
    def process_weights_after_loading(self, layer: Any) -> None:
        dtype = layer.scales.dtype
        _tell_dequantised("4-bit AWQ", dtype)
        size = self.quant_config.group_size
        weight = unpack.awq(
            layer.qweight.data,
            layer.qzeros.data,
            layer.scales.data,
            size if size != -1 else layer.qweight.shape[0],
            dtype,
        )
        for name in ("qweight", "qzeros", "scales"):
            _set(layer, name, None)
        _set(layer, "weight", weight)

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return F.linear(x, layer.weight, bias)


class XlaAWQConfig(AWQConfig):
    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return _FLOATS

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        if not isinstance(layer, LinearBase | FusedMoE):
            return super().get_quant_method(layer, prefix)
        if is_layer_skipped(
            prefix,
            self.modules_to_not_convert,
            self.packed_modules_mapping,
            skip_with_substr=True,
        ):
            if isinstance(layer, FusedMoE):
                return moe_weights.unquantised(layer)
            return UnquantizedLinearMethod()
        if isinstance(layer, FusedMoE):
            moe_weights.refuse("awq")
        return XlaAWQLinearMethod(self)


class XlaMxfp4Config(Mxfp4Config):
    """gpt-oss: experts of MXFP4, the rest as it is."""

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return _FLOATS

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        if isinstance(layer, FusedMoE):
            return moe_weights.XlaMxfp4MoEMethod(layer.moe_config)
        return super().get_quant_method(layer, prefix)


with _quietly():
    register_quantization_config("fp8")(XlaFp8Config)
    register_quantization_config("compressed-tensors")(XlaCompressedTensorsConfig)
    register_quantization_config("gptq")(XlaGPTQConfig)
    register_quantization_config("awq")(XlaAWQConfig)
    register_quantization_config("mxfp4")(XlaMxfp4Config)
# vLLM chooses by a class's name how its parameters are loaded: by themselves (v2).
linear.WEIGHT_LOADER_V2_SUPPORTED += [
    method.__name__
    for method in (XlaFp8LinearMethod, XlaGPTQLinearMethod, XlaAWQLinearMethod)
]
scaled_mm._POSSIBLE_KERNELS[PlatformEnum.OOT] = [XlaInt8Kernel]
# One list for all platforms: first, so that none is asked which looks for CUDA.
mixed_precision._POSSIBLE_KERNELS.insert(0, XlaDequantisingKernel)
