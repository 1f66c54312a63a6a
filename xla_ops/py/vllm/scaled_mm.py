"""Linear layers over 8-bit codes: what a quantised layer computes.

Activations are quantised by this package's ops. The product of codes is one
dot_general over fp8 or int8 operands, with a float32 or int32 result and the depth as
the inner dimension of both: the form that XLA turns into cuBLASLt's fp8 product
(`__cublas$lt$matmul$f8`, from compute capability 8.9 on) or an int8 one, without
transposing or widening a weight. Scales come after it, fused by XLA with bias and cast.

Weights are [out_features, in_features], as checkpoints have them.

Tested by tests/engine/test_quantization.py.
"""

from __future__ import annotations

import torch
import torch_xla
import torch_xla.runtime as xr
from torch.nn import functional as F

from ..ops import (
    dynamic_per_token_scaled_fp8_quant,
    dynamic_scaled_int8_quant,
    static_scaled_fp8_quant,
    static_scaled_int8_quant,
)

# XLA drops a dimension of 1 from a product, and what is left is no product of matrices
# for cuBLASLt, which pads rows to this number anyway.
_MIN_ROWS = 16


def _is_gpu() -> bool:
    return xr.device_type() in ("GPU", "CUDA")


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[num_rows, in_features], as many rows as a GPU's product needs."""
    rows = x.reshape(-1, x.shape[-1])
    missing = _MIN_ROWS - rows.shape[0]
    if missing > 0 and _is_gpu():
        rows = F.pad(rows, (0, 0, 0, missing))
    return rows


def _finish(
    out: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """From float32 rows to x's dtype and leading dimensions."""
    if bias is not None:
        out = out + bias.float()
    num_rows = x.shape[:-1].numel()
    if out.shape[0] != num_rows:
        out = out[:num_rows]
    return out.to(x.dtype).view(*x.shape[:-1], out.shape[-1])


def product(codes: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """codes weight^T of fp8 or int8 codes, exact up to the sum's float32 or int32."""
    is_int8 = codes.dtype == torch.int8
    if codes.device.type == "xla":
        return torch_xla._XLAC._xla_dot_general(
            codes,
            weight,
            (([1], [1]), ([], [])),
            preferred_element_type=torch.int32 if is_int8 else torch.float32,
        )
    # Host tensors, in tests. Sums of int8 products are exact in float64.
    wide = torch.float64 if is_int8 else torch.float32
    out = codes.to(wide) @ weight.to(wide).t()
    return out.to(torch.int32) if is_int8 else out


def fp8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    input_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x weight^T by fp8 codes of both.

    Args:
        x: [..., in_features].
        weight: [out_features, in_features], float8_e4m3fn.
        weight_scale: [1] or [out_features], float32.
        input_scale: one float32 element, or None for a scale of each row's own.
        bias: [out_features], or None.
    """
    rows = _rows(x)
    if input_scale is None:
        codes, scale = dynamic_per_token_scaled_fp8_quant(rows)
        out = product(codes, weight) * scale * weight_scale
    else:
        codes = static_scaled_fp8_quant(rows, input_scale)
        scale = input_scale * weight_scale
        if weight_scale.numel() == 1:
            scale = scale.reshape(())  # a number, which XLA hands to cuBLASLt
        out = product(codes, weight) * scale
    return _finish(out, x, bias)


def int8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    input_scale: torch.Tensor | None = None,
    input_zero_point: torch.Tensor | None = None,
    weight_sums: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x weight^T by int8 codes of both; the input's may have a zero point.

    Args:
        x: [..., in_features].
        weight: [out_features, in_features], int8.
        weight_scale: [1] or [out_features], float32.
        input_scale: one float32 element, or None for a scale of each row's own.
        input_zero_point: one int32 element, where input_scale is given, or None.
        weight_sums: [out_features], int32, the sum of each row of weight, where the
            input has a zero point; then rows of their own scale have their own.
        bias: [out_features], or None.
    """
    rows = _rows(x)
    zero_point = input_zero_point
    if input_scale is not None:
        codes = static_scaled_int8_quant(rows, input_scale, input_zero_point)
        scale = input_scale
    elif weight_sums is None:
        codes, scale = dynamic_scaled_int8_quant(rows)
    else:
        codes, scale, zero_point = dynamic_scaled_int8_quant(rows, symmetric=False)
    out = product(codes, weight)
    if weight_sums is not None:
        assert zero_point is not None
        out = out - zero_point * weight_sums
    return _finish(out.float() * scale * weight_scale, x, bias)
