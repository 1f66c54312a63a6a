"""Elementwise product with a number."""

from __future__ import annotations

import math

import torch

from ..core import autocast, scalars
from ..core.checks import Checker
from ..core.custom_call import CustomCall
from ..core.dtypes import FLOAT_DTYPES
from ..core.hlo import Spec
from ..core.op import Op

_check = Checker("new_op")


def new_op(input: torch.Tensor, scale: float) -> torch.Tensor:
    """Multiplies each element by a number.

    out = T(x * scale), where the product is taken in fp32 and T rounds to the dtype.

    torch.autocast changes nothing: input is taken as it is.

    Args:
        input: [...], float32, float16 or bfloat16, any rank.
        scale: the factor; finite.

    Returns:
        A tensor like `input`.

    Raises:
        ValueError: an argument breaks one of the rules above.

    Example:
        >>> new_op(torch.tensor([1.0, 2.0]), 0.5)
        tensor([0.5000, 1.0000])
    """
    _check.tensor("input", input)
    return _op(input, scalars.number(_check.op, "scale", scale))


def _lower(input: torch.Tensor, scale: float) -> CustomCall:
    _check.dtype("input", input, FLOAT_DTYPES)
    _check.require(math.isfinite(scale), "scale", "be finite", f"{scale:g}")
    return CustomCall(
        "xla_ops.new_op",
        ("input",),
        (Spec.of(input),),
        {"scale": scale},
    )


def _reference(input: torch.Tensor, scale: float) -> torch.Tensor:
    return (input.float() * scale).to(input.dtype)


_op = Op(
    "new_op",
    "(Tensor input, float scale) -> Tensor",
    _lower,
    _reference,
    autocast=autocast.unchanged,
)
