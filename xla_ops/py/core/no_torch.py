"""What the declarations of ops name of torch, for processes that run without it.

`lazy.torch` is this module there. It holds dtypes by torch's names, and the types that
arguments are told apart by, of which there are then no instances. What computes on
tensors (a reference, a front) has no business in such a process, and says so.
"""

from __future__ import annotations

from math import inf
from typing import Any, ClassVar


class DType:
    """A dtype by name. It equals torch's of that name, where torch comes later."""

    def __init__(self, name: str):
        self.name = name

    def __repr__(self) -> str:
        return f"torch.{self.name}"

    def __eq__(self, other: object) -> Any:
        is_torch_dtype = type(other).__name__ == "dtype"
        return self is other or (is_torch_dtype and repr(self) == str(other))

    def __hash__(self) -> int:
        return hash(self.name)


class Tensor:
    """Nothing is one."""


class SymInt:
    """Nothing is one."""


class SymFloat:
    """Nothing is one."""


class compiler:  # noqa: N801 - torch.compiler
    """Nothing compiles."""

    is_compiling: ClassVar[Any] = staticmethod(lambda: False)
    is_dynamo_compiling: ClassVar[Any] = staticmethod(lambda: False)


def is_grad_enabled() -> Any:
    """Torch records nothing."""
    return False


def are_deterministic_algorithms_enabled() -> Any:
    """Nobody asked torch."""
    return False


def zeros_like(tensor: Any) -> Any:
    """Of an array of another framework (`foreign`), which knows how."""
    return tensor.zeros_like(tensor)


def cat(tensors: Any, dim: Any = 0) -> Any:
    """Of arrays of another framework (`foreign`), which know how."""
    return tensors[0].cat(tensors, dim)


Size = tuple
dtype = DType

bool = DType("bool")
int8 = DType("int8")
int16 = DType("int16")
int32 = DType("int32")
int64 = DType("int64")
uint8 = DType("uint8")
float16 = DType("float16")
float32 = DType("float32")
float64 = DType("float64")
bfloat16 = DType("bfloat16")
float8_e5m2 = DType("float8_e5m2")
float8_e4m3fn = DType("float8_e4m3fn")

__all__ = ["inf"]


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    raise RuntimeError(
        f"torch.{name} must not be asked for where xla_ops runs without torch"
    )
