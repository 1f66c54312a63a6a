"""What the launcher of users' kernels is told, and how that is checked and encoded.

The launcher is the handler `xla_ops.launch_kernel` (xla_ops/cc/launch); launch.h there
says what its attributes mean.

Tested by tests/extend/test_launch.py.
"""

from __future__ import annotations

import ctypes
import functools
import math
import struct
from collections.abc import Sequence
from numbers import Integral
from typing import Any, NamedTuple

import torch

from ..core import handlers, paths
from ..core.checks import Checker, float32
from ..core.hlo import Spec
from .kernel_cache import Code

TARGET = "xla_ops.launch_kernel"
_LIBRARY = "libxla_ops_launch_kernel_cuda.so"

_MAX_GRID = (2**31 - 1, 65535, 65535)
_MAX_BLOCK = (1024, 1024, 64)
_MAX_THREADS = 1024
_MAX_CLUSTER = 16

# Shared memory that a block may ask for, by compute capability; CUDA's programming
# guide. Of one that is not here, the launcher knows by the driver.
_SHARED_BYTES = {
    (7, 0): 98304,
    (7, 2): 98304,
    (7, 5): 65536,
    (8, 0): 166912,
    (8, 6): 101376,
    (8, 7): 166912,
    (8, 9): 101376,
    (12, 0): 101376,
    (12, 1): 101376,
}
_MOST_SHARED_BYTES = 232448

# On each side of a result, in debug mode.
_GUARD_BYTES = 256


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up: how many blocks of b elements hold a."""
    return -(-a // b)


class Given(NamedTuple):
    """What a declaration's functions see of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    position: int = -1  # among operands, or results
    is_result: bool = False

    def numel(self) -> int:
        return math.prod(self.shape)

    def dim(self) -> int:
        return len(self.shape)

    def size(self, dim: int) -> int:
        return self.shape[dim]

    def element_size(self) -> int:
        return self.dtype.itemsize

    def like(
        self, shape: Sequence[int] | None = None, dtype: torch.dtype | None = None
    ) -> Given:
        """A tensor of this one's shape and dtype, but for what is given."""
        given = self.shape if shape is None else tuple(shape)
        return Given(given, dtype or self.dtype)


class Machine(NamedTuple):
    """The GPU that code is for.

    Attributes:
        capability: its compute capability; of several kinds the lowest.
        is_one_kind: whether all visible GPUs are of that.
        name: of the first, for what is measured.
    """

    capability: tuple[int, int]
    is_one_kind: bool = True
    name: str = ""


class Launch(NamedTuple):
    """What is launched for one call.

    Attributes:
        code: the kernel.
        parameters: what it is given: a `Given` for a buffer's address, a number, None
            for a null pointer.
        grid, block, cluster: three sizes each.
        shared_bytes: dynamic shared memory of a block.
        alignment: of every buffer, where the code relies on it.
        scratch: results that nobody sees; their `Given` have positions after those
            that are seen.
    """

    code: Code
    parameters: Sequence[Given | float | int | None]
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int] = (1, 1, 1)
    shared_bytes: int = 0
    alignment: int = 1
    scratch: tuple[Spec, ...] = ()


@functools.cache
def machine() -> Machine:
    """The GPUs of this process, which code is made for."""
    from ..gpu import driver

    devices = driver.query().devices
    capabilities = {device.capability for device in devices}
    return Machine(min(capabilities), len(capabilities) == 1, devices[0].name)


def three(check: Checker, argument: str, value: Any, most: Sequence[int]) -> tuple:
    """Returns an int, or one to three, as three sizes within limits."""
    sizes = value if isinstance(value, tuple | list) else (value,)
    # NumPy's ints are as good.
    is_int = lambda n: isinstance(n, Integral) and not isinstance(n, bool)  # noqa: E731
    sizes = [int(n) if is_int(n) else n for n in sizes]
    fits = 1 <= len(sizes) <= 3 and all(
        isinstance(n, int) and not isinstance(n, bool) and 1 <= n <= limit
        for n, limit in zip(sizes, most, strict=False)
    )
    rule = f"be one to three ints from 1 to {list(most)}"
    check.require(fits, argument, rule, value)
    return (*sizes, *(1,) * (3 - len(sizes)))


def check_sizes(
    check: Checker, grid: Any, block: Any, cluster: Any, shared_bytes: Any
) -> tuple[tuple, tuple, tuple, int]:
    """Checks what a launch asks for against what any GPU has."""
    grid = three(check, "grid", grid, _MAX_GRID)
    block = three(check, "block", block, _MAX_BLOCK)
    threads = math.prod(block)
    check.require(
        threads <= _MAX_THREADS,
        "block",
        f"have at most {_MAX_THREADS} threads",
        f"{list(block)}: {threads}",
    )
    cluster = three(check, "cluster", cluster, (_MAX_CLUSTER,) * 3)
    whole = all(n % size == 0 for n, size in zip(grid, cluster, strict=True))
    rule = f"be a multiple of the cluster {list(cluster)}"
    check.require(whole, "grid", rule, list(grid))
    fits = math.prod(cluster) <= _MAX_CLUSTER
    rule = f"have at most {_MAX_CLUSTER} blocks"
    check.require(fits, "cluster", rule, list(cluster))
    check_shared_bytes(check, shared_bytes, _MOST_SHARED_BYTES)
    return grid, block, cluster, shared_bytes


