"""Quantisation in plain torch, for the references of the ops; and its constants.

The C++ side is xla_ops/cc/core/quant.h.
"""

from __future__ import annotations

from collections.abc import Sequence

from .lazy import torch

FP8_MAX = 448.0
MIN_FP8_SCALE = 1.0 / (FP8_MAX * 512.0)
MIN_INT8_SCALE = 2.0**-23  # FLT_EPSILON


def to_fp8(x: torch.Tensor) -> torch.Tensor:
    """Rounds float32 to float8_e4m3fn; saturates, and makes 448 of NaN, as in vLLM."""
    x = torch.where(x.isnan(), FP8_MAX, x.clamp(-FP8_MAX, FP8_MAX))
    return x.to(torch.float8_e4m3fn)


def to_int8(x: torch.Tensor) -> torch.Tensor:
    """Rounds float32 to int8, ties to even; saturates, and makes 0 of NaN."""
    x = torch.where(x.isnan(), 0.0, x.clamp(-128, 127))
    return x.round().to(torch.int8)


def to_int32(x: torch.Tensor) -> torch.Tensor:
    """Rounds float32 to int32 the same way; int64, so that sums do not overflow."""
    x = torch.where(x.isnan(), 0.0, x).double().clamp(-(2.0**31), 2.0**31 - 1)
    return x.round().to(torch.int64)


def without_nan(x: torch.Tensor, value: float = 0.0) -> torch.Tensor:
    """NaN does not count in a maximum or minimum."""
    return torch.where(x.isnan(), value, x)


def row_abs_max(x: torch.Tensor) -> torch.Tensor:
    """[..., hidden] -> [num_rows, 1], zero for rows of no elements."""
    x = x.reshape(num_rows(x.shape), x.shape[-1]).float().abs()
    if x.shape[-1] == 0:
        return x.new_zeros(x.shape[0], 1)
    return without_nan(x).amax(-1, keepdim=True)


def fp8_row_scale(abs_max: torch.Tensor, scale_ub: torch.Tensor | None) -> torch.Tensor:
    """The scale of a row that is quantised to fp8, from its largest magnitude."""
    if scale_ub is not None:
        abs_max = torch.fmin(abs_max, scale_ub.reshape(()))
    return (abs_max / FP8_MAX).clamp(min=MIN_FP8_SCALE)


def num_rows(shape: Sequence[int]) -> int:
    """The product of all dimensions but the last; the last may be zero."""
    rows = 1
    for size in shape[:-1]:
        rows *= size
    return rows


def first_rows(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """The rows of `target` that take `source`: vLLM's results may have more."""
    same_row = target.dim() > 1 and target.shape[1:] == source.shape[1:]
    if same_row and target.shape[0] > source.shape[0]:
        return target[: source.shape[0]]
    return target
