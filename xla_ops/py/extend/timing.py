"""Times launches on the GPU, to choose among them while a program is traced.

A process whose torch has no CUDA has XLA's context all the same: memory and events are
asked of the driver, through NVIDIA's own bindings (cuda-bindings), and the kernels are
launched by the launcher itself.

Tested, with a driver of fakes, by tests/extend/test_timing.py and, on a GPU, by
tests/gpu/check_user_kernels.py.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .. import _runtime
from ..core import handlers
from ..core.checks import Checker
from ..core.dtypes import primitive_type
from ..core.errors import Problem
from ..core.hlo import Spec
from . import launch
from .launch import Launch

_WARM_UPS = 3
_ROUNDS = 5
_ROUND_US = 2000.0  # a round takes about so long
_MOST_LAUNCHES = 200


def microseconds(
    check: Checker,
    launches: Sequence[Launch],
    operands: Sequence[Spec],
    results: Sequence[Spec],
) -> list[float | None]:
    """Times launches of one call, whose buffers are filled with zeros.

    Args:
        check: of the op.
        launches: what to time.
        operands, results: of the call.

    Returns:
        Of each launch, the fastest of some rounds; None where it cannot be launched.

    Raises:
        Problem: there are no bindings, no GPU, or not memory enough.
    """
    driver = _bindings()
    with _context(driver), _buffers(driver, [*operands, *results]) as buffers:
        first, rest = buffers[: len(operands)], buffers[len(operands) :]
        return [
            _time_one(driver, check, one, operands, results, first, rest)
            for one in launches
        ]


def _bindings() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise Problem(
            f"kernels cannot be timed without NVIDIA's bindings ({error})",
            "pip install 'xla_ops[cuda13]' (or [cuda12], as the driver needs)",
        ) from None
    return driver


def _checked(answer: tuple) -> Any:
    result, *values = answer
    if result.value != 0:
        raise Problem(
            f"kernels cannot be timed: {result.name}",
            "free memory of the GPU, or give one configuration alone",
        )
    return values[0] if len(values) == 1 else tuple(values)


@contextmanager
def _context(driver: Any) -> Iterator[None]:
    """The context that XLA has, or will have, on this process's GPU."""
    from ..gpu import options

    _checked(driver.cuInit(0))
    device = _checked(driver.cuDeviceGet(options.ordinal(os.environ)))
    context = _checked(driver.cuDevicePrimaryCtxRetain(device))
    _checked(driver.cuCtxPushCurrent(context))
    try:
        yield
    finally:
        driver.cuCtxPopCurrent()
        driver.cuDevicePrimaryCtxRelease(device)


@contextmanager
def _buffers(driver: Any, specs: Sequence[Spec]) -> Iterator[list[int]]:
    taken: list[Any] = []
    try:
        for spec in specs:
            size = max(1, math.prod(spec.shape) * spec.dtype.itemsize)
            taken.append(_checked(driver.cuMemAlloc(size)))
            _checked(driver.cuMemsetD8(taken[-1], 0, size))
        yield [int(pointer) for pointer in taken]
    finally:
        for pointer in taken:
            driver.cuMemFree(pointer)


def _time_one(
    driver: Any,
    check: Checker,
    one: Launch,
    operands: Sequence[Spec],
    results: Sequence[Spec],
    addresses: Sequence[int],
    result_addresses: Sequence[int],
) -> float | None:
    launch.add_code(one.code)
    attributes = launch.encode(check, one)
    stream = _checked(driver.cuStreamCreate(0))
    start, end = (_checked(driver.cuEventCreate(0)) for _ in range(2))
    try:
        with _buffers(driver, one.scratch) as scratch:
            ins = _call_buffers(operands, addresses)
            outs = _call_buffers(
                (*results, *one.scratch), (*result_addresses, *scratch)
            )

            def run(count: int) -> float:
                _checked(driver.cuEventRecord(start, stream))
                for _ in range(count):
                    _runtime.call(
                        launch.TARGET, handlers.CUDA, int(stream), ins, outs, attributes
                    )
                _checked(driver.cuEventRecord(end, stream))
                _checked(driver.cuEventSynchronize(end))
                return 1000 * _checked(driver.cuEventElapsedTime(start, end)) / count

            try:
                once = run(_WARM_UPS)
            except (RuntimeError, ValueError):
                return None  # too much shared memory, say; others may do
            count = int(min(_MOST_LAUNCHES, max(1.0, _ROUND_US / max(once, 1e-3))))
            return min(run(count) for _ in range(_ROUNDS))
    finally:
        driver.cuEventDestroy(start)
        driver.cuEventDestroy(end)
        driver.cuStreamDestroy(stream)


def _call_buffers(
    specs: Sequence[Spec], addresses: Sequence[int]
) -> list[tuple[int, int, tuple[int, ...]]]:
    return [
        (address, primitive_type(spec.dtype), tuple(spec.shape))
        for spec, address in zip(specs, addresses, strict=True)
    ]
