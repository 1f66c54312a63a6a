"""Quantisation to int8, symmetric or with a zero point (azp)."""

from __future__ import annotations

from ..core import autocast, mutable, quant, scalars, sharding
from ..core.checks import Checker
from ..core.custom_call import CustomCall
from ..core.hlo import Spec
from ..core.lazy import torch
from ..core.op import Op

_static_check = Checker("static_scaled_int8_quant")
_dynamic_check = Checker("dynamic_scaled_int8_quant")


def static_scaled_int8_quant(
    input: torch.Tensor, scale: torch.Tensor, azp: torch.Tensor | None = None
) -> torch.Tensor:
    """Quantises by a given scale and, asymmetrically, a given zero point.

    out = sat8(rne(input / scale)), or with azp
    sat8(sat32(rne(input * (1 / scale))) + azp): rounded to nearest even, saturated; NaN
    becomes 0 before azp. Dequantise by `(out - azp) * scale`.

    Under torch.autocast, input is taken as it is, and scale is cast to float32.

    Args:
        input: [..., hidden], float32, float16 or bfloat16.
        scale: one float32 element.
        azp: one int32 element, or None.

    Returns:
        [..., hidden], int8.

    Raises:
        ValueError: an argument breaks one of the rules above.

    Semantics: vLLM's `static_scaled_int8_quant`.

    Example:
        >>> static_scaled_int8_quant(torch.tensor([3.0, -200.0]), torch.tensor(0.5))
        tensor([   6, -128], dtype=torch.int8)
    """
    _static_check.tensor("input", input)
    _static_check.tensor("scale", scale)
    if azp is not None:
        _static_check.tensor("azp", azp)
    return _static(input, scale, azp)


def dynamic_scaled_int8_quant(
    input: torch.Tensor, symmetric: bool = True
) -> tuple[torch.Tensor, ...]:
    """Quantises each row by a scale of its own and, asymmetrically, a zero point.

    - symmetric: scale = absmax(row) / 127, out = sat8(rne(row * (127 / absmax(row)))).
    - otherwise: scale = (max(row) - min(row)) / 255, azp = rne(-128 - min(row) / scale)
      and out = sat8(sat32(rne(row * (1 / scale))) + azp).

    NaN does not count in absmax, max and min, and becomes 0 before azp. Rows of zeros
    have scale 0 and codes 0. A row whose (max - min) / 255 is not positive, such as a
    constant one, is quantised symmetrically, with azp 0; in vLLM it divides by zero.

    torch.autocast changes nothing: input is taken as it is.

    Args:
        input: [..., hidden], float32, float16 or bfloat16.
        symmetric: whether to do without zero points.

    Returns:
        (out, scale) or (out, scale, azp): [..., hidden], int8; [num_tokens, 1],
        float32; [num_tokens, 1], int32, where num_tokens is the product of the leading
        dimensions.

    Raises:
        ValueError: an argument breaks one of the rules above.

    Semantics: vLLM's `dynamic_scaled_int8_quant`.

    Example:
        >>> dynamic_scaled_int8_quant(torch.tensor([[0.0, 255.0]]), symmetric=False)
        (tensor([[-128,  127]], dtype=torch.int8), tensor([[1.]]), tensor([[-128]], \
dtype=torch.int32))
    """
    _dynamic_check.tensor("input", input)
    symmetric = scalars.flag(_dynamic_check.op, "symmetric", symmetric)
    return _dynamic(input) if symmetric else _dynamic_azp(input)


def _int8_like(input: torch.Tensor) -> Spec:
    return Spec(tuple(input.shape), torch.int8)


def _lower_static(
    input: torch.Tensor, scale: torch.Tensor, azp: torch.Tensor | None
) -> CustomCall:
    _static_check.rows("input", input)
    _static_check.scale("scale", scale)
    _static_check.same_device("input", input, scale=scale, azp=azp)
    operands: tuple[str, ...] = ("input", "scale")
    if azp is not None:
        _static_check.dtype("azp", azp, [torch.int32])
        _static_check.one_element("azp", azp)
        operands += ("azp",)
    return CustomCall(
        "xla_ops.static_scaled_int8_quant", operands, (_int8_like(input),)
    )


def _lower_dynamic(input: torch.Tensor) -> CustomCall:
    _dynamic_check.rows("input", input)
    scale = Spec((quant.num_rows(input.shape), 1), torch.float32)
    return CustomCall(
        "xla_ops.dynamic_scaled_int8_quant",
        ("input",),
        (_int8_like(input), scale),
    )


