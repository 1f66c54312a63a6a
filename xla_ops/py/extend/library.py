"""Op libraries that were built outside this package.

Such a library is built against the headers in `include_dir()` and exports the table
that xla_ops/cc/core/registry.h describes, as the ops of this package do.
examples/extension is one.

Tested by tests/extend/test_library.py.
"""

from __future__ import annotations

import ctypes
import os
import pathlib
from collections.abc import Mapping

from ..core import elf, handlers, paths
from ..core.checks import Checker

# XLA_OPS_API_VERSION of xla_ops/cc/core/registry.h, which says when it changes.
API_VERSION = 1

_check = Checker("register_library")


def include_dir() -> pathlib.Path:
    """Returns the folder for a compiler's -I: this package's headers and XLA's FFI.

    `#include "xla_ops/cc/core/handler.h"`, `#include "xla/ffi/api/ffi.h"`.
    """
    return paths.INCLUDE


def register_library(path: str | os.PathLike[str]) -> Mapping[str, frozenset[str]]:
    """Makes the handlers of an op library known to XLA and to `Op`.

    XLA takes them where it next compiles a program with a custom call, on the CPU those
    for "Host" and on a GPU those for "CUDA"; CPU and CUDA tensors call them directly. A
    library stays loaded until the process ends. To register it again does nothing.

    Args:
        path: of the shared object. It is not looked for anywhere else.

    Returns:
        The targets of its handlers by platform, "Host" and "CUDA".

    Raises:
        ValueError: it is no file, cannot be loaded, is no op library or one of another
            API version, or has a target that another library has.

    Example:
        >>> register_library("libmine_cpu.so")  # doctest: +SKIP
        {'Host': frozenset({'mine.scale_rows'}), 'CUDA': frozenset()}
    """
    if not isinstance(path, str | bytes | os.PathLike):
        got = type(path).__name__
        raise TypeError(f"{_check.op}: path must be a str or a path, got {got}")
    whole = os.path.realpath(os.fsdecode(path))
    _check.require(os.path.isfile(whole), "path", "be a file", whole)
    unusable = elf.unusable(whole)
    _check.require(not unusable, "path", "be a whole file for this machine", unusable)
    _check_version(whole)
    try:
        return handlers.register(whole)
    except OSError as error:
        rule = "be an op library with targets of its own"
        raise ValueError(f"{_check.op}: path must {rule}, got {error}") from None


def _check_version(path: str) -> None:
    """Checks what a library says of itself, before anything else of it is read."""
    try:
        library = ctypes.CDLL(path)
    except OSError as error:
        text = f"{_check.op}: path must be a library that loads, got {error}"
        raise ValueError(text) from None
    for function in ("xla_ops_handlers", "xla_ops_api_version"):
        _check.require(
            hasattr(library, function),
            "path",
            "be an op library",
            f"{path}, which does not export {function}",
        )
    version = library.xla_ops_api_version()
    _check.require(
        version == API_VERSION,
        "path",
        f"be built for API version {API_VERSION}, with the headers in {include_dir()}",
        f"{path} of version {version}",
    )
