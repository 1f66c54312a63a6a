"""The product of a linear layer, for few rows."""

from __future__ import annotations

from ..core import autocast, sharding
from ..core.checks import Checker
from ..core.custom_call import CustomCall, OptionalOperand
from ..core.dtypes import FLOAT_DTYPES
from ..core.gradients import Backward, Gradient
from ..core.hlo import Spec
from ..core.lazy import torch
from ..core.op import Op

_check = Checker("linear")


def linear(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiplies rows by the matrix of a linear layer.

    out[m, n] = T(sum_k input[m, k] weight[n, k] + bias[n]), accumulated in fp32 and
    rounded once to the dtype. torch.nn.functional.linear's product, made for the few
    rows of a decoding step, whose time is that of reading the weight; any number of
    rows is legal.

    Differentiable in all arguments, by torch's products.

    Under torch.autocast, input is taken as it is, and weight and bias are cast to its
    dtype.

    Args:
        input: [M, K], float32, float16 or bfloat16.
        weight: [N, K], input's dtype.
        bias: [N], input's dtype, or None.

    Returns:
        [M, N], input's dtype.

    Raises:
        ValueError: an argument breaks one of the rules above.

    Source: torch.nn.functional.linear.

    Example:
        >>> weight = torch.tensor([[1.0, 2.0], [0.0, 1.0], [3.0, 0.0]])
        >>> linear(torch.tensor([[1.0, 10.0]]), weight)
        tensor([[21., 10.,  3.]])
    """
    _check.tensor("input", input)
    _check.tensor("weight", weight)
    _check.optional_tensors(bias=bias)
    return _op(input, weight, bias)


def _lower(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> CustomCall:
    _check.dtype("input", input, FLOAT_DTYPES)
    _check.rank("input", input, "[M, K]")
    num_rows, depth = input.shape
    _check.dtype("weight", weight, [input.dtype])
    if weight.dim() != 2 or weight.shape[1] != depth:
        rule = f"have shape [N, {depth}]"
        _check.require(False, "weight", rule, list(weight.shape))
    num_columns = weight.shape[0]
    if bias is not None:
        _check.dtype("bias", bias, [input.dtype])
        _check.shape("bias", bias, [num_columns])
    _check.same_device("input", input, weight=weight, bias=bias)
    return CustomCall(
        "xla_ops.linear",
        ("input", "weight", OptionalOperand("bias", input.dtype)),
        (Spec((num_rows, num_columns), input.dtype),),
        {"plan": 0},
    )


def _reference(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    out = input.float() @ weight.float().t()
    if bias is not None:
        out = out + bias.float()
    return out.to(input.dtype)


def _gradient(backward: Backward) -> dict[str, torch.Tensor]:
    """Torch's own products: a backward has many rows, or it is not worth a kernel."""
    (grad,), args, found = backward.grads, backward.args, {}
    assert grad is not None
    if "input" in backward.wanted:
        found["input"] = grad @ args["weight"]
    if "weight" in backward.wanted:
        found["weight"] = grad.t() @ args["input"]
    if "bias" in backward.wanted:
        found["bias"] = grad.sum(0)
    return found


_op = Op(
    "linear",
    "(Tensor input, Tensor weight, Tensor? bias) -> Tensor",
    _lower,
    _reference,
    autocast=autocast.like("input", "weight", "bias"),
    splits=sharding.Rule(
        {
            "input": "tokens !depth",
            "weight": "columns !depth",
            "bias": "columns",
        },
        ("tokens columns",),
    ),
    gradient=Gradient(_gradient, keeps=("input", "weight")),
)
