"""Quantised experts of vLLM's layers on XLA: dequantised, or refused by name."""

import re

import pytest
import torch
import torch_xla
from vllm.model_executor.layers.fused_moe import FusedMoE
from vllm.model_executor.layers.quantization import get_quantization_config

import xla_ops.vllm.quantization  # noqa: F401, registers
from vllm_experts import dense, softmax_routing, swigluoai
from vllm_layers import (  # noqa: F401, fixtures among them
    built_as,
    engine_log,
    host_and_xla,
    on_xla,
    one_rank,
    w8a8,
)

pytestmark = pytest.mark.usefixtures("one_rank")

CHANNEL, TOKEN = {"strategy": "channel"}, {"strategy": "token", "dynamic": True}
FP8_DYNAMIC = {"quant_method": "fp8", "activation_scheme": "dynamic"}


def fp8_weight(*shape):
    return (torch.randn(*shape) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)


def moe(method, config, dtype=torch.bfloat16, hidden=128, intermediate=64, **options):
    with built_as(dtype):
        quant_config = get_quantization_config(method).from_config(config)
        return FusedMoE(
            num_experts=4,
            top_k=2,
            hidden_size=hidden,
            intermediate_size=intermediate,
            params_dtype=dtype,
            quant_config=quant_config,
            prefix=f"layers.{method}.{len(str(config))}.{id(options)}.experts",
            **options,
        )


def check_moe(layer, given, lazily, activation=None):
    """given: exact w13_weight, w2_weight (and biases), which are held rounded."""
    rounded = {name: t.to(torch.bfloat16) for name, t in given.items()}
    for name, value in rounded.items():
        assert torch.equal(getattr(layer, name).data, value)
    left = {name for name, _ in layer.named_parameters()}
    assert left == set(given), "quantised weights are kept"
    x = torch.randn(9, 128).bfloat16()
    logits = torch.randn(9, 4).bfloat16()
    wanted = dense(
        *(x, rounded, *softmax_routing(logits, 2, True)),
        **({} if activation is None else {"activation": activation}),
    )
    if lazily:
        device = torch_xla.device()
        out = on_xla(layer)(x.to(device), logits.to(device)).cpu()
    else:
        out = layer(x, logits)
    error = (out.double() - wanted).abs().max() / wanted.abs().max()
    assert error < 2.0**-5


@pytest.mark.parametrize("blocks", [False, True], ids=["tensor", "blocks"])
def test_fp8_experts(lazily, blocks, log):
    config = FP8_DYNAMIC | ({"weight_block_size": [32, 64]} if blocks else {})
    layer = moe("fp8", config)
    codes = {"w13": fp8_weight(4, 128, 128), "w2": fp8_weight(4, 128, 64)}
    given = {}
    for name, weight in codes.items():
        getattr(layer, f"{name}_weight").data.copy_(weight)
        if blocks:
            scales = torch.rand(4, 4, weight.shape[2] // 64) / 100
            getattr(layer, f"{name}_weight_scale_inv").data.copy_(scales)
            factors = scales.repeat_interleave(32, 1).repeat_interleave(64, 2)
        else:
            scales = torch.rand(4, 2 if name == "w13" else 1) / 100
            held = getattr(layer, f"{name}_weight_scale")
            held.data.copy_(scales.view(held.shape))
            size = weight.shape[1] // scales.shape[1]
            factors = scales.repeat_interleave(size, 1).unsqueeze(-1)
        given[f"{name}_weight"] = weight.float() * factors
    layer.quant_method.process_weights_after_loading(layer)
    assert "fp8 experts are dequantised to bfloat16" in log.text
    check_moe(layer, given, lazily)


def test_mxfp4_experts(lazily, log):
    layer = moe("mxfp4", {}, activation="swigluoai", has_bias=True)
    magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    table = torch.tensor(magnitudes + [-m for m in magnitudes])
    given = {}
    for name, shape in (("w13", (4, 128, 128)), ("w2", (4, 128, 64))):
        numbers = torch.randint(0, 16, shape)
        exponents = torch.randint(120, 126, (*shape[:2], shape[2] // 32))
        packed = numbers[..., ::2] | numbers[..., 1::2] << 4
        getattr(layer, f"{name}_weight").data.copy_(packed)
        getattr(layer, f"{name}_weight_scale").data.copy_(exponents)
        factors = (2.0 ** (exponents - 127)).repeat_interleave(32, -1)
        given[f"{name}_weight"] = table[numbers] * factors
        given[f"{name}_bias"] = torch.randn(4, 128)
        getattr(layer, f"{name}_bias").data.copy_(given[f"{name}_bias"])
    layer.quant_method.process_weights_after_loading(layer)
    assert "MXFP4 experts are dequantised to bfloat16" in log.text
    check_moe(layer, given, lazily, swigluoai)


def test_mxfp4_experts_hold_the_blocks_that_a_rank_gets():
    """Of gpt-oss' 2880 columns over four ranks: 23 blocks of 32, which are 736."""
    layer = moe("mxfp4", {}, activation="swigluoai", has_bias=True, intermediate=720)
    shapes = {name: tuple(t.shape) for name, t in layer.named_parameters()}
    assert shapes["w13_weight"][1] == shapes["w13_bias"][1] == 2 * 768
    assert shapes["w2_weight"][2] == 768 // 2
    assert shapes["w2_weight_scale"][2] == 768 // 32
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(5, 128).bfloat16()
    assert not layer(x, torch.randn(5, 4).bfloat16()).any()  # all of it is zero


def test_experts_of_an_online_model_stay_as_they_are(log):
    layer = moe("fp8", {"quant_method": "other", "activation_scheme": "dynamic"})
    assert layer.w13_weight.dtype == torch.bfloat16
    assert "experts are not quantised while they are loaded" in log.text


@pytest.mark.parametrize(
    "method, config, message",
    [
        (
            *("gptq", {"bits": 4, "group_size": 32, "desc_act": False}),
            "gptq: experts must not be quantised, or be fp8 or MXFP4, on XLA, got gptq",
        ),
        (
            *("awq", {"bits": 4, "group_size": 32, "zero_point": True}),
            "awq: experts must not be quantised, or be fp8 or MXFP4, on XLA, got awq",
        ),
        (
            *(
                "compressed-tensors",
                w8a8(
                    "int",
                    {"strategy": "channel"},
                    {"strategy": "token", "dynamic": True},
                ),
            ),
            "compressed-tensors: experts must not be quantised, or be fp8 or MXFP4, on"
            " XLA, got 8-bit int",
        ),
    ],
)
def test_experts_that_are_refused(method, config, message):
    with pytest.raises(NotImplementedError, match=re.escape(message)):
        moe(method, config)
