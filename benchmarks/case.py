"""What one case of the benchmark says. cases.py has the list of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Target:
    """What a row must reach on the H100.

    Attributes:
        metric: a key of report.METRICS.
        least, aim: the two thresholds.
        against: the row, or the peer, that a relative metric compares with.
    """

    metric: str
    least: float
    aim: float
    against: str = ""


@dataclass(frozen=True)
class Case:
    """One op on operands of one size.

    Attributes:
        op: the op's name, or for attention that and what it does.
        size: the rest of the row's name.
        group: what --only selects by.
        make: device -> the operands of one call.
        ours, reference: (*operands) -> tensors, by our op and in plain torch. With
            `in_place` both return the tensors that they update.
        moved, flops: bytes and floating-point operations that the task must cost.
        check: (operands, result) -> relative error. None compares with the reference.
        peers: other ways to compute the same, (*operands) -> tensors.
        target: of the op alone.
        in_xla: whether it is also measured inside XLA programs, and then
        xla_target: what it must reach there,
        xla_peer: what XLA is given instead; None: the reference,
        chain: (operands, result) -> the operands of a next call, where results can be
            operands again. Programs of small operands need it, see in_xla.py.
        quick: belongs to the small set that --quick selects.
    """

    op: str
    size: str
    group: str
    make: Callable[[torch.device], tuple]
    ours: Callable[..., Any]
    reference: Callable[..., Any]
    moved: int
    flops: int = 0
    check: Callable[[tuple, Any], float] | None = None
    peers: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    target: Target | None = None
    in_place: bool = False
    in_xla: bool = False
    xla_target: Target | None = None
    xla_peer: Callable[..., Any] | None = None
    chain: Callable[[tuple, Any], tuple] | None = None
    quick: bool = False

    @property
    def name(self) -> str:
        return f"{self.op} {self.size}"
