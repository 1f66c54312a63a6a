"""Gated activations: silu_and_mul, mul_and_silu, gelu_and_mul, gelu_tanh_and_mul and
silu_and_mul_quant."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch

from ..core import autocast, mutable, quant
from ..core.checks import Checker
from ..core.custom_call import CustomCall
from ..core.dtypes import FLOAT_DTYPES
from ..core.hlo import Spec
from ..core.op import Op


def silu_and_mul(input: torch.Tensor) -> torch.Tensor:
    """Gates the second half of the last dimension by the SiLU of the first (SwiGLU).

    out = T(T(silu(x)) * y) with silu(x) = x / (1 + exp(-x)) in fp32, where x and y are
    the halves and T rounds to the dtype: the two roundings of vLLM's `silu_and_mul`.
    vLLM's form, which writes into its first argument, is
    `torch.ops.xla_ops.silu_and_mul(result, input)`.

    torch.autocast changes nothing: input is taken as it is.

    Args:
        input: [..., 2 * size], float32, float16 or bfloat16.

    Returns:
        A tensor [..., size] of the same dtype.

    Raises:
        ValueError: an argument breaks one of the rules above.

    Source: Shazeer, GLU Variants Improve Transformer, 2020.

    Example:
        >>> silu_and_mul(torch.tensor([[0.0, 1.0, 2.0, 3.0]]))
        tensor([[0.0000, 2.1932]])
    """
    _CHECKS["silu_and_mul"].tensor("input", input)
    return _silu_and_mul(input)


def mul_and_silu(input: torch.Tensor) -> torch.Tensor:
    """Gates the first half of the last dimension by the SiLU of the second.

    out = T(x * T(silu(y))), as `silu_and_mul` with its halves exchanged. vLLM's form is
    `torch.ops.xla_ops.mul_and_silu(out, input)`.

    torch.autocast changes nothing: input is taken as it is.

    Args:
        input: [..., 2 * size], float32, float16 or bfloat16.

    Returns:
        A tensor [..., size] of the same dtype.

    Raises:
        ValueError: an argument breaks one of the rules above.

    Source: Shazeer, GLU Variants Improve Transformer, 2020.
    """
    _CHECKS["mul_and_silu"].tensor("input", input)
    return _mul_and_silu(input)


def gelu_and_mul(input: torch.Tensor) -> torch.Tensor:
    """Gates the second half of the last dimension by the GELU of the first (GeGLU).

    out = T(T(gelu(x)) * y) with gelu(x) = 0.5 x (1 + erf(x / sqrt(2))) in fp32. vLLM's
    form is `torch.ops.xla_ops.gelu_and_mul(out, input)`.

    torch.autocast changes nothing: input is taken as it is.

    Args:
        input: [..., 2 * size], float32, float16 or bfloat16.

    Returns:
        A tensor [..., size] of the same dtype.

    Raises:
        ValueError: an argument breaks one of the rules above.

    Source: Shazeer, GLU Variants Improve Transformer, 2020.
    """
    _CHECKS["gelu_and_mul"].tensor("input", input)
    return _gelu_and_mul(input)


def gelu_tanh_and_mul(input: torch.Tensor) -> torch.Tensor:
    """As `gelu_and_mul`, with the tanh approximation of GELU.

    gelu(x) = 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) in fp32. vLLM's form is
    `torch.ops.xla_ops.gelu_tanh_and_mul(out, input)`.

    torch.autocast changes nothing: input is taken as it is.

    Args:
        input: [..., 2 * size], float32, float16 or bfloat16.

    Returns:
        A tensor [..., size] of the same dtype.

    Raises:
        ValueError: an argument breaks one of the rules above.

    Source: Hendrycks and Gimpel, Gaussian Error Linear Units, 2016.
    """
    _CHECKS["gelu_tanh_and_mul"].tensor("input", input)
    return _gelu_tanh_and_mul(input)


def silu_and_mul_quant(input: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`silu_and_mul`, quantised to fp8 with a given scale.

    out = fp8(clamp(T(T(silu(x)) * y) * (1 / scale), -448, 448)): to nearest even,
    infinities saturated. NaN becomes 448, as in vLLM's `silu_and_mul_quant`, whose form
    is `torch.ops.xla_ops.silu_and_mul_quant(result, input, scale)`.

    Under torch.autocast, input is taken as it is, and scale is cast to float32.

    Args:
        input: [..., 2 * size], float32, float16 or bfloat16 (vLLM: not float32).
        scale: one float32 element, any rank.

    Returns:
        A float8_e4m3fn tensor [..., size]; times `scale` it approximates silu_and_mul.

    Raises:
        ValueError: an argument breaks one of the rules above.

    Source: Micikevicius et al., FP8 Formats for Deep Learning, 2022.
    """
    _CHECKS["silu_and_mul_quant"].tensor("input", input)
    _CHECKS["silu_and_mul_quant"].tensor("scale", scale)
    return _silu_and_mul_quant(input, scale)


