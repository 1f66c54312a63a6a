"""Quantisation to fp8 (float8_e4m3fn), by a given scale or by scales of the data."""

from __future__ import annotations

from ..core import autocast, mutable, quant, sharding
from ..core.checks import Checker
from ..core.custom_call import CustomCall
from ..core.hlo import Spec
from ..core.lazy import torch
from ..core.op import Op

_static_check = Checker("static_scaled_fp8_quant")
_dynamic_check = Checker("dynamic_scaled_fp8_quant")
_token_check = Checker("dynamic_per_token_scaled_fp8_quant")


def static_scaled_fp8_quant(input: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Quantises by a given scale: out = fp8(input * (1 / scale)).

    fp8 rounds to nearest even and saturates to +-448; NaN becomes 448. Dequantise by
    `out.float() * scale`.

    Under torch.autocast, input is taken as it is, and scale is cast to float32.

    Args:
        input: [..., hidden], float32, float16 or bfloat16.
        scale: one float32 element.

    Returns:
        [..., hidden], float8_e4m3fn.

    Raises:
        ValueError: an argument breaks one of the rules above.

    Semantics: vLLM's `static_scaled_fp8_quant`.

    Example:
        >>> static_scaled_fp8_quant(torch.tensor([3.0]), torch.tensor(0.5)).float()
        tensor([6.])
    """
    _static_check.tensor("input", input)
    _static_check.tensor("scale", scale)
    return _static(input, scale)


def dynamic_scaled_fp8_quant(
    input: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantises by one scale for the whole tensor, absmax(input) / 448.

    Then as `static_scaled_fp8_quant`. NaN does not count in absmax. The scale has no
    minimum: it is 0 for zeros only, whose codes are then 448 (dequantised: 0).

    torch.autocast changes nothing: input is taken as it is.

    Args:
        input: [..., hidden], float32, float16 or bfloat16.

    Returns:
        (out, scale): [..., hidden], float8_e4m3fn, and [1], float32.

    Raises:
        ValueError: an argument breaks one of the rules above.

    Semantics: vLLM's `dynamic_scaled_fp8_quant`.

    Example:
        >>> dynamic_scaled_fp8_quant(torch.tensor([56.0, -7.0]))[0].float()
        tensor([448., -56.])
    """
    _dynamic_check.tensor("input", input)
    return _dynamic(input)


def dynamic_per_token_scaled_fp8_quant(
    input: torch.Tensor, scale_ub: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantises each row by a scale of its own.

    scale = max(min(absmax(row), scale_ub) / 448, 1 / (448 * 512)) and
    out = fp8(row / scale), with fp8 as in `static_scaled_fp8_quant`.

    Under torch.autocast, input is taken as it is, and scale_ub is cast to float32.

    Args:
        input: [..., hidden], float32, float16 or bfloat16.
        scale_ub: one float32 element, the largest magnitude that a row's scale makes
            room for; larger values saturate. None for no limit.

    Returns:
        (out, scale): [..., hidden], float8_e4m3fn, and [num_tokens, 1], float32, where
        num_tokens is the product of the leading dimensions.

    Raises:
        ValueError: an argument breaks one of the rules above.

    Semantics: vLLM's `dynamic_per_token_scaled_fp8_quant`.

    Example:
        >>> x = torch.tensor([[448.0, 1.0], [-1.0, 0.5]])
        >>> dynamic_per_token_scaled_fp8_quant(x)[0].float()
        tensor([[ 448.,    1.],
                [-448.,  224.]])
    """
    _token_check.tensor("input", input)
    if scale_ub is not None:
        _token_check.tensor("scale_ub", scale_ub)
    return _per_token(input, scale_ub)


def _fp8_like(input: torch.Tensor) -> Spec:
    return Spec(tuple(input.shape), torch.float8_e4m3fn)


def _lower_static(input: torch.Tensor, scale: torch.Tensor) -> CustomCall:
    _static_check.rows("input", input)
    _static_check.scale("scale", scale)
    _static_check.same_device("input", input, scale=scale)
    return CustomCall(
        "xla_ops.static_scaled_fp8_quant",
        ("input", "scale"),
        (_fp8_like(input),),
    )


def _lower_dynamic(input: torch.Tensor) -> CustomCall:
    _dynamic_check.rows("input", input)
    return CustomCall(
        "xla_ops.dynamic_scaled_fp8_quant",
        ("input",),
        (_fp8_like(input), Spec((1,), torch.float32)),
    )


def _lower_per_token(input: torch.Tensor, scale_ub: torch.Tensor | None) -> CustomCall:
    _token_check.rows("input", input)
    operands: tuple[str, ...] = ("input",)
    if scale_ub is not None:
        _token_check.scale("scale_ub", scale_ub)
        _token_check.same_device("input", input, scale_ub=scale_ub)
        operands += ("scale_ub",)
    scale = Spec((quant.num_rows(input.shape), 1), torch.float32)
    return CustomCall(
        "xla_ops.dynamic_per_token_scaled_fp8_quant",
        operands,
        (_fp8_like(input), scale),
    )


def _reference_static(input: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return quant.to_fp8(input.float() * (1.0 / scale.reshape(())))


def _reference_dynamic(input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = quant.row_abs_max(input.reshape(1, -1)).reshape(1) / quant.FP8_MAX
    return _reference_static(input, scale), scale


def _reference_per_token(
    input: torch.Tensor, scale_ub: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    scale = quant.fp8_row_scale(quant.row_abs_max(input), scale_ub)
    rows = input.reshape(scale.shape[0], input.shape[-1])
    return quant.to_fp8(rows.float() / scale).reshape(input.shape), scale


_static = Op(
    "static_scaled_fp8_quant",
    "(Tensor input, Tensor scale) -> Tensor",
    _lower_static,
    _reference_static,
    autocast=autocast.float32("scale"),
    splits=sharding.ELEMENTS,
)
_dynamic = Op(
    "dynamic_scaled_fp8_quant",
    "(Tensor input) -> (Tensor, Tensor)",
    _lower_dynamic,
    _reference_dynamic,
    autocast=autocast.unchanged,
    # One scale for all elements.
    splits=sharding.Rule({"input": "~... ~columns"}, ("!... !columns", "!one")),
)
_per_token = Op(
    "dynamic_per_token_scaled_fp8_quant",
    "(Tensor input, Tensor? scale_ub) -> (Tensor, Tensor)",
    _lower_per_token,
    _reference_per_token,
    autocast=autocast.float32("scale_ub"),
    splits=sharding.rows_with_scales(1),
)

# vLLM's forms. `result` may have more rows than `input`: those stay as they are. Of a
# per-tensor `scale` only the first element is written.
mutable.define(
    "static_scaled_fp8_quant.out(Tensor(a!) result, Tensor input, Tensor scale) -> ()",
    lambda result, input, scale: mutable.Update(
        _static, (input, scale), {"result": quant.first_rows(result, input)}
    ),
    autocast=autocast.float32("scale"),
)
mutable.define(
    "dynamic_scaled_fp8_quant.out(Tensor(a!) result, Tensor input, Tensor(b!) scale)"
    " -> ()",
    lambda result, input, scale: mutable.Update(
        _dynamic,
        (input,),
        {
            "result": quant.first_rows(result, input),
            "scale": scale.view(-1)[:1] if scale.numel() > 1 else scale,
        },
    ),
    autocast=autocast.unchanged,
)
mutable.define(
    "dynamic_per_token_scaled_fp8_quant.out(Tensor(a!) result, Tensor input,"
    " Tensor(b!) scale, Tensor? scale_ub) -> ()",
    lambda result, input, scale, scale_ub: mutable.Update(
        _per_token,
        (input, scale_ub),
        {"result": quant.first_rows(result, input), "scale": scale},
    ),
    autocast=autocast.float32("scale_ub"),
)
