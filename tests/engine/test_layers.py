"""vLLM's layers run by custom calls give what their plain torch gives.

And a program of them has those calls.
"""

import pytest
import torch
import torch_xla
from torch.nn import functional as F
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers import activation, layernorm
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import (
    UnquantizedEmbeddingMethod,
)
from vllm.platforms.interface import DeviceCapability

from xla_ops.vllm import layers, linear  # noqa: F401, they register them


@pytest.fixture(autouse=True)
def config():
    made = VllmConfig()
    made.compilation_config.custom_ops = ["all"]
    with set_current_vllm_config(made):
        yield


def check(layer, call, *inputs, rtol=2e-2, atol=2e-2):
    """On an XLA device and on the host, against forward_native; by `call`."""
    native = layer.forward_native(*(t.clone() for t in inputs))
    device = torch_xla.device()
    on_device = layer.to(device)
    got = on_device(*(t.to(device) for t in inputs))
    first = got[0] if isinstance(got, tuple) else got
    hlo = torch_xla._XLAC._get_xla_tensors_hlo([first])
    assert f'custom_call_target="xla_ops.{call}"' in hlo
    pairs = zip(got, native, strict=True) if isinstance(got, tuple) else [(got, native)]
    for g, n in pairs:
        torch.testing.assert_close(g.cpu(), n, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual", [False, True])
def test_rms_norm(dtype, residual):
    layer = layernorm.RMSNorm(64, dtype=dtype).requires_grad_(False)
    layer.weight.uniform_(0.5, 1.5)
    inputs = [torch.randn(5, 64).to(dtype) for _ in range(1 + residual)]
    check(layer, "fused_add_rms_norm" if residual else "rms_norm", *inputs)


@pytest.mark.parametrize(
    "layer, call",
    [
        (lambda: activation.SiluAndMul(), "silu_and_mul"),
        (lambda: activation.MulAndSilu(), "mul_and_silu"),
        (lambda: activation.GeluAndMul(), "gelu_and_mul"),
        (lambda: activation.GeluAndMul("tanh"), "gelu_tanh_and_mul"),
        (lambda: activation.FatreluAndMul(0.3), "fatrelu_and_mul"),
        (lambda: activation.SwigluOAIAndMul(), "swigluoai_and_mul"),
        (lambda: activation.NewGELU(), "gelu_new"),
        (lambda: activation.FastGELU(), "gelu_fast"),
        (lambda: activation.QuickGELU(), "gelu_quick"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations(layer, call, dtype):
    check(layer(), call, torch.randn(7, 32).to(dtype))


@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize(
    "scaling",
    [
        {},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        {"rope_type": "linear", "factor": 2.0},
    ],
)
def test_rotary(is_neox, scaling):
    parameters = {"rope_theta": 1e4, "rope_type": "default", **scaling}
    rope = get_rope(
        32,
        max_position=128,
        is_neox_style=is_neox,
        rope_parameters=parameters,
        dtype=torch.float32,
    )
    positions = torch.tensor([0, 3, 99])
    query, key = torch.randn(3, 4 * 32), torch.randn(3, 2 * 32)
    check(rope, "rotary_embedding", positions, query, key, rtol=1e-5, atol=1e-5)


METHODS = [UnquantizedLinearMethod, UnquantizedEmbeddingMethod]


def apply(method, x, weight, bias=None):
    """On an XLA device: the result on the host, and whether a custom call made it."""
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    device = torch_xla.device()
    bias = None if bias is None else bias.to(device)
    out = method().apply(layer.to(device), x.to(device), bias)
    hlo = torch_xla._XLAC._get_xla_tensors_hlo([out])
    return out.cpu(), 'custom_call_target="xla_ops.linear"' in hlo


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("rows", [1, 128, 129])
def test_linear(method, dtype, with_bias, rows):
    """A custom call for up to the limit's rows, XLA's product for more."""
    assert linear.CPU_MAX_ROWS[dtype] == 128
    x, weight = torch.randn(rows, 48).to(dtype), torch.randn(40, 48).to(dtype)
    bias = torch.randn(40).to(dtype) if with_bias else None
    got, by_call = apply(method, x, weight, bias)
    assert by_call == (rows <= 128)
    want = F.linear(x, weight, bias)
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("method", METHODS)
def test_linear_of_more_dimensions(method):
    x, weight = torch.randn(2, 3, 48), torch.randn(40, 48)
    got, by_call = apply(method, x, weight)
    assert by_call
    torch.testing.assert_close(got, F.linear(x, weight), rtol=1e-4, atol=1e-4)


def test_linear_of_another_dtype():
    """torch_xla promotes as it did; the custom call wants one dtype."""
    x, weight = torch.randn(2, 48), torch.randn(40, 48).bfloat16()
    got, by_call = apply(METHODS[0], x, weight)
    assert not by_call
    torch.testing.assert_close(got, x @ weight.float().t(), rtol=2e-2, atol=2e-2)


def test_linear_on_a_gpu(monkeypatch):
    """There by a limit for compute capability 9.0 alone."""
    monkeypatch.setattr(linear, "is_gpu", lambda: True)
    monkeypatch.setattr(linear, "HOPPER_MAX_ROWS", {torch.bfloat16: 48})
    for capability, rows in (((9, 0), 48), ((10, 0), 0), ((8, 9), 0), (None, 0)):
        monkeypatch.setattr(
            linear.current_platform,
            "get_device_capability",
            lambda found=capability: found and DeviceCapability(*found),
            raising=False,
        )
        assert linear._max_rows.__wrapped__(torch.bfloat16) == rows
        assert linear._max_rows.__wrapped__(torch.float32) == 0
