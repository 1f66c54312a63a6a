"""The activations: numerics against float64, roundings, fp8, errors."""

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


def gelu_new(x):
    return (0.5 * x) * (1 + torch.tanh(0.79788456 * (x + 0.044715 * (x * x * x))))


def gelu_fast(x):
    return (0.5 * x) * (1 + torch.tanh((0.79788456 * x) * (1 + (0.044715 * x) * x)))


def gelu_quick(x):
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide / (1 + torch.exp(-1.702 * wide))).to(x.dtype)


# Those without a gate, in the dtype of their argument.
ALONE = {"gelu_new": gelu_new, "gelu_fast": gelu_fast, "gelu_quick": gelu_quick}


def fatrelu_and_mul(x, threshold):
    gate, up = x.chunk(2, dim=-1)
    return torch.where(gate > threshold, gate, 0.0) * up


def swigluoai_and_mul(x, alpha=1.702, limit=7.0):
    wide = x if x.dtype == torch.float64 else x.float()
    gate = wide[..., ::2].clamp(max=limit)
    up = wide[..., 1::2].clamp(-limit, limit)
    return ((up + 1) * (gate * torch.sigmoid(gate * alpha))).to(x.dtype)


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
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (2, 3, 50), (5, 4096), (1, 8193)])
@pytest.mark.parametrize("name", ALONE)
def test_alone(path, name, shape, dtype):
    x = (2 * torch.randn(shape)).to(dtype)
    out, _ = path.run(getattr(xla_ops, name), x)
    assert out.dtype == dtype
    wanted = ALONE[name](x)
    assert_close_to_exact(out, wanted, ALONE[name](x.double()))
    if dtype != torch.float32:
        # A last bit of tanh or exp moves a rounding now and then, never many.
        assert (out != wanted).sum() <= 1 + 0.01 * out.numel()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["gelu_new", "gelu_fast"])
def test_alone_rounds_every_step(path, name, dtype):
    x = torch.randn(64, 512).to(dtype)
    out, _ = path.run(getattr(xla_ops, name), x)
    once = ALONE[name](x.double()).to(dtype)
    assert (out != once).float().mean().item() > 0.1


@pytest.mark.parametrize("name", ALONE)
def test_alone_vllm_form(path, name):
    x = torch.randn(6, 40)
    functional, _ = path.run(getattr(xla_ops, name), x)
    op = getattr(torch.ops.xla_ops, name)
    _, (out, after) = path.run(
        lambda out, x: op(out, x), torch.full((6, 40), torch.nan), x
    )
    assert torch.equal(out, functional) and torch.equal(after, x)
    _, (both,) = path.run(lambda x: op(x, x), x)
    assert torch.equal(both, functional)


@pytest.mark.parametrize("name", ALONE)
def test_alone_far_out(path, name):
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 200.0, -200.0, 0.0])
    for dtype in DTYPES:
        out, _ = path.run(getattr(xla_ops, name), x.to(dtype))
        # -inf * 0 is NaN, as in vLLM; x^3 of 200 is infinite in float16.
        wanted = [math.nan, math.inf, math.nan, 200.0, 0.0, 0.0]
        assert torch.equal(
            out.float().nan_to_num(7.0, 8.0),
            torch.tensor(
                [7.0 if math.isnan(w) else 8.0 if math.isinf(w) else w for w in wanted]
            ),
        )


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
@pytest.mark.parametrize("name", ALONE)
def test_alone_nothing_to_do(path, name, shape):
    out, _ = path.run(getattr(xla_ops, name), torch.empty(shape))
    assert out.shape == shape


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2), (7, 66), (2, 3, 100), (5, 4096), (1, 16386)])
def test_fatrelu(path, shape, dtype):
    x = torch.randn(shape).to(dtype)
    threshold = 0.30078125  # of every dtype
    x.view(-1)[::5] = threshold  # is not above itself
    out, _ = path.run(xla_ops.fatrelu_and_mul, x, threshold)
    assert torch.equal(out, fatrelu_and_mul(x, threshold))


