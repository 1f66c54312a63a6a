"""Training through a quantisation, by the straight-through estimate.

The ops that quantise have no gradient, and say so: almost everywhere it is zero. Who
wants the estimate asks for it, by `straight_through`.

Source: Bengio et al., Estimating or Propagating Gradients Through Stochastic Neurons
for Conditional Computation, 2013.
"""

from __future__ import annotations

from typing import Any

import torch

from . import autograd, tracing
from .checks import Checker
from .gradients import message

_check = Checker("straight_through")

# What may become the largest code of a type, and the smallest: half a step beyond.
_BOUNDS = {
    torch.float8_e4m3fn: (-464.0, 464.0),
    torch.float8_e5m2: (-61440.0, 61440.0),
    torch.int8: (-128.5, 127.5),
}


def straight_through(
    input: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    azp: torch.Tensor | None = None,
) -> torch.Tensor:
    """Dequantises codes, and lets gradients through to what was quantised.

    out = T((codes - azp) * scale), where T rounds to input's dtype. In the backward
    input gets out's gradient as it is, and zero where the code is one that cannot say
    how far input was beyond it. Codes and scales get none.

    Args:
        input: [..., hidden], float32, float16 or bfloat16: what was quantised.
        codes: like input, float8_e4m3fn, float8_e5m2 or int8.
        scale: float32, of one element or one for each row.
        azp: the zero point, int32, of as many; None: 0.

    Returns:
        A tensor like `input`.

    Raises:
        ValueError: an argument breaks one of the rules above.

    Example:
        >>> x = torch.tensor([[1.0, -2.0, 3.0, 500.0]], requires_grad=True)
        >>> scale = torch.ones(1)
        >>> codes = xla_ops.static_scaled_fp8_quant(x, scale)
        >>> xla_ops.straight_through(x, codes, scale).sum().backward()
        >>> x.grad
        tensor([[1., 1., 1., 0.]])
    """
    named = (("input", input), ("codes", codes), ("scale", scale))
    for name, value in named:
        _check.tensor(name, value)
    _check.optional_tensors(azp=azp)
    _check.rows("input", input)
    _check.dtype("codes", codes, list(_BOUNDS))
    _check.shape("codes", codes, input.shape)
    _check.dtype("scale", scale, [torch.float32])
    for name, t in named:
        if tracing.has_tangent(t):
            raise RuntimeError(message(_check.op, name, autograd.TANGENT))
    _check.same_device("input", input, codes=codes, scale=scale, azp=azp)
    factor = _of_rows("scale", scale, input)
    offset: torch.Tensor | float = 0.0
    if azp is not None:
        _check.dtype("azp", azp, [torch.int32])
        offset = _of_rows("azp", azp, input).float()
    with torch.no_grad():
        out = ((codes.detach().float() - offset) * factor).to(input.dtype)
        least, most = _BOUNDS[codes.dtype]
        place = input.detach().float() / factor + offset
        is_inside = (place >= least) & (place <= most)
    result: torch.Tensor = _Through.apply(input, out, is_inside)
    return result


def _of_rows(name: str, t: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
    """One element, or one of each row, to be broadcast over a row."""
    rows = input.shape[:-1].numel()
    ok = t.numel() in (1, rows)
    rule = f"have 1 element or {rows}"
    _check.require(ok, name, rule, f"shape {list(t.shape)}")
    t = t.detach()
    return t.reshape(()) if t.numel() == 1 else t.reshape(*input.shape[:-1], 1)


class _Through(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        input: torch.Tensor, out: torch.Tensor, is_inside: torch.Tensor
    ) -> torch.Tensor:
        return out.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        (is_inside,) = ctx.saved_tensors
        return torch.where(is_inside, grad, torch.zeros_like(grad)), None, None