def _lower_dynamic_azp(input: torch.Tensor) -> CustomCall:
    _dynamic_check.rows("input", input)
    shape = (quant.num_rows(input.shape), 1)
    return CustomCall(
        "xla_ops.dynamic_scaled_int8_azp_quant",
        ("input",),
        (_int8_like(input), Spec(shape, torch.float32), Spec(shape, torch.int32)),
    )


def _with_zero_point(
    x: torch.Tensor, scale: torch.Tensor, azp: torch.Tensor
) -> torch.Tensor:
    codes = quant.to_int32(x * (1.0 / scale)) + azp
    return codes.clamp(-128, 127).to(torch.int8)


def _reference_static(
    input: torch.Tensor, scale: torch.Tensor, azp: torch.Tensor | None
) -> torch.Tensor:
    scale = scale.reshape(())
    if azp is None:
        return quant.to_int8(input.float() / scale)
    return _with_zero_point(input.float(), scale, azp.reshape(()))


def _symmetric(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of float32 rows [num_tokens, hidden]."""
    abs_max = quant.row_abs_max(x)
    # torch takes 127.0 / abs_max for 127.0 * abs_max.reciprocal(), which rounds twice.
    factor = torch.full_like(abs_max, 127.0) / abs_max
    factor = torch.where(abs_max == 0, 0.0, factor)
    return quant.to_int8(x * factor), abs_max / 127.0


def _reference_dynamic(input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = input.reshape(quant.num_rows(input.shape), input.shape[-1]).float()
    codes, scale = _symmetric(x)
    return codes.reshape(input.shape), scale


def _reference_dynamic_azp(
    input: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = input.reshape(quant.num_rows(input.shape), input.shape[-1]).float()
    codes, scale = _symmetric(x)
    # An infinity more a row makes rows without numbers fail max >= min, too.
    infinity = x.new_full((x.shape[0], 1), torch.inf)
    high = torch.cat([quant.without_nan(x, -torch.inf), -infinity], -1)
    low = torch.cat([quant.without_nan(x, torch.inf), infinity], -1)
    high, low = high.amax(-1, keepdim=True), low.amin(-1, keepdim=True)
    step = (high - low) / 255.0
    asymmetric = (high >= low) & (step > 0)
    azp = quant.to_int32(-128.0 - low / step)
    azp = torch.where(asymmetric, azp, 0)
    codes = torch.where(asymmetric, _with_zero_point(x, step, azp), codes)
    scale = torch.where(asymmetric, step, scale)
    return codes.reshape(input.shape), scale, azp.to(torch.int32)


_static = Op(
    "static_scaled_int8_quant",
    "(Tensor input, Tensor scale, Tensor? azp) -> Tensor",
    _lower_static,
    _reference_static,
    autocast=autocast.float32("scale"),
    splits=sharding.ELEMENTS,
)
_dynamic = Op(
    "dynamic_scaled_int8_quant",
    "(Tensor input) -> (Tensor, Tensor)",
    _lower_dynamic,
    _reference_dynamic,
    autocast=autocast.unchanged,
    splits=sharding.rows_with_scales(1),
)
_dynamic_azp = Op(
    "dynamic_scaled_int8_azp_quant",
    "(Tensor input) -> (Tensor, Tensor, Tensor)",
    _lower_dynamic_azp,
    _reference_dynamic_azp,
    autocast=autocast.unchanged,
    splits=sharding.rows_with_scales(2),
    public_name="dynamic_scaled_int8_quant",
)


# vLLM's forms.
def _dynamic_update(
    result: torch.Tensor,
    input: torch.Tensor,
    scale: torch.Tensor,
    azp: torch.Tensor | None,
) -> mutable.Update:
    targets = {"result": result, "scale": scale}
    if azp is None:
        return mutable.Update(_dynamic, (input,), targets)
    return mutable.Update(_dynamic_azp, (input,), {**targets, "azp": azp})


mutable.define(
    "static_scaled_int8_quant.out(Tensor(a!) result, Tensor input, Tensor scale,"
    " Tensor? azp) -> ()",
    lambda result, *args: mutable.Update(_static, args, {"result": result}),
    autocast=autocast.float32("scale"),
)
mutable.define(
    "dynamic_scaled_int8_quant.out(Tensor(a!) result, Tensor input, Tensor(b!) scale,"
    " Tensor(c!)? azp) -> ()",
    _dynamic_update,
    autocast=autocast.unchanged,
)
