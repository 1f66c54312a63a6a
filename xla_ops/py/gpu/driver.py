"""What the NVIDIA driver tells about this machine, without a CUDA context.

Everything goes through ctypes on the driver's own libraries, so that it works
where no CUDA toolkit and no GPU build of torch is installed. It calls cuInit, which a
later fork() does not survive; what is asked before one is in visible.py.

Tested by tests/gpu/test_check.py.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import uuid

from ..core.errors import Problem
from . import visible

_DRIVER_LIBRARY = "libcuda.so.1"

# CUdevice_attribute values.
_COMPUTE_CAPABILITY_MAJOR = 75
_COMPUTE_CAPABILITY_MINOR = 76

# CUresult values that users meet, and what helps.
_CU_INIT_FIXES = {
    3: "the driver is not initialised: restart the process",
    34: "the installed libcuda.so.1 is a stub: remove cuda/lib64/stubs from"
    " LD_LIBRARY_PATH",
    100: "no GPU is visible: check nvidia-smi, CUDA_VISIBLE_DEVICES, and that the"
    " container was started with access to the GPU (docker run --gpus all)",
    802: "the system is not ready: start nvidia-fabricmanager",
    803: "the kernel module and libcuda.so.1 have different versions: reboot after"
    " a driver update",
    804: "the GPU does not support this driver's forward compatibility: update"
    " the kernel driver",
    999: "check that the kernel module is loaded (nvidia-smi) and that"
    " /dev/nvidia* can be opened",
}


class DriverError(Problem):
    """There is no usable NVIDIA driver."""


@dataclasses.dataclass(frozen=True)
class Device:
    """One visible GPU. `ordinal` counts within CUDA_VISIBLE_DEVICES."""

    ordinal: int
    name: str
    capability: tuple[int, int]
    memory_bytes: int


@dataclasses.dataclass(frozen=True)
class Driver:
    """`cuda_version` is the newest CUDA that the driver runs, as (13, 0)."""

    cuda_version: tuple[int, int]
    devices: tuple[Device, ...]


def query() -> Driver:
    """Reads the driver's CUDA version and the visible devices.

    Raises:
      DriverError: no driver, no device, or neither can be used.
    """
    try:
        cuda = ctypes.CDLL(_DRIVER_LIBRARY)
    except OSError as error:
        raise DriverError(
            f"no NVIDIA driver: {_DRIVER_LIBRARY} cannot be loaded ({error})",
            "install the NVIDIA driver, or run on the CPU with PJRT_DEVICE=CPU",
        ) from None
    _check(cuda, "cuInit", cuda.cuInit(0))
    version = _read_int(cuda, "cuDriverGetVersion")
    count = _read_int(cuda, "cuDeviceGetCount")
    if count == 0:
        value = os.environ.get(visible.VARIABLE)
        raise DriverError(
            "the NVIDIA driver shows no GPU",
            f"check {visible.VARIABLE} (now {value!r})",
        )
    return Driver(
        cuda_version=(version // 1000, version % 1000 // 10),
        devices=tuple(_read_device(cuda, ordinal) for ordinal in range(count)),
    )


def uuid_of(ordinal: int) -> uuid.UUID:
    """That of a device that `query` has shown, or of its MIG instance.

    Raises:
      DriverError: there is no such device.
    """
    cuda = ctypes.CDLL(_DRIVER_LIBRARY)
    device = _read_int(cuda, "cuDeviceGet", ordinal)
    found = (ctypes.c_ubyte * 16)()
    _check(cuda, "cuDeviceGetUuid", cuda.cuDeviceGetUuid_v2(found, device))
    return uuid.UUID(bytes=bytes(found))


def _check(cuda: ctypes.CDLL, function: str, result: int) -> None:
    if result == 0:
        return
    name = ctypes.c_char_p()
    if cuda.cuGetErrorName(result, ctypes.byref(name)) != 0 or not name.value:
        text = f"error {result}"
    else:
        text = f"{name.value.decode()} ({result})"
    fix = _CU_INIT_FIXES.get(result, "check that nvidia-smi works")
    raise DriverError(f"the NVIDIA driver cannot be used: {function}: {text}", fix)


def _read_int(cuda: ctypes.CDLL, function: str, *args: int) -> int:
    value = ctypes.c_int()
    _check(cuda, function, getattr(cuda, function)(ctypes.byref(value), *args))
    return value.value


def _read_device(cuda: ctypes.CDLL, ordinal: int) -> Device:
    device = _read_int(cuda, "cuDeviceGet", ordinal)
    name = ctypes.create_string_buffer(256)
    _check(cuda, "cuDeviceGetName", cuda.cuDeviceGetName(name, len(name), device))
    memory = ctypes.c_size_t()
    _check(
        cuda,
        "cuDeviceTotalMem",
        cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device),
    )
    major, minor = (
        _read_int(cuda, "cuDeviceGetAttribute", attribute, device)
        for attribute in (_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR)
    )
    return Device(
        ordinal=ordinal,
        name=name.value.decode(errors="replace"),
        capability=(major, minor),
        memory_bytes=memory.value,
    )
