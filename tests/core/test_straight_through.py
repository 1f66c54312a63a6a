"""xla_ops.straight_through: what goes through a quantisation, and what does not."""

import pytest
import torch
import torch_xla

import xla_ops
from support import Path

ONE = torch.full((1,), 0.25)
NAMES = ["static fp8", "dynamic fp8", "fp8 by row"]
NAMES += ["static int8", "dynamic int8", "dynamic int8 with azp"]


@pytest.fixture(autouse=True)
def _grad_mode():
    torch_xla.device()  # before the first backward of the process
    with torch.enable_grad():
        yield


def quantiser(path, name):
    """Returns x -> (codes, scale) or (codes, scale, azp), on the path's device."""
    scale = ONE.to(path.device)
    return {
        "static fp8": lambda x: (xla_ops.static_scaled_fp8_quant(x, scale), scale),
        "dynamic fp8": xla_ops.dynamic_scaled_fp8_quant,
        "fp8 by row": xla_ops.dynamic_per_token_scaled_fp8_quant,
        "static int8": lambda x: (xla_ops.static_scaled_int8_quant(x, scale), scale),
        "dynamic int8": xla_ops.dynamic_scaled_int8_quant,
        "dynamic int8 with azp": lambda x: xla_ops.dynamic_scaled_int8_quant(
            x, symmetric=False
        ),
    }[name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 16), (2, 3, 16)])
@pytest.mark.parametrize("name", NAMES)
def test_through_each_quantiser(path, name, shape, dtype):
    x = path.put(torch.randn(shape).to(dtype)).requires_grad_()
    weight = path.put(torch.randn(shape).to(dtype))
    quantise = quantiser(path, name)

    def step(x, weight):
        return (xla_ops.straight_through(x, *quantise(x)) * weight).sum()

    (grad,) = torch.autograd.grad(path.function(step)(x, weight), x)
    assert torch.equal(grad.cpu(), weight.cpu())
    out = xla_ops.straight_through(x, *quantise(x)).detach().cpu().float()
    step_size = 0.07 if "fp8" in name else 0.13  # of the codes, for numbers up to 4
    torch.testing.assert_close(out, x.detach().cpu().float(), rtol=0.07, atol=step_size)


@pytest.mark.parametrize(
    "name, largest", [("static fp8", 116.0), ("static int8", 31.9)]
)
def test_nothing_goes_through_beyond_the_largest_code(path, name, largest):
    x = torch.tensor([[0.0, largest - 0.1, largest + 0.5, -largest - 0.5, 1e9, -1e9]])
    x = path.put(x).requires_grad_()
    out = xla_ops.straight_through(x, *quantiser(path, name)(x))
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert grad.cpu().tolist() == [[1.0, 1.0, 0.0, 0.0, 0.0, 0.0]]


def test_a_fused_op():
    h = torch.randn(4, 32, requires_grad=True)
    codes = xla_ops.silu_and_mul_quant(h.detach(), ONE / 8)
    y = xla_ops.silu_and_mul(h)
    (grad,) = torch.autograd.grad(
        xla_ops.straight_through(y, codes, ONE / 8).sum(), h, retain_graph=True
    )
    assert torch.equal(grad, torch.autograd.grad(y.sum(), h)[0])


def test_without_it_a_quantisation_raises():
    x = torch.randn(4, 16, requires_grad=True)
    codes, scale = xla_ops.dynamic_scaled_fp8_quant(x)
    with pytest.raises(RuntimeError, match="dynamic_scaled_fp8_quant: has no gradient"):
        (codes.float() * scale).sum().backward()


def test_vjp():
    x = torch.randn(4, 16)
    codes, scale = xla_ops.dynamic_scaled_int8_quant(x)
    f = lambda x: xla_ops.straight_through(x, codes, scale)  # noqa: E731
    _, pull = torch.func.vjp(f, x)
    assert torch.equal(pull(x)[0], x)


@pytest.mark.parametrize("name", ["cpu", "lazy"])
def test_under_vmap(name):
    x = Path(name).put(torch.randn(2, 3, 8))
    codes, scale = quantiser(Path(name), "static int8")(x)

    def through(x, codes):
        return xla_ops.straight_through(x, codes, scale)

    assert torch.equal(torch.func.vmap(through)(x, codes), through(x, codes))
    slopes = torch.func.vmap(torch.func.grad(lambda *given: through(*given).sum()))
    whole = torch.func.grad(lambda x: through(x, codes).sum())
    assert torch.equal(slopes(x, codes), whole(x))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"input": torch.ones(2, 8).int()}, "input must be float32, float16 or"),
        (
            {"codes": torch.ones(2, 8)},
            "codes must be float8_e4m3fn, float8_e5m2 or int",
        ),
        (
            {"codes": torch.ones(2, 7).char()},
            "codes must have shape [2, 8], got [2, 7]",
        ),
        ({"scale": torch.ones(3)}, "scale must have 1 element or 2, got shape [3]"),
        ({"scale": torch.ones(1).half()}, "scale must be float32, got float16"),
        ({"azp": torch.ones(1)}, "azp must be int32, got float32"),
        (
            {"scale": torch.ones(1, device="meta")},
            "scale must be on input's device cpu, got meta",
        ),
    ],
)
def test_errors(change, message):
    args = {"input": torch.ones(2, 8), "codes": torch.ones(2, 8).char()}
    with pytest.raises(ValueError) as error:
        xla_ops.straight_through(**{**args, "scale": torch.ones(1), **change})
    assert f"straight_through: {message}" in str(error.value)
