"""Activations, most of them gated: silu_and_mul, mul_and_silu, gelu_and_mul,
gelu_tanh_and_mul, silu_and_mul_quant, fatrelu_and_mul, swigluoai_and_mul, gelu_new,
gelu_fast and gelu_quick."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

from ..core import autocast, mutable, quant, scalars, sharding
from ..core.checks import Checker, float32
from ..core.custom_call import CustomCall
from ..core.hlo import Spec
from ..core.lazy import torch
from ..core.op import Op
from . import activation_backward


def silu_and_mul(input: torch.Tensor) -> torch.Tensor:
    """Gates the second half of the last dimension by the SiLU of the first (SwiGLU).

    out = T(T(silu(x)) * y) with silu(x) = x / (1 + exp(-x)) in fp32, where x and y are
    the halves and T rounds to the dtype: the two roundings of vLLM's `silu_and_mul`.
    vLLM's form, which writes into its first argument, is
    `torch.ops.xla_ops.silu_and_mul(result, input)`.

    torch.autocast changes nothing: input is taken as it is.

    Differentiable in input, as if nothing were rounded.

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

    Differentiable in input, as if nothing were rounded.

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

    Differentiable in input, as if nothing were rounded.

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

    Differentiable in input, as if nothing were rounded.

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


def fatrelu_and_mul(input: torch.Tensor, threshold: float = 0.0) -> torch.Tensor:
    """Gates the second half of the last dimension by the FATReLU of the first.

    out = T(fatrelu(x) * y), where fatrelu(x) is x above `threshold` and 0 elsewhere,
    NaN included, as in vLLM's `fatrelu_and_mul`, whose form is
    `torch.ops.xla_ops.fatrelu_and_mul(out, input, threshold)`.

    torch.autocast changes nothing: input is taken as it is.

    Differentiable in input, as if nothing were rounded.

    Args:
        input: [..., 2 * size], float32, float16 or bfloat16.
        threshold: a finite number; compared in float32.

    Returns:
        A tensor [..., size] of the same dtype.

    Raises:
        ValueError: an argument breaks one of the rules above.

    Source: Song et al., ProSparse: Introducing and Enhancing Intrinsic Activation
    Sparsity within Large Language Models, 2024.

    Example:
        >>> fatrelu_and_mul(torch.tensor([[0.25, 2.0, 3.0, 4.0]]), 0.5)
        tensor([[0., 8.]])
    """
    _CHECKS["fatrelu_and_mul"].tensor("input", input)
    threshold = scalars.number("fatrelu_and_mul", "threshold", threshold)
    return _fatrelu_and_mul(input, threshold)


def swigluoai_and_mul(
    input: torch.Tensor, alpha: float = 1.702, limit: float = 7.0
) -> torch.Tensor:
    """The clamped SwiGLU of gpt-oss, whose gates and values alternate.

    Of each pair of neighbours (x, y) in the last dimension:
    out = T((u + 1) * g / (1 + exp(-alpha * g))), where g = min(x, limit) and
    u = min(max(y, -limit), limit), in fp32 with one rounding. NaN stays NaN. vLLM's
    form is `torch.ops.xla_ops.swigluoai_and_mul(out, input, alpha, limit)`.

    torch.autocast changes nothing: input is taken as it is.

    Differentiable in input, as if nothing were rounded.

    Args:
        input: [..., 2 * size], float32, float16 or bfloat16.
        alpha: a finite number.
        limit: at least 0; infinity for none.

    Returns:
        A tensor [..., size] of the same dtype.

    Raises:
        ValueError: an argument breaks one of the rules above.

    Source: OpenAI, gpt-oss model card, 2025.

    Example:
        >>> swigluoai_and_mul(torch.tensor([[1.0, 2.0, 9.0, -9.0]]))
        tensor([[  2.5374, -41.9997]])
    """
    _CHECKS["swigluoai_and_mul"].tensor("input", input)
    alpha = scalars.number("swigluoai_and_mul", "alpha", alpha)
    return _swigluoai_and_mul(
        input, alpha, scalars.number("swigluoai_and_mul", "limit", limit)
    )


