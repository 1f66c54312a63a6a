"""The element types that custom calls carry, in the three numberings in use."""

from __future__ import annotations

from .lazy import torch

# dtype -> (XLA PrimitiveType, XLA_FFI_DataType). The FFI's C header and
# xla_data.proto agree on these numbers; they are part of XLA's stable formats.
_PRIMITIVE_TYPE = {
    "bool": 1,
    "int8": 2,
    "int16": 3,
    "int32": 4,
    "int64": 5,
    "uint8": 6,
    "float16": 10,
    "float32": 11,
    "float64": 12,
    "bfloat16": 16,
    "float8_e5m2": 19,
    "float8_e4m3fn": 20,
}

# By what `torch` has now; torch may come later (`lazy`), and then the name tells.
_BY_DTYPE = {getattr(torch, name): n for name, n in _PRIMITIVE_TYPE.items()}

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


def primitive_type(dtype: torch.dtype) -> int:
    """Returns the number of `dtype` in HLO protos and in the FFI."""
    number = _BY_DTYPE.get(dtype)
    return _PRIMITIVE_TYPE[dtype_name(dtype)] if number is None else number


def dtype_name(dtype: torch.dtype) -> str:
    """Returns the name used in error messages, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")