Activation = Callable[[torch.Tensor], torch.Tensor]


def _silu(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + torch.exp(-x))


def _gelu(x: torch.Tensor) -> torch.Tensor:
    return x * 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x))
    return 0.5 * x * (1 + torch.tanh(inner))


def _checked(op: str, input: torch.Tensor) -> Spec:
    """Checks the input and returns the shape and dtype of an unquantised result."""
    check = _CHECKS[op]
    check.dtype("input", input, FLOAT_DTYPES)
    check.require(
        input.dim() > 0, "input", "have rank 1 or more", f"shape {list(input.shape)}"
    )
    last = input.shape[-1]
    check.require(last % 2 == 0, "input", "have an even last dimension", last)
    return Spec((*input.shape[:-1], last // 2), input.dtype)


def _lower(input: torch.Tensor, op: str) -> CustomCall:
    out = _checked(op, input)
    return CustomCall(f"xla_ops.{op}", ("input",), (out,))


def _reference(
    input: torch.Tensor, activate: Activation, gate: int = 0
) -> torch.Tensor:
    halves = input.chunk(2, dim=-1)
    return activate(halves[gate].float()).to(input.dtype) * halves[1 - gate]


def _lower_quant(input: torch.Tensor, scale: torch.Tensor) -> CustomCall:
    check = _CHECKS["silu_and_mul_quant"]
    out = _checked("silu_and_mul_quant", input)
    check.dtype("scale", scale, [torch.float32])
    check.one_element("scale", scale)
    check.same_device("input", input, scale=scale)
    return CustomCall(
        "xla_ops.silu_and_mul_quant",
        ("input", "scale"),
        (Spec(out.shape, torch.float8_e4m3fn),),
    )


def _reference_quant(input: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    gated = _reference(input, _silu).float()
    return quant.to_fp8(gated * (1 / scale.reshape(())))


def _define(name: str, activate: Activation, gate: int = 0, result: str = "out") -> Op:
    """Declares an op and the form that vLLM calls."""
    op = Op(
        name,
        "(Tensor input) -> Tensor",
        functools.partial(_lower, op=name),
        functools.partial(_reference, activate=activate, gate=gate),
        autocast=autocast.unchanged,
    )
    mutable.define(
        f"{name}.out(Tensor(a!) {result}, Tensor input) -> ()",
        lambda out, input: mutable.Update(op, (input,), {result: out}),
        autocast=autocast.unchanged,
    )
    return op


_CHECKS = {
    name: Checker(name)
    for name in (
        "silu_and_mul",
        "mul_and_silu",
        "gelu_and_mul",
        "gelu_tanh_and_mul",
        "silu_and_mul_quant",
    )
}

_silu_and_mul = _define("silu_and_mul", _silu, result="result")
_mul_and_silu = _define("mul_and_silu", _silu, gate=1)
_gelu_and_mul = _define("gelu_and_mul", _gelu)
_gelu_tanh_and_mul = _define("gelu_tanh_and_mul", _gelu_tanh)
_silu_and_mul_quant = Op(
    "silu_and_mul_quant",
    "(Tensor input, Tensor scale) -> Tensor",
    _lower_quant,
    _reference_quant,
    autocast=autocast.float32("scale"),
)

mutable.define(
    "silu_and_mul_quant.out(Tensor(a!) result, Tensor input, Tensor scale) -> ()",
    lambda result, input, scale: mutable.Update(
        _silu_and_mul_quant, (input, scale), {"result": result}
    ),
    autocast=autocast.float32("scale"),
)