def gelu_new(input: torch.Tensor) -> torch.Tensor:
    """GPT-2's GELU, by tanh: 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))).

    Every product, sum and the tanh is rounded to the dtype, as in vLLM's `gelu_new`:
    what plain torch gives in that dtype. vLLM's form is
    `torch.ops.xla_ops.gelu_new(out, input)`; `out` may be `input`.

    torch.autocast changes nothing: input is taken as it is.

    Differentiable in input, as if nothing were rounded.

    Args:
        input: [..., size], float32, float16 or bfloat16.

    Returns:
        A tensor like `input`.

    Raises:
        ValueError: an argument breaks one of the rules above.

    Source: Hendrycks and Gimpel, Gaussian Error Linear Units, 2016.

    Example:
        >>> gelu_new(torch.tensor([-1.0, 0.0, 2.0]))
        tensor([-0.1588,  0.0000,  1.9546])
    """
    _CHECKS["gelu_new"].tensor("input", input)
    return _gelu_new(input)


def gelu_fast(input: torch.Tensor) -> torch.Tensor:
    """`gelu_new` with fewer products: 0.5 x (1 + tanh(c x (1 + 0.044715 x^2))).

    c = sqrt(2 / pi); rounded as `gelu_new` is. vLLM's form is
    `torch.ops.xla_ops.gelu_fast(out, input)`; `out` may be `input`.

    torch.autocast changes nothing: input is taken as it is.

    Differentiable in input, as if nothing were rounded.

    Args:
        input: [..., size], float32, float16 or bfloat16.

    Returns:
        A tensor like `input`.

    Raises:
        ValueError: an argument breaks one of the rules above.

    Source: Hendrycks and Gimpel, Gaussian Error Linear Units, 2016.

    Example:
        >>> gelu_fast(torch.tensor([-1.0, 0.0, 2.0]))
        tensor([-0.1588,  0.0000,  1.9546])
    """
    _CHECKS["gelu_fast"].tensor("input", input)
    return _gelu_fast(input)


def gelu_quick(input: torch.Tensor) -> torch.Tensor:
    """GELU by the logistic function: x / (1 + exp(-1.702 x)), rounded once.

    vLLM's form is `torch.ops.xla_ops.gelu_quick(out, input)`; `out` may be `input`.

    torch.autocast changes nothing: input is taken as it is.

    Differentiable in input, as if nothing were rounded.

    Args:
        input: [..., size], float32, float16 or bfloat16.

    Returns:
        A tensor like `input`.

    Raises:
        ValueError: an argument breaks one of the rules above.

    Source: Hendrycks and Gimpel, Gaussian Error Linear Units, 2016.

    Example:
        >>> gelu_quick(torch.tensor([-1.0, 0.0, 2.0]))
        tensor([-0.1542,  0.0000,  1.9357])
    """
    _CHECKS["gelu_quick"].tensor("input", input)
    return _gelu_quick(input)


Activation = Callable[[torch.Tensor], torch.Tensor]


def _silu(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + torch.exp(-x))


def _gelu(x: torch.Tensor) -> torch.Tensor:
    return x * 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x))
    return 0.5 * x * (1 + torch.tanh(inner))


# These three in the input's dtype, rounded after every step.
def _new(x: torch.Tensor) -> torch.Tensor:
    return _half_of(x, _SQRT_2_OVER_PI * (x + 0.044715 * (x * x * x)))


def _fast(x: torch.Tensor) -> torch.Tensor:
    return _half_of(x, (_SQRT_2_OVER_PI * x) * (1.0 + (0.044715 * x) * x))


