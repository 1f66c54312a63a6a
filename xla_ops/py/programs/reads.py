"""Whether a function that is traced read a tensor's value on the host.

What it made of the value would be a constant of its program. torch_xla counts such
reads for the whole process, so where other threads run a count says little: they read
the results of their own steps. The function is then traced again, and operation by
operation, until no operation is left during which something was read each time.

Tested by tests/programs/test_replay_threads.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch_xla.debug.metrics as met
from torch.utils._python_dispatch import TorchDispatchMode
from torch_xla._dynamo import dynamo_bridge

from ..core import ownership


class Reads:
    """What the traces of one function have in common.

    Attributes:
        are_clear: whether the trace that ended last read nothing, as is known by now.
    """

    def __init__(self) -> None:
        self.are_clear = False
        self._is_first = True
        self._suspects: set[tuple[int, str]] | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Runs one trace. Raises RuntimeError where nobody else can have read."""
        before, is_alone = _num_reads(), ownership.may_compute_all()
        if self._is_first:
            self._is_first = False
            yield
            self.are_clear = _num_reads() == before
            if not self.are_clear and is_alone:
                raise self.error()
            return
        with _ByOperation() as operations:
            yield
        found = operations.reading
        self._suspects = found if self._suspects is None else self._suspects & found
        self.are_clear = not self._suspects

    def error(self) -> RuntimeError:
        fallbacks = ", ".join(dynamo_bridge.get_fallback_ops()) or "none"
        return RuntimeError(
            "replay: the function must not read a tensor's value on the host, got one"
            f" that does; operations that torch_xla runs on the host: {fallbacks}"
        )


class _ByOperation(TorchDispatchMode):
    """Finds the operations, by number and name, during which something was read."""

    def __init__(self) -> None:
        super().__init__()
        self.reading: set[tuple[int, str]] = set()
        self._num_operations = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        number, before = self._num_operations, _num_reads()
        self._num_operations += 1
        result = func(*args, **(kwargs or {}))
        if _num_reads() != before:
            self.reading.add((number, str(func)))
        return result


def _num_reads() -> int:
    """How many times tensors have been read back from a device."""
    return (met.metric_data("TransferFromDeviceTime") or (0,))[0]
