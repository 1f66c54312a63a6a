"""Argument checks, in the words that the C++ handlers use too.

Every message reads `<op>: <argument> must <rule>, got <value>`; the C++ side is
xla_ops/cc/core/error.h. Shapes and dtypes are known at trace time, so a wrong call
fails where the user wrote it and not when the graph runs.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

from .dtypes import FLOAT_DTYPES, dtype_name
from .foreign import Foreign
from .hlo import Spec
from .lazy import torch


def not_dense(t: Any) -> str:
    """What `t` is if it is no dense tensor, for which torch finds no kernel; or ""."""
    if isinstance(t, Foreign):
        return ""
    if t.is_nested:
        return "a nested tensor"
    if t.layout is not torch.strided:
        return f"one of layout {t.layout}"
    return f"a quantized one of {dtype_name(t.dtype)}" if t.is_quantized else ""


def float32(value: float) -> float:
    """Rounds to what a float attribute can hold: 1e39 is infinite and 1e-50 is 0."""
    return ctypes.c_float(value).value


class Checker:
    """Checks the arguments of one op.

    Example:
        >>> check = Checker("rms_norm")
        >>> check.shape("weight", torch.ones(3), [4])
        Traceback (most recent call last):
        ...
        ValueError: rms_norm: weight must have shape [4], got [3]
    """

    def __init__(self, op: str):
        self.op = op

    def require(self, ok: bool, argument: str, rule: str, got: Any) -> None:
        """Raises ValueError unless `ok`."""
        if not ok:
            raise ValueError(f"{self.op}: {argument} must {rule}, got {got}")

    def given(self, argument: str, t: torch.Tensor | None, where: str) -> torch.Tensor:
        """Returns `t`, which may be absent elsewhere but not `where`."""
        if t is None:
            raise ValueError(f"{self.op}: {argument} must be given {where}, got None")
        return t

    def absent(self, argument: str, t: torch.Tensor | None, where: str) -> None:
        if t is not None:
            got = f"shape {list(t.shape)}"
            self.require(False, argument, f"be absent {where}", got)

    def tensor(self, argument: str, value: Any) -> None:
        if not isinstance(value, (torch.Tensor, Foreign)):
            raise TypeError(
                f"{self.op}: {argument} must be a tensor, got {type(value).__name__}"
            )
        self._dense(argument, value)

    def optional_tensors(self, **values: Any) -> None:
        """Checks arguments that are tensors or None."""
        for argument, value in values.items():
            if value is not None and not isinstance(value, (torch.Tensor, Foreign)):
                got = type(value).__name__
                rule = f"{self.op}: {argument} must be a tensor or None"
                raise TypeError(f"{rule}, got {got}")
            if value is not None:
                self._dense(argument, value)

    def _dense(self, argument: str, t: torch.Tensor | Foreign) -> None:
        if got := not_dense(t):
            self.require(False, argument, "be a dense tensor", got)

    def text(self, argument: str, value: Any) -> None:
        if not isinstance(value, str):
            got = type(value).__name__
            raise TypeError(f"{self.op}: {argument} must be a str, got {got}")

    def dtype(
        self, argument: str, t: torch.Tensor | Spec, allowed: Sequence[torch.dtype]
    ) -> None:
        if t.dtype in allowed:
            return  # every call of an op comes here: format nothing
        names = [dtype_name(d) for d in allowed]
        rule = "be " + (
            names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
        )
        self.require(False, argument, rule, dtype_name(t.dtype))

    def rank(self, argument: str, t: torch.Tensor, shape: str) -> None:
        """Checks the number of dimensions; `shape` names them: "[tokens, hidden]"."""
        if t.dim() != shape.count(",") + 1:
            self.require(False, argument, f"have shape {shape}", list(t.shape))

    def shape(self, argument: str, t: torch.Tensor, shape: Sequence[int]) -> None:
        got, shape = list(t.shape), list(shape)
        if got != shape:
            self.require(False, argument, f"have shape {shape}", got)

    def rows(self, argument: str, t: torch.Tensor) -> None:
        """Checks a float tensor of shape [..., hidden_size]."""
        self.dtype(argument, t, FLOAT_DTYPES)
        self.require(
            t.dim() > 0, argument, "have rank 1 or more", f"shape {list(t.shape)}"
        )

    def same_as(self, argument: str, t: torch.Tensor, other: torch.Tensor) -> None:
        """Checks that dtype and shape are those of `other`."""
        self.dtype(argument, t, [other.dtype])
        self.shape(argument, t, other.shape)

    def positive_finite(self, argument: str, value: float) -> None:
        value = float32(value)
        ok = value > 0 and math.isfinite(value)
        self.require(ok, argument, "be positive and finite", f"{value:g}")

    def one_element(self, argument: str, t: torch.Tensor) -> None:
        self.require(
            t.numel() == 1, argument, "have 1 element", f"shape {list(t.shape)}"
        )

    def scale(self, argument: str, t: torch.Tensor) -> None:
        """Checks a scale that is read on the device: one float32 element."""
        self.dtype(argument, t, [torch.float32])
        self.one_element(argument, t)

    def same_device(
        self, first: str, reference: torch.Tensor, /, **others: torch.Tensor | None
    ) -> None:
        """Checks that every tensor of `others` lies on `reference`'s device."""
        device = reference.device
        for argument, t in others.items():
            if t is not None and t.device != device:
                rule = f"be on {first}'s device {device}"
                self.require(False, argument, rule, t.device)