def _half_of(x: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
    return (0.5 * x) * (1.0 + torch.tanh(inner))


def _quick(x: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return (wide / (1 + torch.exp(-1.702 * wide))).to(x.dtype)


_SQRT_2_OVER_PI = 0.79788456  # of vLLM's kernels


def _checked(op: str, input: torch.Tensor) -> Spec:
    """Checks a gated op's input; returns shape and dtype of an unquantised result."""
    check = _CHECKS[op]
    check.rows("input", input)
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


def _lower_fatrelu(input: torch.Tensor, threshold: float) -> CustomCall:
    out = _checked("fatrelu_and_mul", input)
    _check_finite("fatrelu_and_mul", "threshold", threshold)
    return CustomCall(
        "xla_ops.fatrelu_and_mul", ("input",), (out,), {"threshold": threshold}
    )


def _reference_fatrelu(input: torch.Tensor, threshold: float) -> torch.Tensor:
    threshold = float32(threshold)
    zero = torch.zeros((), dtype=torch.float32, device=input.device)
    return _reference(input, lambda x: torch.where(x > threshold, x, zero))


def _lower_swigluoai(input: torch.Tensor, alpha: float, limit: float) -> CustomCall:
    out = _checked("swigluoai_and_mul", input)
    _check_finite("swigluoai_and_mul", "alpha", alpha)
    _CHECKS["swigluoai_and_mul"].require(
        limit >= 0, "limit", "be at least 0", f"{limit:g}"
    )
    return CustomCall(
        "xla_ops.swigluoai_and_mul",
        ("input",),
        (out,),
        {"alpha": alpha, "limit": limit},
    )


def _reference_swigluoai(
    input: torch.Tensor, alpha: float, limit: float
) -> torch.Tensor:
    gate = input[..., ::2].float().clamp(max=limit)
    up = input[..., 1::2].float().clamp(-limit, limit)
    return ((up + 1) * (gate * torch.sigmoid(gate * alpha))).to(input.dtype)


def _check_finite(op: str, argument: str, value: float) -> None:
    value = float32(value)
    _CHECKS[op].require(math.isfinite(value), argument, "be finite", f"{value:g}")


def _lower_alone(input: torch.Tensor, op: str) -> CustomCall:
    _CHECKS[op].rows("input", input)
    return CustomCall(
        f"xla_ops.{op}", ("input",), (Spec.of(input),), may_overwrite={0: "input"}
    )


def _define_alone(name: str, reference: Activation) -> Op:
    """Declares an op without a gate and the form that vLLM calls."""
    op = Op(
        name,
        "(Tensor input) -> Tensor",
        functools.partial(_lower_alone, op=name),
        reference,
        autocast=autocast.unchanged,
        splits=sharding.ELEMENTS,
        gradient=activation_backward.gradient(name),
    )
    mutable.define(
        f"{name}.out(Tensor(a!) out, Tensor input) -> ()",
        lambda out, input: mutable.Update(op, (input,), {"out": out}),
        autocast=autocast.unchanged,
    )
    return op


def _define(name: str, activate: Activation, gate: int = 0, result: str = "out") -> Op:
    """Declares an op and the form that vLLM calls."""
    op = Op(
        name,
        "(Tensor input) -> Tensor",
        functools.partial(_lower, op=name),
        functools.partial(_reference, activate=activate, gate=gate),
        autocast=autocast.unchanged,
        splits=_HALVES,
        gradient=activation_backward.gradient(name),
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
        "fatrelu_and_mul",
        "swigluoai_and_mul",
        "gelu_new",
        "gelu_fast",
        "gelu_quick",
    )
}

# A column's gate and value lie half a row apart, so a piece of a row has few pairs.
_HALVES = sharding.Rule({"input": "... ~columns"}, ("... !columns",))

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
    splits=_HALVES,
)

mutable.define(
    "silu_and_mul_quant.out(Tensor(a!) result, Tensor input, Tensor scale) -> ()",
    lambda result, input, scale: mutable.Update(
        _silu_and_mul_quant, (input, scale), {"result": result}
    ),
    autocast=autocast.float32("scale"),
)

_fatrelu_and_mul = Op(
    "fatrelu_and_mul",
    "(Tensor input, float threshold) -> Tensor",
    _lower_fatrelu,
    _reference_fatrelu,
    autocast=autocast.unchanged,
    splits=_HALVES,
    gradient=activation_backward.gradient("fatrelu_and_mul"),
)
_swigluoai_and_mul = Op(
    "swigluoai_and_mul_functional",
    "(Tensor input, float alpha, float limit) -> Tensor",
    _lower_swigluoai,
    _reference_swigluoai,
    autocast=autocast.unchanged,
    splits=sharding.Rule({"input": "... columns*2"}, ("... columns",)),
    gradient=activation_backward.gradient("swigluoai_and_mul"),
    public_name="swigluoai_and_mul",
)
_gelu_new = _define_alone("gelu_new", _new)
_gelu_fast = _define_alone("gelu_fast", _fast)
_gelu_quick = _define_alone("gelu_quick", _quick)

mutable.define(
    "fatrelu_and_mul.out(Tensor(a!) out, Tensor input, float threshold) -> ()",
    lambda out, input, threshold: mutable.Update(
        _fatrelu_and_mul, (input, threshold), {"out": out}
    ),
    autocast=autocast.unchanged,
)
mutable.define(
    "swigluoai_and_mul(Tensor(a!) out, Tensor input, float alpha=1.702,"
    " float limit=7.0) -> ()",
    lambda out, input, alpha=1.702, limit=7.0: mutable.Update(
        _swigluoai_and_mul, (input, alpha, limit), {"out": out}
    ),
    autocast=autocast.unchanged,
)
