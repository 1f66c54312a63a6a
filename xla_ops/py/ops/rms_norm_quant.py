"""RMSNorm, with or without a residual addition, with a quantised result."""

from __future__ import annotations

from ..core import autocast, mutable, quant, scalars, sharding
from ..core.checks import Checker
from ..core.custom_call import CustomCall
from ..core.hlo import Spec
from ..core.lazy import torch
from ..core.op import Op, Results

_static_check = Checker("rms_norm_static_fp8_quant")
_fused_check = Checker("fused_add_rms_norm_static_fp8_quant")
_dynamic_check = Checker("rms_norm_dynamic_per_token_quant")
_QUANT_DTYPES = (torch.float8_e4m3fn, torch.int8)


def rms_norm_static_fp8_quant(
    input: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    eps: float = 1e-6,
) -> torch.Tensor:
    """`rms_norm`, then `static_scaled_fp8_quant`, in one pass over memory.

    Under torch.autocast, weight is cast to input's dtype and scale to float32.

    Args:
        input: [..., hidden], float32, float16 or bfloat16.
        weight: [hidden], of the same dtype.
        scale: one float32 element.
        eps: added to the mean square; positive.

    Returns:
        [..., hidden], float8_e4m3fn.

    Raises:
        ValueError: an argument breaks one of the rules above.

    Semantics: vLLM's `rms_norm_static_fp8_quant`.

    Example:
        >>> x = torch.tensor([[3.0, 3.0]])
        >>> rms_norm_static_fp8_quant(x, torch.ones(2), torch.tensor(0.125)).float()
        tensor([[8., 8.]])
    """
    for name, t in (("input", input), ("weight", weight), ("scale", scale)):
        _static_check.tensor(name, t)
    return _static(input, weight, scale, scalars.number(_static_check.op, "eps", eps))