def check_shared_bytes(check: Checker, value: Any, most: int) -> None:
    fits = isinstance(value, int) and 0 <= value <= most
    check.require(fits, "shared_bytes", f"be an int from 0 to {most}", value)


def most_shared_bytes(of: Machine) -> int:
    """Shared memory that a block may have on a machine."""
    return _SHARED_BYTES.get(of.capability, _MOST_SHARED_BYTES)


_added: set[str] = set()


def add_code(code: Code) -> None:
    """Gives the launcher of this process the code of a call."""
    if code.digest in _added:
        return
    handlers.require(handlers.CUDA, TARGET)
    library = ctypes.CDLL(str(paths.LIB / _LIBRARY))
    library.xla_ops_launch_kernel_add_code.restype = None
    library.xla_ops_launch_kernel_add_code(
        code.digest.encode(), code.image, ctypes.c_size_t(len(code.image))
    )
    _added.add(code.digest)


def encode(check: Checker, launch: Launch) -> dict[str, Any]:
    """Returns the attributes of a launch, as xla_ops/cc/launch/launch.h has them."""
    types, given = launch.code.parameters, launch.parameters
    rule = f"be the {len(types)} that the kernel takes"
    got = f"{len(given)}: {[_shown(value) for value in given]}"
    check.require(len(types) == len(given), "parameters", rule, got)
    return {
        "op": check.op,
        "kernel": launch.code.kernel,
        "code": launch.code.digest,
        "code_bytes": len(launch.code.image),
        "grid": " ".join(map(str, launch.grid)),
        "block": " ".join(map(str, launch.block)),
        "cluster": " ".join(map(str, launch.cluster)),
        "shared_bytes": launch.shared_bytes,
        "alignment": launch.alignment,
        "guarded": "",
        "parameters": " ".join(
            pack(check, f"parameter {i}", kind, value)
            for i, (kind, value) in enumerate(zip(types, given, strict=True))
        ),
    }


def guards(launch: Launch, results: Sequence[Given]) -> tuple[tuple[Spec, ...], str]:
    """What debug mode adds to a call: each result is computed between guards.

    Returns:
        Scratch, behind the launch's own, and the attribute `guarded`.
    """
    scratch: list[Spec] = []
    words = []
    for g in results:
        size = g.numel() * g.element_size()
        if size:
            position = results[-1].position + 1 + len(launch.scratch) + len(scratch)
            words.append(f"{g.position}:{position}")
            scratch.append(Spec((size + 2 * _GUARD_BYTES,), torch.uint8))
    return tuple(scratch), " ".join(words)


def _shown(value: Any) -> str:
    if not isinstance(value, Given):
        return str(value)
    return f"{'result' if value.is_result else 'operand'} {value.position}"


_FLOATS = {"f32": "<f", "f64": "<d"}
_SIZES = {"8": 1, "16": 2, "32": 4, "64": 8}


def pack(check: Checker, argument: str, kind: str, value: Any) -> str:
    """Returns what one parameter is given, as a word of the attribute `parameters`.

    Args:
        kind: its PTX type.
        value: a buffer, a number, or None for a null pointer.
    """
    if isinstance(value, Given) or value is None:
        fits = kind in ("u64", "s64", "b64")
        check.require(
            fits, argument, f"be a number, as the kernel has {kind}", _shown(value)
        )
        if value is None:
            return "null"
        rule = "be one of the arguments or results"
        check.require(value.position >= 0, argument, rule, "another Given")
        return f"{'r' if value.is_result else 'a'}{value.position}"
    is_number = isinstance(value, int | float)
    check.require(is_number, argument, "be a buffer, a number or None", repr(value))
    if kind in _FLOATS:
        number = float32(value) if kind == "f32" else float(value)
        return "v" + struct.pack(_FLOATS[kind], number).hex()
    rule = "be a buffer, an int, a float or a double in the kernel"
    check.require(kind[0] in "usb" and kind[1:] in _SIZES, argument, rule, kind)
    size = _SIZES[kind[1:]]
    check.require(
        isinstance(value, int), argument, f"be an int, as the kernel has {kind}", value
    )
    # PTX does not tell signed from unsigned.
    fits = -(2 ** (8 * size - 1)) <= value < 2 ** (8 * size)
    check.require(fits, argument, f"fit in {size} bytes", value)
    return "v" + (value % 2 ** (8 * size)).to_bytes(size, "little").hex()
