"""Residual addition and RMSNorm in one pass."""

from __future__ import annotations

from ..core import autocast, mutable, scalars, sharding
from ..core.checks import Checker
from ..core.custom_call import CustomCall
from ..core.gradients import Backward, Gradient
from ..core.hlo import Spec
from ..core.lazy import torch
from ..core.op import Op
from . import rms_norm_backward

_check = Checker("fused_add_rms_norm")


def fused_add_rms_norm(
    input: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds the residual and normalises the sum by its root mean square.

    z = T(input + residual) and out = T(T(z * rsqrt(mean(z^2) + eps)) * weight), where T
    rounds to the dtype and the mean is taken in fp32. Neither argument is changed;
    torch.ops.xla_ops.fused_add_rms_norm(input!, residual!, weight, epsilon) is vLLM's
    form, which puts out into input and z into residual.

    Under torch.autocast, residual and weight are cast to input's dtype.

    Differentiable in input, residual and weight, as if nothing were rounded.

    Args:
        input: [..., hidden], float32, float16 or bfloat16.
        residual: like input, in shape and dtype.
        weight: [hidden], of the same dtype.
        eps: added to the mean square; positive.

    Returns:
        (out, z), both like `input`.

    Raises:
        ValueError: an argument breaks one of the rules above.

    Semantics: vLLM's `fused_add_rms_norm`.

    Example:
        >>> one = torch.ones(1, 2)
        >>> fused_add_rms_norm(one, one, one[0])
        (tensor([[1.0000, 1.0000]]), tensor([[2., 2.]]))
    """
    _check.tensor("input", input)
    _check.tensor("residual", residual)
    _check.tensor("weight", weight)
    return _op(input, residual, weight, scalars.number(_check.op, "eps", eps))


def _lower(
    input: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> CustomCall:
    _check.rows("input", input)
    _check.same_as("residual", residual, input)
    _check.dtype("weight", weight, [input.dtype])
    _check.shape("weight", weight, [input.shape[-1]])
    _check.positive_finite("eps", eps)
    _check.same_device("input", input, residual=residual, weight=weight)
    return CustomCall(
        "xla_ops.fused_add_rms_norm",
        ("input", "residual", "weight"),
        (Spec.of(input), Spec.of(input)),
        {"eps": eps},
        may_overwrite={0: "input", 1: "residual"},
    )


def _reference(
    input: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    z = input + residual
    x = z.float()
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return (x * scale).to(input.dtype) * weight, z


def _gradient(backward: Backward) -> dict[str, torch.Tensor]:
    """Of the sum: what comes through the norm and what comes beside it."""
    grad, grad_sum = backward.grads
    if grad is None:
        assert grad_sum is not None
        found = {"input": grad_sum, "weight": backward.zeros("weight")}
    else:
        args, total = backward.args, backward.results[1]
        found = rms_norm_backward.gradients(
            grad, total, args["weight"], grad_sum, args["eps"], backward.wanted
        )
    return found | {"residual": found["input"]}


_autocast = autocast.like("input", "residual", "weight")
_op = Op(
    "fused_add_rms_norm_functional",
    "(Tensor input, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    _lower,
    _reference,
    autocast=_autocast,
    splits=sharding.TWO_ROWS,
    gradient=Gradient(_gradient, keeps=("weight",), keeps_results=(1,)),
    public_name="fused_add_rms_norm",
)

mutable.define(
    "fused_add_rms_norm(Tensor(a!) input, Tensor(b!) residual, Tensor weight,"
    " float epsilon) -> ()",
    lambda input, residual, weight, epsilon: mutable.Update(
        _op,
        (input, residual, weight, epsilon),
        {"input": input, "residual": residual},
    ),
    autocast=_autocast,
)
