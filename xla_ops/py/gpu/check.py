"""Whether plugin, driver, GPUs and kernels go together.

Tested by tests/gpu/test_check.py.
"""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Callable
from typing import TypeVar

from .. import _runtime
from ..core import elf
from ..core.errors import Problem
from ..core.paths import LIB
from . import cuda_libraries, discover, driver, options

T = TypeVar("T")


def check_machine(plugin: pathlib.Path) -> None:
    """Checks the driver and the GPUs that this process is going to use.

    Raises:
        Problem: no driver (driver.DriverError), a driver too old for `plugin` or for
            the kernels, or a GPU that the kernels were not built for.
    """
    found = driver.query()
    newest = _version(found.cuda_version)
    match = re.fullmatch(r"xla_cuda(\d+)", plugin.parent.name)
    if match is not None and found.cuda_version[0] < int(match[1]):
        raise Problem(
            f"the NVIDIA driver runs CUDA up to {newest}, and"
            f" {discover.describe_plugin(plugin)} needs CUDA {match[1]}",
            _fix_for_driver(found.cuda_version[0], discover.distribution_of(plugin)),
        )
    for library, version in kernel_cuda_versions().items():
        if found.cuda_version[0] < version[0]:
            raise Problem(
                f"the NVIDIA driver runs CUDA up to {newest}, and the kernels of"
                f" {library} were built with CUDA {_version(version)}",
                "update the driver, or run on the CPU with PJRT_DEVICE=CPU",
            )
    used = options.client_options(os.environ).get("visible_devices")
    for ordinal in used or ():
        if ordinal >= len(found.devices):
            raise Problem(
                f"this process is to use GPU {ordinal}, and {len(found.devices)} are"
                " visible",
                "start as many processes on a host as it has GPUs",
            )
    for device in found.devices:
        if used is None or device.ordinal in used:
            _check_kernels(device)


_SHARED_OBJECT = ("shared object", (b"\x7fELF",))
# How files begin that are no shared object, and what those are.
_BEGINNINGS = {
    "ptxas": ("program", (b"\x7fELF", b"#!")),
    "libdevice": ("LLVM bitcode", (b"BC\xc0\xde", b"\xde\xc0\x17\x0b")),
}


def cuda_of(plugin: pathlib.Path) -> int | None:
    """The CUDA, 12 or 13, that the plugin at `plugin` is for; None where unknown."""
    match = re.fullmatch(r"xla_cuda(12|13)", plugin.parent.name)
    return None if match is None else int(match[1])


def broken_cuda_files(plugin: pathlib.Path) -> Problem | None:
    """What of NVIDIA's wheels beside the plugin cannot be used; None where all can.

    XLA opens a file when a program first needs it. One that was cut short would end the
    process then, and one of no content would be "not found".
    """
    cuda = cuda_of(plugin)
    if cuda is None:
        return None
    found = cuda_libraries.beside(plugin, cuda)
    faults = [(part, what) for part, file in found if (what := _fault(part, file))]
    if not faults:
        return None
    parts, texts = zip(*faults, strict=True)
    line = cuda_libraries.pip_line(parts, cuda, anew=True)
    return Problem("; ".join(texts), line)


def _fault(part: cuda_libraries.Part, file: str) -> str:
    return fault_of(file, *_BEGINNINGS.get(part.name, _SHARED_OBJECT))


def fault_of(
    file: str,
    kind: str = _SHARED_OBJECT[0],
    beginnings: tuple[bytes, ...] = _SHARED_OBJECT[1],
) -> str:
    """Says why the file at a path is none of its kind; "" if it may be one."""
    try:
        with open(file, "rb") as opened:
            head = opened.read(4)
    except OSError as error:
        return f"{file} cannot be read ({error.strerror})"
    if not head:
        return f"{file} is empty"
    return elf.unusable(file) or (
        "" if head.startswith(beginnings) else f"{file} is no {kind}"
    )


def _fix_for_driver(newest: int, plugin: str) -> str:
    """What to do where a plugin, by its distribution, is too new for the driver."""
    if newest < 12:  # older than any plugin that can be wrapped
        return "update the driver"
    return (
        f"update the driver, or pip uninstall {plugin} and install"
        f" xla_ops[cuda{newest}]"
    )


def _version(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def _of_kernels(describe: Callable[[str], T]) -> dict[str, T]:
    """File name of each installed CUDA op library to what `describe` says of it."""
    libraries = sorted(LIB.glob("libxla_ops_*_cuda.so"))
    for path in libraries:
        elf.require_usable(path, "reinstall xla_ops")
    return {path.name: describe(str(path)) for path in libraries}


def kernel_archs() -> dict[str, str]:
    """File name of each installed CUDA op library to its architectures.

    Without the launcher of users' kernels, which has no device code of its own.
    """
    found = _of_kernels(_runtime.cuda_archs)
    return {name: archs for name, archs in found.items() if archs}


def kernel_cuda_versions() -> dict[str, tuple[int, int]]:
    """File name of each installed CUDA op library to its CUDA, as (13, 0)."""
    versions = _of_kernels(_runtime.cuda_version)
    return {k: (v // 1000, v % 1000 // 10) for k, v in versions.items()}


def runs_on(archs: str, capability: tuple[int, int]) -> bool:
    """Whether device code for `archs`, as "8.0 9.0a 12.0+PTX", runs on a GPU.

    Code for 8.0 runs on 8.0 to 8.9; for 9.0a on 9.0 alone; for 10.0f on the family
    10.x from 10.0 on; with +PTX on every later GPU too.
    """
    for arch in archs.replace(",", " ").split():
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch)
        if match is None:
            raise ValueError(f"malformed architecture {arch!r} in {archs!r}")
        built = (int(match[1]), int(match[2]))
        if match[3] == "a":
            if capability == built:
                return True
        elif capability[0] == built[0] and capability >= built:
            return True
        if match[4] and not match[3] and capability >= built:
            return True
    return False


def fix_for(capability: tuple[int, int]) -> str:
    """What to do where the kernels were not built for a GPU."""
    return (
        f"build xla_ops with {_version(capability)} among the architectures, or hide"
        " this GPU by CUDA_VISIBLE_DEVICES, or run on the CPU with PJRT_DEVICE=CPU"
    )


def _check_kernels(device: driver.Device) -> None:
    for library, archs in kernel_archs().items():
        if not runs_on(archs, device.capability):
            raise Problem(
                f"GPU {device.ordinal} ({device.name}) has compute capability"
                f" {_version(device.capability)}, and the kernels of {library} were"
                f" built for {archs}",
                fix_for(device.capability),
            )
