"""Arguments that are numbers and not tensors, as users have them.

A public function takes Python's numbers, NumPy's, symbolic sizes, and tensors of one
element on the CPU. It makes Python's of them, or says which argument is wrong: a schema
of torch's rounds 9.5 to 9, reads True as 1, waits for a device to get at a tensor's
element, and under torch.compile names no argument of ours.

Tested by tests/ops/test_arguments.py.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, cast

from .lazy import torch

_CONSTANTS = (int, float, complex, str, bytes, type(None))


def integer(op: str, argument: str, value: Any) -> int:
    """Returns `value` as an int, or as the torch.SymInt that it is.

    Raises:
        TypeError: it is none, or a tensor whose element the host does not know.
    """
    if isinstance(value, torch.SymInt):
        return cast(int, value)  # as torch types sizes, which are symbols too
    if type(value) is not int:
        value = _converted(op, argument, value, "an int", operator.index, torch.int64)
    # Dynamo's symbols say that they are ints, and are not to be looked at.
    if not torch.compiler.is_dynamo_compiling() and value.bit_length() > 63:
        got = f"one of {value.bit_length()}"
        raise TypeError(
            f"{op}: {argument} must be an int of at most 63 bits, got {got}"
        )
    return value


def number(op: str, argument: str, value: Any) -> float:
    """Returns `value`, an int or a float, as a float or as the symbol that it is.

    Raises:
        TypeError: it is none, or a tensor whose element the host does not know.
    """
    if type(value) is float or isinstance(value, torch.SymFloat):
        return cast(float, value)
    if isinstance(value, torch.SymInt):
        return cast(float, torch.sym_float(value))
    if type(value) is int and (
        torch.compiler.is_dynamo_compiling() or value.bit_length() <= 1023
    ):
        return float(value)
    return _converted(op, argument, value, "a float", _real, torch.float64)


def flag(op: str, argument: str, value: Any) -> bool:
    """Returns `value`, a bool or 0 or 1, as a bool.

    Raises:
        TypeError: it is none, or a tensor whose element the host does not know.
    """
    if type(value) is bool:
        return value
    if type(value) is int and value in (0, 1):
        return value == 1
    return _converted(op, argument, value, "a bool", _truth, torch.bool)


def _converted(
    op: str,
    argument: str,
    value: Any,
    kind: str,
    convert: Callable[[Any], Any],
    widest: torch.dtype,
) -> Any:
    rule = f"{op}: {argument} must be {kind}, got "
    if torch.compiler.is_dynamo_compiling():
        # Dynamo takes NumPy's numbers for arrays that it does not know yet.
        known = isinstance(value, _CONSTANTS)
        unknown = ", whose value torch.compile does not know; convert it outside"
        raise TypeError(rule + type(value).__name__ + ("" if known else unknown))
    if isinstance(value, torch.Tensor):
        if value.dim() or not torch.can_cast(value.dtype, widest):
            got = f"a tensor of {value.dtype} and shape {list(value.shape)}"
            raise TypeError(rule + got)
        if value.device.type != "cpu" or type(value) is not torch.Tensor:
            raise TypeError(rule + f"a tensor on {value.device}; pass .item() of it")
        value = value.item()
    elif hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        value = value.item()  # NumPy's
    if isinstance(value, bool) and widest is not torch.bool:
        raise TypeError(rule + str(value))
    try:
        return convert(value)
    except OverflowError:
        raise TypeError(rule + f"an int of {value.bit_length()} bits") from None
    except (TypeError, ValueError):
        raise TypeError(rule + _describe(value)) from None


def _real(value: Any) -> float:
    if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
        raise TypeError
    return float(value)


def _truth(value: Any) -> bool:
    index = operator.index(value)
    if index not in (0, 1):
        raise ValueError
    return index == 1


def _describe(value: Any) -> str:
    return "None" if value is None else f"{value!r} ({type(value).__name__})"
