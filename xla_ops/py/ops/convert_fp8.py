"""Conversion to and from fp8 by a scale that the host knows."""

from __future__ import annotations

from ..core import autocast, mutable, paged_cache, scalars, sharding
from ..core.checks import Checker, float32
from ..core.custom_call import CustomCall
from ..core.dtypes import FLOAT_DTYPES
from ..core.hlo import Spec
from ..core.lazy import torch
from ..core.op import Op

_check = Checker("convert_fp8")


def convert_fp8(
    src: torch.Tensor,
    scale: float = 1.0,
    kv_cache_dtype: str = "fp8",
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Converts a KV cache, or any tensor, to fp8 or back.

    To fp8, fp8(float(src) / scale): rounded to nearest even and saturated, infinities
    too; NaN stays NaN. Back, T(float(src) * scale). What `src` is says which.

    vLLM's form, which writes into its first argument, is
    `torch.ops.xla_ops.convert_fp8(dst, src, scale, kv_cache_dtype)`. `scale` is a
    constant of compiled programs: for one that changes, `static_scaled_fp8_quant`.

    torch.autocast changes nothing: src is taken as it is.

    Args:
        src: [...]: float32, float16 or bfloat16; or uint8 or the fp8 type.
        scale: positive and finite, a number and no tensor.
        kv_cache_dtype: "fp8" or "fp8_e4m3" (float8_e4m3fn), or "fp8_e5m2".
        dtype: of the result. To fp8: the fp8 type (None) or uint8. Back: float32,
            float16 or bfloat16, and not None.

    Returns:
        A tensor of src's shape.

    Raises:
        ValueError: an argument breaks one of the rules above.

    Source: Micikevicius et al., FP8 Formats for Deep Learning, 2022. Semantics: vLLM's
    `_C_cache_ops.convert_fp8`, which takes no e5m2.

    Example:
        >>> codes = convert_fp8(torch.tensor([3.0, -1000.0]), 0.5)
        >>> convert_fp8(codes, 0.5, dtype=torch.float32)
        tensor([   3., -224.])
    """
    _check.tensor("src", src)
    _check.text("kv_cache_dtype", kv_cache_dtype)
    if dtype is None:
        dtype = _codes(kv_cache_dtype)[0] if src.dtype in FLOAT_DTYPES else None
    if not isinstance(dtype, torch.dtype):
        _check.require(False, "dtype", "be float32, float16 or bfloat16", dtype)
    return _op(src, scalars.number(_check.op, "scale", scale), kv_cache_dtype, dtype)


def _codes(kv_cache_dtype: str) -> tuple[torch.dtype, torch.dtype]:
    """The two dtypes that codes of a format have."""
    _check.require(
        kv_cache_dtype in paged_cache.FP8,
        "kv_cache_dtype",
        "be fp8, fp8_e4m3 or fp8_e5m2",
        kv_cache_dtype,
    )
    return paged_cache.FP8[kv_cache_dtype], torch.uint8


def _lower(
    src: torch.Tensor, scale: float, kv_cache_dtype: str, dtype: torch.dtype
) -> CustomCall:
    codes = _codes(kv_cache_dtype)
    _check.positive_finite("scale", scale)
    _check.dtype("src", src, [*FLOAT_DTYPES, *codes])
    wanted = codes if src.dtype in FLOAT_DTYPES else FLOAT_DTYPES
    dst = Spec(tuple(src.shape), dtype)
    if dtype not in wanted:
        _check.dtype("dst", dst, wanted)
    return CustomCall(
        "xla_ops.convert_fp8",
        ("src",),
        (dst,),
        {"kv_cache_dtype": kv_cache_dtype, "scale": scale},
    )


def _reference(
    src: torch.Tensor, scale: float, kv_cache_dtype: str, dtype: torch.dtype
) -> torch.Tensor:
    fp8, scale = paged_cache.FP8[kv_cache_dtype], float32(scale)
    if src.dtype in FLOAT_DTYPES:
        limit = torch.finfo(fp8).max
        return (src.float() / scale).clamp(-limit, limit).to(fp8).view(dtype)
    return (src.view(fp8).float() * scale).to(dtype)


_op = Op(
    "convert_fp8_functional",
    "(Tensor src, float scale, str kv_cache_dtype, ScalarType dtype) -> Tensor",
    _lower,
    _reference,
    autocast=autocast.unchanged,
    splits=sharding.Rule({"src": "... columns"}, ("... columns",)),
    public_name="convert_fp8",
)

mutable.define(
    "convert_fp8(Tensor(a!) dst, Tensor src, float scale, str kv_cache_dtype) -> ()",
    lambda dst, src, scale, kv_cache_dtype: mutable.Update(
        _op, (src, scale, kv_cache_dtype, dst.dtype), {"dst": dst}
    ),
    autocast=autocast.unchanged,
)
