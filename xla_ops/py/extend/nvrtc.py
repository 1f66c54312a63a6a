"""Compiles CUDA C++ by NVRTC, through NVIDIA's own bindings (cuda-bindings).

Tested by tests/extend/test_nvrtc.py.
"""

from __future__ import annotations

import functools
import os
import pathlib
import threading
from collections.abc import Sequence
from typing import Any

from ..core.errors import Problem
from . import kernel_cache
from .kernel_cache import Code

# Compiling is long, and many threads may want the same kernel: one compiles.
_lock = threading.Lock()

# Code of these capabilities may use what later GPUs lack (wgmma, tcgen05).
_FIRST_SPECIFIC = (9, 0)


class CompileError(ValueError):
    """The source does not compile; the text has the compiler's log."""


@functools.cache
def _bindings() -> Any:
    """The module, once NVRTC itself has been found.

    Raises:
        Problem: one of them is missing.
    """
    try:
        from cuda.bindings import nvrtc

        _checked(nvrtc.nvrtcVersion())
    except (ImportError, OSError, RuntimeError) as error:
        raise Problem(
            f"NVRTC, which compiles CUDA C++, cannot be loaded ({error})",
            "pip install 'xla_ops[cuda13]' (or [cuda12], as the driver needs), or"
            " cuda-bindings and nvidia-cuda-nvrtc of one CUDA",
        ) from None
    return nvrtc


def _checked(answer: tuple) -> Any:
    result, *values = answer
    if result.value != 0:
        raise RuntimeError(f"NVRTC failed: {result.name}")
    return values[0] if len(values) == 1 else tuple(values)


def version() -> tuple[int, int]:
    """Of NVRTC, as (13, 0)."""
    return _checked(_bindings().nvrtcVersion())


def architecture(capability: tuple[int, int], *, exact: bool = True) -> str:
    """What to compile for: machine code of a GPU, or else PTX that it can run.

    Args:
        capability: of the GPU, or the lowest of several kinds.
        exact: whether all GPUs are of that kind.
    """
    known = _checked(_bindings().nvrtcGetSupportedArchs())
    number = 10 * capability[0] + capability[1]
    if exact and number in known:
        suffix = "a" if capability >= _FIRST_SPECIFIC else ""
        return f"sm_{number}{suffix}"
    older = [n for n in known if n <= number]
    if not older:
        dotted = ".".join(map(str, capability))
        raise Problem(
            f"NVRTC {'.'.join(map(str, version()))} compiles for no GPU of compute"
            f" capability {dotted}",
            "install nvidia-cuda-nvrtc-cu12 and cuda-bindings below 13",
        )
    return f"compute_{max(older)}"


def compile_source(
    op: str, source: str, kernel: str, architecture: str, options: Sequence[str] = ()
) -> Code:
    """Compiles `source`, or takes from the folder of kernels what it was compiled to.

    Args:
        op: its name in error texts.
        kernel: a kernel's name, or an expression such as "scale<float>".
        architecture: as `architecture` gives it.
        options: NVRTC's. What an #include takes from a folder is not looked at: the
            code that is kept does not change with it.

    Raises:
        CompileError: it does not compile.
        Problem: there is no NVRTC.
    """
    given = (source, kernel, architecture, tuple(options))
    key = kernel_cache.key_of("nvrtc", version(), *given)
    with _lock:
        code = kernel_cache.load(key)
        if code is None:
            code = _compile(op, source, kernel, architecture, options)
            kernel_cache.store(key, code)
    return code


def _compile(
    op: str, source: str, kernel: str, architecture: str, options: Sequence[str]
) -> Code:
    nvrtc = _bindings()
    program = _checked(
        nvrtc.nvrtcCreateProgram(source.encode(), f"{op}.cu".encode(), 0, [], [])
    )
    try:
        _checked(nvrtc.nvrtcAddNameExpression(program, kernel.encode()))
        all_options = [f"--gpu-architecture={architecture}", "--std=c++17", *options]
        all_options += [f"--include-path={path}" for path in _include_folders()]
        encoded = [option.encode() for option in all_options]
        (result,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
        log = _text(nvrtc, program, "ProgramLog").strip()
        if result.value != 0:
            reason = log or result.name
            raise CompileError(
                f"{op}: source must compile for {architecture}, got\n{reason}"
            )
        name = _checked(nvrtc.nvrtcGetLoweredName(program, kernel.encode())).decode()
        ptx = _text(nvrtc, program, "PTX")
        parameters = kernel_cache.parameters_of(ptx, name)
        assert parameters is not None, "NVRTC has checked that it is a kernel"
        if architecture.startswith("sm_"):
            image = _bytes(nvrtc, program, "CUBIN")
        else:
            image = ptx.encode() + b"\0"
        return Code(image, name, parameters, {"log": log})
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _bytes(nvrtc: Any, program: Any, what: str) -> bytes:
    size = _checked(getattr(nvrtc, f"nvrtcGet{what}Size")(program))
    data = b" " * size
    _checked(getattr(nvrtc, f"nvrtcGet{what}")(program, data))
    return data


def _text(nvrtc: Any, program: Any, what: str) -> str:
    return _bytes(nvrtc, program, what).rstrip(b"\0").decode(errors="replace")


@functools.cache
def _include_folders() -> tuple[str, ...]:
    """Where CUDA's headers (cuda_fp16.h) are: beside NVRTC, or in CUDA_HOME."""
    folders = []
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib

        library = load_nvidia_dynamic_lib("nvrtc").abs_path
    except (ImportError, OSError, RuntimeError):  # NVRTC was found without it
        library = None
    if library:
        packages = pathlib.Path(library).parents
        if len(packages) > 2:
            # nvidia/cuda_nvrtc/lib with CUDA 12, nvidia/cu13/lib with CUDA 13.
            folders += [packages[2] / "cuda_runtime/include", packages[1] / "include"]
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            folders.append(pathlib.Path(os.environ[variable], "include"))
    return tuple(str(f) for f in folders if (f / "cuda_fp16.h").exists())
