"""RMSNorm."""

from __future__ import annotations

from ..core import autocast, mutable, scalars, sharding
from ..core.checks import Checker
from ..core.custom_call import CustomCall
from ..core.gradients import Backward, Gradient
from ..core.hlo import Spec
from ..core.lazy import torch
from ..core.op import Op
from . import rms_norm_backward

_check = Checker("rms_norm")


def rms_norm(
    input: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6
) -> torch.Tensor:
    """Normalises the last dimension by its root mean square.

    out = T(T(x * rsqrt(mean(x^2) + eps)) * weight), where T rounds to the dtype and the
    mean is taken in fp32: the two roundings of vLLM's `rms_norm`.

    Under torch.autocast, weight is cast to input's dtype.

    Differentiable in input and weight, as if nothing were rounded.

    Args:
        input: [..., hidden], float32, float16 or bfloat16.
        weight: [hidden], of the same dtype.
        eps: added to the mean square; positive.

    Returns:
        A tensor like `input`.

    Raises:
        ValueError: an argument breaks one of the rules above.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019.

    Example:
        >>> rms_norm(torch.tensor([[3.0, 4.0]]), torch.ones(2))
        tensor([[0.8485, 1.1314]])
    """
    _check.tensor("input", input)
    _check.tensor("weight", weight)
    return _op(input, weight, scalars.number(_check.op, "eps", eps))


def _lower(input: torch.Tensor, weight: torch.Tensor, eps: float) -> CustomCall:
    _check.rows("input", input)
    _check.dtype("weight", weight, [input.dtype])
    _check.shape("weight", weight, [input.shape[-1]])
    _check.positive_finite("eps", eps)
    _check.same_device("input", input, weight=weight)
    return CustomCall(
        "xla_ops.rms_norm",
        ("input", "weight"),
        (Spec.of(input),),
        {"eps": eps},
        may_overwrite={0: "input"},
    )


def _reference(input: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x = input.float()
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return (x * scale).to(input.dtype) * weight


def _gradient(backward: Backward) -> dict[str, torch.Tensor]:
    (grad,), args = backward.grads, backward.args
    assert grad is not None
    return rms_norm_backward.gradients(
        grad, args["input"], args["weight"], None, args["eps"], backward.wanted
    )


_op = Op(
    "rms_norm",
    "(Tensor input, Tensor weight, float eps) -> Tensor",
    _lower,
    _reference,
    autocast=autocast.like("input", "weight"),
    splits=sharding.ROWS,
    gradient=Gradient(_gradient, keeps=("input", "weight")),
)

# vLLM's form. The functional op has the name's default overload.
mutable.define(
    "rms_norm.out(Tensor(a!) result, Tensor input, Tensor weight, float epsilon) -> ()",
    lambda result, input, weight, epsilon: mutable.Update(
        _op, (input, weight, epsilon), {"result": result}
    ),
    autocast=autocast.like("input", "weight"),
)
