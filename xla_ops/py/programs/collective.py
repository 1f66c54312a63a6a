"""What the custom calls between processes have in common.

Tested by tests/programs/test_processes.py and tests/programs/test_peers.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..core import handlers, tracing
from ..core.custom_call import CustomCall, OptionalOperand, call_in_graph
from ..core.hlo import Spec

# What they add up.
SUMMED = (torch.float32, torch.float16, torch.bfloat16)
# How long a process waits for another: as long as NCCL's (gpu/flags.py).
TIMEOUT_MS = 600_000

_library = torch.library.Library("xla_ops", "FRAGMENT")


def define(op: str, platform: str, *numbers: str) -> Callable[..., torch.Tensor]:
    """Defines the op of a handler that sums or gathers what processes give.

    Args:
        op: its name; the handler is `xla_ops.<op>` of `platform`.
        numbers: the handler's attributes of int64.

    Returns:
        the op: its input, a tensor that the call comes after or None, how many
        processes there are, whether it gathers, and the numbers.
    """
    target = f"xla_ops.{op}"
    ints = "".join(f", int {number}" for number in numbers)
    _library.define(
        f"{op}(Tensor input, Tensor? after, int size, bool gathers{ints}) -> Tensor"
    )

    def result(x: torch.Tensor, size: int, gathers: bool) -> Spec:
        shape = tuple(x.shape)
        return Spec((size, *shape) if gathers else shape, x.dtype)

    def in_graph(
        x: torch.Tensor,
        after: torch.Tensor | None,
        size: int,
        gathers: bool,
        *values: int,
    ) -> torch.Tensor:
        handlers.available(platform, target)
        custom_call = CustomCall(
            target,
            ("input", OptionalOperand("after", torch.float32)),
            (result(x, size, gathers),),
            {**dict(zip(numbers, values, strict=True)), "gathers": gathers},
        )
        (out,) = call_in_graph(custom_call.bind({"input": x, "after": after}))
        return out

    def fake(
        x: torch.Tensor,
        after: torch.Tensor | None,
        size: int,
        gathers: bool,
        *values: int,
    ) -> torch.Tensor:
        shape, dtype = result(x, size, gathers)
        return x.new_empty(shape, dtype=dtype)

    _library.impl(op, tracing.untraced(in_graph), "XLA")
    torch.library.register_fake(f"xla_ops::{op}", fake, lib=_library)
    overload: Callable[..., torch.Tensor] = getattr(torch.ops.xla_ops, op).default
    return overload