def fused_add_rms_norm_static_fp8_quant(
    input: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`fused_add_rms_norm`, then `static_scaled_fp8_quant`, in one pass over memory.

    Under torch.autocast, residual and weight are cast to input's dtype, and scale to
    float32.

    Args:
        input: [..., hidden], float32, float16 or bfloat16.
        residual: like input, in shape and dtype.
        weight: [hidden], of the same dtype.
        scale: one float32 element.
        eps: added to the mean square; positive.

    Returns:
        (out, residual_out): [..., hidden], float8_e4m3fn, and input + residual.

    Raises:
        ValueError: an argument breaks one of the rules above.

    Semantics: vLLM's `fused_add_rms_norm_static_fp8_quant`.
    """
    for name, t in (
        ("input", input),
        ("residual", residual),
        ("weight", weight),
        ("scale", scale),
    ):
        _fused_check.tensor(name, t)
    eps = scalars.number(_fused_check.op, "eps", eps)
    return _fused_static(input, residual, weight, scale, eps)


def rms_norm_dynamic_per_token_quant(
    input: torch.Tensor,
    weight: torch.Tensor,
    quant_dtype: torch.dtype,
    eps: float = 1e-6,
    scale_ub: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """Normalises each row and quantises it by a scale of its own, in one pass.

    y is `rms_norm` of the input or, with a residual, of input + residual; that sum is
    not rounded to the dtype first, unlike in `fused_add_rms_norm`.

    - float8_e4m3fn: scale = max(min(absmax(y), scale_ub) / 448, 1 / (448 * 512)) and
      out = fp8(y / scale), where NaN becomes 448.
    - int8: scale = max(absmax(y) / 127, 2^-23) and out = int8(y * (1 / scale)), where
      NaN becomes 0.

    Under torch.autocast, residual and weight are cast to input's dtype, and scale_ub to
    float32.

    Args:
        input: [..., hidden], float32, float16 or bfloat16.
        weight: [hidden], of the same dtype.
        quant_dtype: torch.float8_e4m3fn or torch.int8.
        eps: added to the mean square; positive.
        scale_ub: one float32 element, for fp8 only; None for no limit.
        residual: like input, or None.

    Returns:
        (out, scale), and with a residual (out, scale, residual_out): [..., hidden] of
        quant_dtype; [num_tokens, 1], float32; input + residual, rounded to the dtype.

    Raises:
        ValueError: an argument breaks one of the rules above.

    Semantics: vLLM's `rms_norm_dynamic_per_token_quant`.
    """
    _dynamic_check.tensor("input", input)
    _dynamic_check.tensor("weight", weight)
    _dynamic_check.optional_tensors(scale_ub=scale_ub, residual=residual)
    _check_quant_dtype(quant_dtype)
    eps = scalars.number(_dynamic_check.op, "eps", eps)
    if residual is None:
        return _dynamic(input, weight, quant_dtype, eps, scale_ub)
    return _fused_dynamic(input, residual, weight, quant_dtype, eps, scale_ub)


def _check_quant_dtype(quant_dtype: torch.dtype) -> None:
    _dynamic_check.require(
        # Not `in`: NumPy compares arrays element by element.
        any((quant_dtype == d) is True for d in _QUANT_DTYPES),
        "quant_dtype",
        "be float8_e4m3fn or int8",
        str(quant_dtype).removeprefix("torch."),
    )


def _check_common(
    check: Checker,
    input: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
) -> None:
    check.rows("input", input)
    if residual is not None:
        check.same_as("residual", residual, input)
    check.dtype("weight", weight, [input.dtype])
    check.shape("weight", weight, [input.shape[-1]])
    check.positive_finite("eps", eps)
    check.same_device("input", input, residual=residual, weight=weight)


def _lower_static(
    check: Checker,
    input: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    scale: torch.Tensor,
    eps: float,
) -> CustomCall:
    _check_common(check, input, residual, weight, eps)
    check.scale("scale", scale)
    check.same_device("input", input, scale=scale)
    rows = ("input",) if residual is None else ("input", "residual")
    sums = () if residual is None else (Spec.of(residual),)
    return CustomCall(
        f"xla_ops.{check.op}",
        (*rows, "weight", "scale"),
        (Spec(tuple(input.shape), torch.float8_e4m3fn), *sums),
        {"eps": eps},
        may_overwrite={} if residual is None else {1: "residual"},
    )


def _lower_dynamic(
    input: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    quant_dtype: torch.dtype,
    eps: float,
    scale_ub: torch.Tensor | None,
) -> CustomCall:
    check = _dynamic_check
    _check_quant_dtype(quant_dtype)
    _check_common(check, input, residual, weight, eps)
    rows = ("input",) if residual is None else ("input", "residual")
    sums = () if residual is None else (Spec.of(residual),)
    operands = [*rows, "weight"]
    if scale_ub is not None:
        check.tensor("scale_ub", scale_ub)
        check.scale("scale_ub", scale_ub)
        check.require(
            quant_dtype != torch.int8, "scale_ub", "be left out for int8", "a tensor"
        )
        check.same_device("input", input, scale_ub=scale_ub)
        operands.append("scale_ub")
    name = check.op if residual is None else "fused_add_" + check.op
    return CustomCall(
        f"xla_ops.{name}",
        tuple(operands),
        (
            Spec(tuple(input.shape), quant_dtype),
            Spec((quant.num_rows(input.shape), 1), torch.float32),
            *sums,
        ),
        {"eps": eps},
        may_overwrite={} if residual is None else {2: "residual"},
    )


def _normalize(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`x` in float32; the result is rounded to weight's dtype, twice, and widened."""
    s = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return ((x * s).to(weight.dtype) * weight).float()


def _reference_static(
    input: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    scale: torch.Tensor,
    eps: float,
) -> Results:
    z = input if residual is None else input + residual
    y = _normalize(z.float(), weight, eps)
    out = quant.to_fp8(y * (1.0 / scale.reshape(())))
    return out if residual is None else (out, z)


def _reference_dynamic(
    input: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    quant_dtype: torch.dtype,
    eps: float,
    scale_ub: torch.Tensor | None,
) -> Results:
    x = input.float() if residual is None else input.float() + residual.float()
    y = _normalize(x, weight, eps)
    abs_max = quant.row_abs_max(y)
    y = y.reshape(abs_max.shape[0], input.shape[-1])
    if quant_dtype == torch.int8:
        scale = (abs_max / 127.0).clamp(min=quant.MIN_INT8_SCALE)
        out = quant.to_int8(y * (1.0 / scale))
    else:
        scale = quant.fp8_row_scale(abs_max, scale_ub)
        out = quant.to_fp8(y / scale)
    results = (out.reshape(input.shape), scale)
    return results if residual is None else (*results, x.to(input.dtype))


_static = Op(
    "rms_norm_static_fp8_quant",
    "(Tensor input, Tensor weight, Tensor scale, float eps) -> Tensor",
    lambda x, *rest: _lower_static(_static_check, x, None, *rest),
    lambda x, *rest: _reference_static(x, None, *rest),
    autocast=autocast.like("input", "weight", scales=("scale",)),
    splits=sharding.ROWS,
)
_fused_static = Op(
    "fused_add_rms_norm_static_fp8_quant",
    "(Tensor input, Tensor residual, Tensor weight, Tensor scale, float eps)"
    " -> (Tensor, Tensor)",
    lambda *args: _lower_static(_fused_check, *args),
    _reference_static,
    autocast=autocast.like("input", "residual", "weight", scales=("scale",)),
    splits=sharding.TWO_ROWS,
)
_dynamic = Op(
    "rms_norm_dynamic_per_token_quant",
    "(Tensor input, Tensor weight, ScalarType quant_dtype, float eps,"
    " Tensor? scale_ub) -> (Tensor, Tensor)",
    lambda x, *rest: _lower_dynamic(x, None, *rest),
    lambda x, *rest: _reference_dynamic(x, None, *rest),
    autocast=autocast.like("input", "weight", scales=("scale_ub",)),
    splits=sharding.rows_with_scales(1),
)
_fused_dynamic = Op(
    "fused_add_rms_norm_dynamic_per_token_quant",
    "(Tensor input, Tensor residual, Tensor weight, ScalarType quant_dtype, float eps,"
    " Tensor? scale_ub) -> (Tensor, Tensor, Tensor)",
    _lower_dynamic,
    _reference_dynamic,
    autocast=autocast.like("input", "residual", "weight", scales=("scale_ub",)),
    splits=sharding.rows_with_scales(1, num_rows_after=1),
    public_name="rms_norm_dynamic_per_token_quant",
)


# vLLM's forms. The dtype of the last one's result chooses the quantisation.
def _dynamic_update(
    result: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    epsilon: float,
    scale_ub: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> mutable.Update:
    _dynamic_check.dtype("result", result, _QUANT_DTYPES)
    rest = (weight, result.dtype, epsilon, scale_ub)
    targets = {"result": result, "scale": scale}
    if residual is None:
        return mutable.Update(_dynamic, (input, *rest), targets)
    targets["residual"] = residual
    return mutable.Update(_fused_dynamic, (input, residual, *rest), targets)


mutable.define(
    "rms_norm_static_fp8_quant.out(Tensor(a!) result, Tensor input, Tensor weight,"
    " Tensor scale, float epsilon) -> ()",
    lambda result, *args: mutable.Update(_static, args, {"result": result}),
    autocast=autocast.like("input", "weight", scales=("scale",)),
)
mutable.define(
    "fused_add_rms_norm_static_fp8_quant.out(Tensor(a!) result, Tensor input,"
    " Tensor(b!) residual, Tensor weight, Tensor scale, float epsilon) -> ()",
    lambda result, input, residual, *rest: mutable.Update(
        _fused_static,
        (input, residual, *rest),
        {"result": result, "residual": residual},
    ),
    autocast=autocast.like("input", "weight", scales=("scale",)),
)
mutable.define(
    "rms_norm_dynamic_per_token_quant.out(Tensor(a!) result, Tensor input,"
    " Tensor weight, Tensor(b!) scale, float epsilon, Tensor? scale_ub,"
    " Tensor(c!)? residual) -> ()",
    _dynamic_update,
    autocast=autocast.like("input", "weight", scales=("scale_ub",)),
)
