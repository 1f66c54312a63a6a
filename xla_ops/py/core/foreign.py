"""An array of another framework, JAX's, in a tensor's place.

Functions that take tensors check them by shape, dtype and device and hand them to an
op. So they do for arrays that are wrapped in one of these, and the op then makes a call
of that framework (`Op.framework`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from .places import Located


class Foreign:
    """What checks, lowerings and fronts ask of a tensor.

    A plain class, since Dynamo traces the checks that ask whether something is one.

    Attributes:
        shape: as a tuple.
        dtype: torch's of that name, or `no_torch`'s.
        device: has a type, "cpu" or "cuda".
    """

    shape: tuple[int, ...]
    dtype: Any
    device: Any
    requires_grad = False  # for all that torch knows

    def dim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    def become(self, value: Any) -> None:
        """Takes the value of `value`, in place of being written."""
        raise NotImplementedError

    def locate(self) -> Located:
        """The array that holds this one, and where in it this one lies."""
        raise NotImplementedError


class Framework(Protocol):
    """Calls ops on its arrays."""

    def call(self, op: Any, args: Sequence[object]) -> Any:
        """Returns the results of an op, wrapped as its arguments are."""
