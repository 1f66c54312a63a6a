"""Ops under torch.func's transforms, several of them too."""

import warnings

import pytest
import torch
import torch_xla
from torch.autograd import forward_ad
from torch.func import grad, grad_and_value, jvp, vjp, vmap

import xla_ops
from support import Path

EAGER = pytest.mark.parametrize("path", ["cpu", "lazy"])
ONCE = "xla_ops.rms_norm_backward: has no gradient: grad requires one"


@pytest.fixture(autouse=True)
def _grad_mode():
    # Torch counts devices at the first backward of a process: XLA's must be there.
    torch_xla.device()
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        yield


def exact(x, w):
    """rms_norm, of which torch knows all derivatives."""
    x = x.double()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * w.double()


def close(got, wanted):
    torch.testing.assert_close(got.double(), wanted.double(), rtol=1e-4, atol=1e-5)


def rows(path, *shapes):
    return Path(path).put([torch.randn(shape) for shape in shapes])


@EAGER
@pytest.mark.parametrize(
    "second",
    [
        lambda f: grad(lambda x: grad(f)(x).sum()),
        lambda f: grad(lambda x: (grad(f)(x) * x).sum()),
        lambda f: lambda x: vjp(grad(f), x)[1](x)[0],
        lambda f: vmap(grad(lambda x: grad(f)(x).sum())),
    ],
    ids=["alone", "beside another term", "vjp", "of each in a batch"],
)
def test_a_second_derivative_raises(second, path):
    """It was zero, without a word: torch turned the outer level off in the inner."""
    x, w = rows(path, (3, 16), (16,))
    with pytest.raises(RuntimeError, match=ONCE):
        second(lambda x: xla_ops.rms_norm(x, w).pow(3).sum())(x)


@EAGER
def test_levels_are_differentiated_each_for_itself(path):
    """Each level by other arguments, so no second derivative is needed."""
    x, y, w = rows(path, (3, 16), (3, 16), (16,))

    def f(norm):
        def inner(a):
            return grad(lambda b: (norm(a * x, w) * b).sum())(y).square().sum()

        return grad(inner)(x)

    close(f(xla_ops.rms_norm), f(exact))


@EAGER
@pytest.mark.parametrize(
    "value",
    [
        lambda f, x: vjp(f, x)[0],
        lambda f, x: grad_and_value(f)(x)[1],
        lambda f, x: vmap(grad_and_value(f))(x)[1].sum(),
    ],
    ids=["vjp", "grad_and_value", "each of a batch"],
)
@pytest.mark.parametrize("outer", ["backward", "grad"])
def test_what_a_transform_returns_is_differentiable(outer, value, path):
    x, w = rows(path, (3, 16), (16,))

    def f(norm):
        def loss(x):
            return value(lambda x: norm(x, w).square().sum(), x)

        if outer == "grad":
            return grad(loss)(x)
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(loss(leaf), leaf)[0]

    close(f(xla_ops.rms_norm), f(exact))


@EAGER
def test_forward_mode_around_a_transform_raises(path):
    x, w = rows(path, (3, 16), (16,))
    text = "xla_ops.rms_norm: has no gradient: input has a tangent"
    with pytest.raises(RuntimeError, match=text):
        jvp(lambda x: vjp(lambda x: xla_ops.rms_norm(x, w), x)[0], (x,), (x,))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        with pytest.raises(RuntimeError, match=text):
            vjp(lambda x: xla_ops.rms_norm(x, w), dual)


@EAGER
def test_no_grad_inside_ends_the_inner_level_alone(path):
    x, w = rows(path, (3, 16), (16,))

    def f(norm):
        def inner(x):
            with torch.no_grad():
                return grad(lambda x: norm(x, w).square().sum())(x)

        return grad(lambda x: (inner(x) * x).sum())(x)

    close(f(xla_ops.rms_norm), f(exact))
