"""What an op declares of its derivatives.

An op that declares a `Gradient` is differentiated by it, by torch (`autograd`) and by
JAX (xla_ops/py/jax). Through any other a forward works as ever and a backward raises:
the frameworks would leave the op's part out of the sum and say nothing that names it.

Tested by tests/core/test_gradients.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from .lazy import torch


class Backward(NamedTuple):
    """What a gradient is computed from.

    Attributes:
        args: the op's arguments by name; tensors that the `Gradient` does not keep are
            left out.
        results: those of the op's results that it keeps, by index.
        grads: of each result; None where nothing depends on it.
        wanted: the arguments whose gradients are asked for.
        specs: shape and dtype of each argument that is a tensor, kept or not.
    """

    args: Mapping[str, Any]
    results: Mapping[int, torch.Tensor]
    grads: tuple[torch.Tensor | None, ...]
    wanted: tuple[str, ...]
    specs: Mapping[str, tuple[torch.Size, torch.dtype]]

    def zeros(self, name: str) -> torch.Tensor:
        """The gradient of an argument on which nothing depends that is used."""
        given = next(grad for grad in self.grads if grad is not None)
        shape, dtype = self.specs[name]
        return given.new_zeros(shape, dtype=dtype)


@dataclass(frozen=True)
class Gradient:
    """How to differentiate an op.

    Attributes:
        compute: Backward -> gradients by argument. It calls functional ops only, so
            that they run as custom calls, and need return none that is not wanted. For
            an argument that is wanted and that it leaves out, backward raises.
        keeps: tensor arguments that it reads.
        keeps_results: indices of results that it reads.
    """

    compute: Callable[[Backward], Mapping[str, torch.Tensor]]
    keeps: tuple[str, ...] = ()
    keeps_results: tuple[int, ...] = ()


def message(op: str, argument: str, needs: str = "requires one") -> str:
    return (
        f"xla_ops.{op}: has no gradient: {argument} {needs}; use torch.no_grad() for"
        f" inference, or pass {argument}.detach()"
    )
