"""The gradients of the activations."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

from ..core import autocast, sharding
from ..core.checks import Checker, float32
from ..core.custom_call import CustomCall
from ..core.gradients import Backward, Gradient
from ..core.hlo import Spec
from ..core.lazy import torch
from ..core.op import Op

_check = Checker("activation_backward")

_ALONE = ("gelu_new", "gelu_fast", "gelu_quick")
_HALVES = (
    "silu_and_mul",
    "mul_and_silu",
    "gelu_and_mul",
    "gelu_tanh_and_mul",
    "fatrelu_and_mul",
)
_PAIRS = ("swigluoai_and_mul",)


def gradient(name: str) -> Gradient:
    """Returns the gradient of the activation `name`."""
    return Gradient(functools.partial(_compute, name), keeps=("input",))


def _compute(name: str, backward: Backward) -> dict[str, torch.Tensor]:
    (grad,), args = backward.grads, backward.args
    assert grad is not None
    constants = [args.get(key, 0.0) for key in ("threshold", "alpha", "limit")]
    return {"input": _op(grad, args["input"], name, *constants)}


def _lower(
    grad: torch.Tensor,
    input: torch.Tensor,
    activation: str,
    threshold: float,
    alpha: float,
    limit: float,
) -> CustomCall:
    known = activation in (*_ALONE, *_HALVES, *_PAIRS)
    _check.require(known, "activation", "be an op with a gradient", activation)
    _check.rows("input", input)
    size = input.shape[-1]
    if activation not in _ALONE:
        _check.require(size % 2 == 0, "input", "have an even last dimension", size)
        size //= 2
    _check.dtype("grad", grad, [input.dtype])
    _check.shape("grad", grad, [*input.shape[:-1], size])
    _check.same_device("input", input, grad=grad)
    return CustomCall(
        "xla_ops.activation_backward",
        ("grad", "input"),
        (Spec.of(input),),
        {
            "activation": activation,
            "threshold": threshold,
            "alpha": alpha,
            "limit": limit,
        },
    )


def _swish(x: torch.Tensor, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x sigmoid(beta x) and its slope."""
    share = torch.sigmoid(beta * x)
    return x * share, share + x * share * (1 - share) * beta


def _gelu_tanh(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = math.sqrt(2 / math.pi)
    t = torch.tanh(scale * (x + 0.044715 * (x * x * x)))
    near = x.clamp(-10, 10)  # beyond, tanh is flat and a square may be infinite
    slope = scale * (1 + 3 * 0.044715 * near * near)
    return 0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * near * (1 - t * t) * slope


def _slope(
    name: str, x: torch.Tensor, threshold: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns an activation of float32 and its slope."""
    if name == "gelu_and_mul":
        share = 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
        density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
        return x * share, share + x * density
    if name in ("gelu_tanh_and_mul", "gelu_new", "gelu_fast"):
        return _gelu_tanh(x)
    if name == "fatrelu_and_mul":
        is_on = x > float32(threshold)
        return torch.where(is_on, x, torch.zeros_like(x)), is_on.to(x.dtype)
    return _swish(x, 1.702 if name == "gelu_quick" else 1.0)


def _swigluoai(
    g: torch.Tensor, x: torch.Tensor, y: torch.Tensor, alpha: float, limit: float
) -> tuple[torch.Tensor, torch.Tensor]:
    value, slope = _swish(x.clamp(max=limit), alpha)
    zero = torch.zeros_like(x)
    dx = torch.where(x > limit, zero, g * (y.clamp(-limit, limit) + 1) * slope)
    return dx, torch.where(y.abs() > limit, zero, g * value)


def _reference(
    grad: torch.Tensor,
    input: torch.Tensor,
    activation: str,
    threshold: float,
    alpha: float,
    limit: float,
) -> torch.Tensor:
    g, wide = grad.float(), input.float()
    if activation in _ALONE:
        _, slope = _slope(activation, wide, threshold)
        return (g * slope).to(input.dtype)
    if activation in _PAIRS:
        pair = _swigluoai(g, wide[..., ::2], wide[..., 1::2], alpha, limit)
        return torch.stack(pair, dim=-1).flatten(-2).to(input.dtype)
    x, y = wide.chunk(2, dim=-1)
    if activation == "mul_and_silu":
        value, slope = _slope(activation, y, threshold)
        both = (g * value, g * x * slope)
    else:
        value, slope = _slope(activation, x, threshold)
        both = (g * y * slope, g * value)
    return torch.cat(both, dim=-1).to(input.dtype)


def _splits(args: Mapping[str, Any]) -> sharding.Rule:
    """As the forward of each may be split."""
    name = args["activation"]
    if name in _HALVES:
        operands = {"input": "... ~columns", "grad": "... !columns"}
        return sharding.Rule(operands, ("... !columns",))
    input = "... columns*2" if name in _PAIRS else "... columns"
    return sharding.Rule({"input": input, "grad": "... columns"}, (input,))


_op = Op(
    "activation_backward",
    "(Tensor grad, Tensor input, str activation, float threshold, float alpha,"
    " float limit) -> Tensor",
    _lower,
    _reference,
    autocast=autocast.like("input", "grad"),
    splits=_splits,
)