def test_fatrelu_special_values(path):
    x = torch.tensor(
        [[torch.nan, torch.inf, -torch.inf, 1.0, 1.0, 2.0, 3.0, torch.inf]]
    )
    out, _ = path.run(xla_ops.fatrelu_and_mul, x, 1.0)
    assert out[0, :3].tolist() == [0.0, math.inf, 0.0]
    assert out[0, 3].isnan()  # 0 * inf


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2), (7, 66), (2, 3, 100), (5, 4096), (1, 16386)])
def test_swigluoai(path, shape, dtype):
    x = (6 * torch.randn(shape)).to(dtype)
    for constants in [(), (1.5, 0.75), (1.702, math.inf), (-1.0, 0.0)]:
        out, _ = path.run(xla_ops.swigluoai_and_mul, x, *constants)
        assert out.dtype == dtype
        wanted = swigluoai_and_mul(x, *constants)
        assert_close_to_exact(out, wanted, swigluoai_and_mul(x.double(), *constants))


def test_swigluoai_special_values(path):
    x = torch.tensor([[torch.nan, 1.0, 1.0, torch.nan, torch.inf, -torch.inf]])
    out, _ = path.run(xla_ops.swigluoai_and_mul, x)
    assert out[0, :2].isnan().all()
    assert abs(out[0, 2].item() + 42) < 1e-3  # (-7 + 1) * 7


@pytest.mark.parametrize(
    "name, constants",
    [("fatrelu_and_mul", (0.5,)), ("swigluoai_and_mul", (1.5, 0.75))],
)
def test_vllm_forms_with_constants(path, name, constants):
    x = torch.randn(6, 40)
    op = getattr(torch.ops.xla_ops, name)
    _, (out, after, *_) = path.run(
        lambda out, x, *c: op(out, x, *c), torch.full((6, 20), torch.nan), x, *constants
    )
    functional, _ = path.run(getattr(xla_ops, name), x, *constants)
    assert torch.equal(out, functional) and torch.equal(after, x)


def test_swigluoai_vllm_defaults(path):
    x = 6 * torch.randn(6, 40)
    op = torch.ops.xla_ops.swigluoai_and_mul
    _, (out, _) = path.run(lambda out, x: op(out, x), torch.empty(6, 20), x)
    assert torch.equal(out, path.run(xla_ops.swigluoai_and_mul, x, 1.702, 7.0)[0])


@pytest.mark.parametrize(
    "name, args, message",
    [
        ("fatrelu_and_mul", (torch.ones(2, 7),), "input must have an even last"),
        ("fatrelu_and_mul", (torch.ones(2, 8), math.inf), "threshold must be finite"),
        ("fatrelu_and_mul", (torch.ones(2, 8), 1e39), "must be finite, got inf"),
        ("swigluoai_and_mul", (torch.ones(2, 7),), "input must have an even last"),
        ("swigluoai_and_mul", (torch.ones(2, 8), math.nan), "alpha must be finite"),
        (
            "swigluoai_and_mul",
            (torch.ones(2, 8), 1.0, -1.0),
            "limit must be at least 0, got -1",
        ),
        (
            "swigluoai_and_mul",
            (torch.ones(2, 8), 1.0, math.nan),
            "limit must be at least 0, got nan",
        ),
        *[
            (name, (torch.ones(2, 8).double(),), "input must be float32, float16 or")
            for name in ALONE
        ],
        *[
            (name, (torch.ones(()),), "input must have rank 1 or more")
            for name in ALONE
        ],
    ],
)
def test_more_errors(path, name, args, message):
    with pytest.raises(Exception) as error:
        path.run(getattr(xla_ops, name), *args)
    assert f"{name}: " in str(error.value) and message in str(error.value)


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
