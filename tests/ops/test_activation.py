"""The gated activations: numerics against float64, roundings, fp8, errors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import xla_ops
from rows import DTYPES
from support import Path, assert_close_to_exact


def silu(x):
    return x / (1 + torch.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def gelu_tanh(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


# Each op by name: its activation, and the half that it applies to.
OPS = {
    "silu_and_mul": (silu, 0),
    "mul_and_silu": (silu, 1),
    "gelu_and_mul": (gelu, 0),
    "gelu_tanh_and_mul": (gelu_tanh, 0),
}


def two_roundings(name, x):
    activate, half = OPS[name]
    halves = x.chunk(2, dim=-1)
    wide = halves[half] if x.dtype == torch.float64 else halves[half].float()
    return activate(wide).to(x.dtype) * halves[1 - half]


def exact(name, x):
    return two_roundings(name, x.double())


def to_fp8(x, scale):
    scaled = (x.float() * (1 / scale)).clamp(-448, 448)
    return scaled.nan_to_num(448.0).to(torch.float8_e4m3fn)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 2), (7, 66), (3, 254), (2, 3, 100), (5, 4096), (34,), (1, 16386)]
)
@pytest.mark.parametrize("name", OPS)
def test_numerics(path, name, shape, dtype):
    x = (2 * torch.randn(shape)).to(dtype)
    out, _ = path.run(getattr(xla_ops, name), x)
    assert out.dtype == dtype
    assert_close_to_exact(out, two_roundings(name, x), exact(name, x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", OPS)
def test_rounds_before_the_product(path, name, dtype):
    x = torch.randn(64, 512).to(dtype)
    out, _ = path.run(getattr(xla_ops, name), x)
    # A last bit of the activation moves a rounding now and then, never many.
    assert (out != two_roundings(name, x)).float().mean().item() < 0.01
    once = exact(name, x).to(dtype)
    assert (two_roundings(name, x) != once).float().mean().item() > 0.1


@pytest.mark.parametrize("name", OPS)
def test_vllm_form(path, name):
    """torch.ops.xla_ops.<name>(out, input), whose out is full of NaN before."""
    x = torch.randn(6, 40)
    call = lambda out, x: getattr(torch.ops.xla_ops, name)(out, x)  # noqa: E731
    _, (out, after) = path.run(call, torch.full((6, 20), torch.nan), x)
    functional, _ = path.run(getattr(xla_ops, name), x)
    assert torch.equal(out, functional)
    assert torch.equal(after, x)


def test_writes_into_a_view(path):
    x = torch.randn(3, 8)

    def call(base, x):
        torch.ops.xla_ops.silu_and_mul(base[1:4, 2:6], x)
        return base + 1

    plus_one, (base, _) = path.run(call, torch.zeros(5, 8), x)
    wanted = torch.zeros(5, 8)
    wanted[1:4, 2:6] = xla_ops.silu_and_mul(x)
    assert torch.allclose(base, wanted, atol=1e-6)
    assert torch.equal(plus_one, base + 1)


def test_strided_input(path):
    x = torch.randn(6, 96)
    out, _ = path.run(lambda x: xla_ops.silu_and_mul(x[:, 32:64]), x)
    part = x[:, 32:64]
    assert_close_to_exact(
        out, two_roundings("silu_and_mul", part), exact("silu_and_mul", part)
    )


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (3, 0)])
@pytest.mark.parametrize("name", OPS)
def test_nothing_to_do(path, name, shape):
    out, _ = path.run(getattr(xla_ops, name), torch.empty(shape))
    assert out.shape == (*shape[:-1], shape[-1] // 2)


@pytest.mark.parametrize("name", OPS)
def test_non_finite_elements_stay_alone(path, name):
    x = torch.randn(4, 32)
    half = OPS[name][1]
    x[1, 3 + 16 * half] = torch.nan
    x[2, 5 + 16 * half] = torch.inf
    x[3, 7 + 16 * half] = -torch.inf  # -inf / inf, or -inf * 0: NaN, as in vLLM
    out, _ = path.run(getattr(xla_ops, name), x)
    assert out[1, 3].isnan() and out[3, 7].isnan()
    assert out[2, 5].isinf()
    assert out.isfinite().sum() == out.numel() - 3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2), (5, 66), (2, 3, 100), (4, 1024)])
def test_quant(path, shape, dtype):
    x = (3 * torch.randn(shape)).to(dtype)
    scale = torch.tensor([0.013])
    out, _ = path.run(xla_ops.silu_and_mul_quant, x, scale)
    assert out.dtype == torch.float8_e4m3fn
    gated, _ = path.run(xla_ops.silu_and_mul, x)
    assert torch.equal(out.view(torch.uint8), to_fp8(gated, scale).view(torch.uint8))


def test_quant_vllm_form(path):
    x, scale = torch.randn(6, 40), torch.tensor(0.5)
    result = torch.full((6, 20), 7.0).to(torch.float8_e4m3fn)
    _, (out, *_) = path.run(
        lambda r, x, s: torch.ops.xla_ops.silu_and_mul_quant(r, x, s), result, x, scale
    )
    functional, _ = path.run(xla_ops.silu_and_mul_quant, x, scale)
    assert torch.equal(out.view(torch.uint8), functional.view(torch.uint8))


def test_quant_saturates(path):
    x = torch.tensor([[torch.nan, torch.inf, 1e30, 3.0, 1.0, 1.0, -1.0, 0.0]])
    out, _ = path.run(xla_ops.silu_and_mul_quant, x, torch.ones(1))
    assert out.float().tolist() == [[448.0, 448.0, -448.0, 0.0]]


@settings(max_examples=60)
@given(
    name=st.sampled_from(sorted(OPS)),
    rows=st.integers(0, 5),
    size=st.integers(0, 150),
    dtype=st.sampled_from(DTYPES),
    magnitude=st.sampled_from([1e-3, 1.0, 30.0]),
    seed=st.random_module(),
)
def test_any_shape(name, rows, size, dtype, magnitude, seed):
    x = (torch.randn(rows, 2 * size) * magnitude).to(dtype)
    out, _ = Path("cpu").run(getattr(xla_ops, name), x)
    assert_close_to_exact(out, two_roundings(name, x), exact(name, x))


@pytest.mark.parametrize("name", [*OPS, "silu_and_mul_quant"])
@pytest.mark.parametrize(
    "x, message",
    [
        (
            torch.ones(2, 8, dtype=torch.int32),
            "input must be float32, float16 or bfloat16, got int32",
        ),
        (torch.ones(()), "input must have rank 1 or more, got shape []"),
        (torch.ones(2, 7), "input must have an even last dimension, got 7"),
    ],
)
def test_errors(path, name, x, message):
    scale = (torch.ones(1),) if name.endswith("quant") else ()
    with pytest.raises(Exception) as error:
        path.run(getattr(xla_ops, name), x, *scale)
    assert f"{name}: {message}" in str(error.value)


@pytest.mark.parametrize(
    "scale, message",
    [
        (torch.ones(1).half(), "scale must be float32, got float16"),
        (torch.ones(2), "scale must have 1 element, got shape [2]"),
    ],
)
def test_quant_errors(path, scale, message):
    with pytest.raises(Exception) as error:
        path.run(xla_ops.silu_and_mul_quant, torch.ones(2, 8), scale)
    assert f"silu_and_mul_quant: {message}" in str(error.value)


@pytest.mark.parametrize(
    "out, message",
    [
        (torch.ones(2, 4).half(), "out must be float32, got float16"),
        (torch.ones(2, 8), "out must have shape [2, 4], got [2, 8]"),
    ],
)
def test_vllm_form_errors(path, out, message):
    with pytest.raises(Exception) as error:
        path.run(torch.ops.xla_ops.gelu_and_mul, out, torch.ones(2, 8))
    assert f"gelu_and_mul: {message}" in str(error.value)


def test_wrong_type():
    message = "silu_and_mul: input must be a tensor, got list"
    with pytest.raises(TypeError, match=message):
        xla_ops.silu_and_mul([1.0, 1.0])
