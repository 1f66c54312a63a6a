"""The gradients of the activations: numerics against float64, corners, errors."""

import functools
import math

import hypothesis.strategies as st
import pytest
import torch

import xla_ops
from differentiated import assert_gradients, gradients_of
from rows import DTYPES, any_rows, numbers
from support import Path

silu, gelu = torch.nn.functional.silu, torch.nn.functional.gelu
tanh_gelu = functools.partial(gelu, approximate="tanh")


def gated(activation, gate=0):
    def function(x):
        halves = x.chunk(2, dim=-1)
        return activation(halves[gate]) * halves[1 - gate]

    return function


def fatrelu(x):
    return torch.where(x > 0.5, x, 0)


def swigluoai(x):
    gate = x[..., ::2].clamp(max=3.0)
    up = x[..., 1::2].clamp(-3.0, 3.0)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


# name -> (the op, its meaning)
CASES = {
    "silu_and_mul": (xla_ops.silu_and_mul, gated(silu)),
    "mul_and_silu": (xla_ops.mul_and_silu, gated(silu, gate=1)),
    "gelu_and_mul": (xla_ops.gelu_and_mul, gated(gelu)),
    "gelu_tanh_and_mul": (xla_ops.gelu_tanh_and_mul, gated(tanh_gelu)),
    "fatrelu_and_mul": (lambda x: xla_ops.fatrelu_and_mul(x, 0.5), gated(fatrelu)),
    "swigluoai_and_mul": (lambda x: xla_ops.swigluoai_and_mul(x, limit=3.0), swigluoai),
    "gelu_new": (xla_ops.gelu_new, tanh_gelu),
    "gelu_fast": (xla_ops.gelu_fast, tanh_gelu),
    "gelu_quick": (xla_ops.gelu_quick, lambda x: x * torch.sigmoid(1.702 * x)),
}
each = pytest.mark.parametrize("name", CASES)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2), (7, 66), (2, 3, 100), (5, 4096), (300, 24)])
@each
def test_numerics(path, name, shape, dtype):
    assert_gradients(path, *CASES[name], [numbers(shape, dtype)])


@any_rows(name=st.sampled_from(list(CASES)))
def test_any_shape(rows, hidden, dtype, magnitude, seed, name):
    x = numbers((rows, 2 * hidden), dtype, magnitude)
    assert_gradients(Path("cpu"), *CASES[name], [x])


@each
def test_strided_gradients(path, name):
    function, exact = CASES[name]
    x = torch.randn(6, 32)
    size = exact(x).shape[-1]
    grads = [torch.randn(6, 96)[:, 32 : 32 + size]]
    assert_gradients(path, function, exact, [x], grads=grads)


@each
def test_far_from_zero(name):
    """No infinity and no NaN where the derivative has none."""
    x = torch.tensor([-3e38, -1e20, -200.0, 200.0, 1e20, 3e38, -1e4, 1e4])
    function, exact = CASES[name]
    ones = torch.ones(exact(x).shape)
    (got,) = gradients_of(Path("cpu"), function, [x], [ones / 1e3], [0])
    assert not got.isnan().any()


def test_corners(path):
    """At fatrelu's threshold nothing passes, at swigluoai's limits everything."""
    x = torch.tensor([0.5, 2.0, 0.5, -1.0])
    (dx,) = gradients_of(path, CASES["fatrelu_and_mul"][0], [x], [torch.ones(2)], [0])
    assert dx.tolist() == [0.0, -1.0, 0.0, 2.0]
    x = torch.tensor([3.0, -3.0, 3.5, 3.5])
    function, exact = CASES["swigluoai_and_mul"]
    assert_gradients(path, function, exact, [x], grads=[torch.ones(2)])


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (3, 0)])
@each
def test_no_elements(path, name, shape):
    function, exact = CASES[name]
    x = torch.empty(shape)
    (dx,) = gradients_of(path, function, [x], [torch.empty(exact(x).shape)], [0])
    assert dx.shape == x.shape


@pytest.mark.parametrize(
    "change, message",
    [
        ({"activation": "relu"}, "activation must be an op with a gradient, got relu"),
        ({"grad": torch.ones(2, 8)}, "grad must have shape [2, 4], got [2, 8]"),
        ({"grad": torch.ones(2, 4).half()}, "grad must be float32, got float16"),
        ({"input": torch.ones(7)}, "input must have an even last dimension, got 7"),
    ],
)
def test_errors(change, message):
    args = {"grad": torch.ones(2, 4), "input": torch.ones(2, 8)}
    args |= {"activation": "silu_and_mul", **change}
    with pytest.raises(ValueError) as error:
        torch.ops.xla_ops.activation_backward(*args.values(), 0.0, 0.0, math.pi)
    assert str(error.value) == f"activation_backward: {message}"
