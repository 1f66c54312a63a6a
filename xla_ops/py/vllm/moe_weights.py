"""Quantised experts: dequantised while they are loaded, or refused by name.

`quantization` asks for these methods; `moe` computes their layers.

Tested by tests/engine/test_quantization.py.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.layer import (
    FusedMoE,
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.quantization.fp8 import Fp8MoEMethod
from vllm.model_executor.layers.quantization.mxfp4 import Mxfp4MoEMethod
from vllm.model_executor.utils import set_weight_attrs
from vllm.utils.math_utils import round_up

from . import unpack
from .moe import apply_experts

logger = init_logger("vllm.xla_ops")

_MXFP4_BLOCK = 32


def refuse(method: str, what: str = "") -> NoReturn:
    raise NotImplementedError(
        f"{method}: experts must not be quantised, or be fp8 or MXFP4, on XLA, got"
        f" {what or method}"
    )


def unquantised(layer: FusedMoE) -> UnquantizedFusedMoEMethod:
    return UnquantizedFusedMoEMethod(layer.moe_config)


def compressed_tensors_method(
    config: Any, layer: FusedMoE, prefix: str
) -> UnquantizedFusedMoEMethod:
    """For experts that the checkpoint left as they were."""
    config._add_fused_moe_to_target_scheme_map()
    names = [f"{prefix}.0.{part}_proj" for part in ("gate", "up", "down")]
    for name in names:
        if (scheme := config.get_scheme_dict(layer, name)) is not None:
            weights = scheme["weights"]
            refuse("compressed-tensors", f"{weights.num_bits}-bit {weights.type}")
    return unquantised(layer)


def left_unquantised(layer: FusedMoE) -> UnquantizedFusedMoEMethod:
    """For experts that the user asks to quantise while they are loaded."""
    logger.info_once("xla_ops: experts are not quantised while they are loaded")
    return unquantised(layer)


def _tell(what: str, dtype: torch.dtype) -> None:
    logger.info_once(
        "xla_ops: %s experts are dequantised to %s while they are loaded",
        what,
        str(dtype).removeprefix("torch."),
    )


def _set(layer: FusedMoE, name: str, value: torch.Tensor | None) -> None:
    if hasattr(layer, name):
        delattr(layer, name)
    if value is not None:
        value = torch.nn.Parameter(value.data.contiguous(), requires_grad=False)
    layer.register_parameter(name, value)


class _Dequantised:
    """What is the same for all of them, once the weights are numbers."""

    def get_fused_moe_quant_config(self, layer: FusedMoE) -> None:
        return None

    def maybe_make_prepare_finalize(self, *args: Any, **kwargs: Any) -> None:
        return None

    def apply(
        self, layer: FusedMoE, x: torch.Tensor, router_logits: torch.Tensor
    ) -> torch.Tensor:
        return apply_experts(layer, x, router_logits)


class XlaFp8MoEMethod(_Dequantised, Fp8MoEMethod):
    """fp8 experts with a scale a matrix, or a block of it."""

    def __init__(self, quant_config: Any, layer: FusedMoE):
        # Not Fp8MoEMethod's, which looks for its own kernels.
        super(Fp8MoEMethod, self).__init__(layer.moe_config)
        self.layer = layer
        self.quant_config = quant_config
        self.weight_block_size = quant_config.weight_block_size
        self.block_quant = self.weight_block_size is not None

    def process_weights_after_loading(self, layer: FusedMoE) -> None:
        dtype = layer.orig_dtype
        _tell("fp8", dtype)
        for name in ("w13", "w2"):
            codes = getattr(layer, f"{name}_weight").data
            if self.block_quant:
                scales = getattr(layer, f"{name}_weight_scale_inv").data
                block = self.weight_block_size
            else:
                scales = getattr(layer, f"{name}_weight_scale").data
                # [num_experts] or, of gate and up, [num_experts, 2].
                scales = scales.reshape(codes.shape[0], -1, 1)
                block = [codes.shape[1] // scales.shape[1], codes.shape[2]]
            weight = torch.empty(codes.shape, dtype=dtype)
            for expert in range(codes.shape[0]):
                weight[expert] = unpack.blocks(
                    codes[expert], scales[expert], block, dtype
                )
            _set(layer, f"{name}_weight", weight)
            scale = "weight_scale_inv" if self.block_quant else "weight_scale"
            _set(layer, f"{name}_{scale}", None)
            _set(layer, f"{name}_input_scale", None)


class XlaMxfp4MoEMethod(_Dequantised, Mxfp4MoEMethod):
    """gpt-oss' experts: two e2m1 a byte, a power of two for 32 of them."""

    def __init__(self, moe: Any):
        # Not Mxfp4MoEMethod's, which looks for its own kernels.
        super(Mxfp4MoEMethod, self).__init__(moe)

    def create_weights(
        self,
        layer: FusedMoE,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        layer.orig_dtype = params_dtype
        # vLLM shares whole blocks out to ranks, which may be more than a rank's part;
        # what it does not fill stays zero, and adds nothing.
        size = round_up(intermediate_size_per_partition, 2 * _MXFP4_BLOCK)
        shapes = {
            "w13_weight": (num_experts, 2 * size, hidden_size // 2),
            "w13_weight_scale": (num_experts, 2 * size, hidden_size // _MXFP4_BLOCK),
            "w2_weight": (num_experts, hidden_size, size // 2),
            "w2_weight_scale": (num_experts, hidden_size, size // _MXFP4_BLOCK),
            "w13_bias": (num_experts, 2 * size),
            "w2_bias": (num_experts, hidden_size),
        }
        for name, shape in shapes.items():
            dtype = params_dtype if name.endswith("bias") else torch.uint8
            parameter = torch.nn.Parameter(
                torch.zeros(shape, dtype=dtype), requires_grad=False
            )
            layer.register_parameter(name, parameter)
            set_weight_attrs(parameter, extra_weight_attrs)

    def process_weights_after_loading(self, layer: FusedMoE) -> None:
        dtype = layer.orig_dtype
        _tell("MXFP4", dtype)
        for name in ("w13", "w2"):
            packed = getattr(layer, f"{name}_weight").data
            scales = getattr(layer, f"{name}_weight_scale").data
            shape = (*packed.shape[:2], 2 * packed.shape[2])
            weight = torch.empty(shape, dtype=dtype)
            for expert in range(shape[0]):
                weight[expert] = unpack.mxfp4(packed[expert], scales[expert], dtype)
            _set(layer, f"{name}_weight", weight)
            _set(layer, f"{name}_weight_scale", None)
