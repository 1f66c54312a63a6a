"""How many GPUs a CUDA program of this environment sees, found without CUDA.

One function counts them for xmp.spawn, for the GPU of each process and for the doctor,
by the driver's rule for CUDA_VISIBLE_DEVICES. It asks NVML, which a later fork()
survives; cuInit does not.

Tested by tests/gpu/test_visible.py.
"""

from __future__ import annotations

import ctypes
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

T = TypeVar("T")

VARIABLE = "CUDA_VISIBLE_DEVICES"

_NVML_LIBRARY = "libnvidia-ml.so.1"
_DIGITS = 19  # that a number of 64 bits may have
_UUID_BYTES = 96  # NVML_DEVICE_UUID_V2_BUFFER_SIZE


class Gpus(NamedTuple):
    """The GPUs of a machine, by their UUIDs.

    Attributes:
        gpus: "GPU-8932f937-...", as nvidia-smi -L shows and counts them.
        migs: "MIG-...", of the instances that GPUs in MIG mode are cut into.
    """

    gpus: Sequence[str]
    migs: Sequence[str] = ()


def count(environ: Mapping[str, str]) -> int | None:
    """Number of GPUs that CUDA_VISIBLE_DEVICES in `environ` leaves; None if unknown.

    Safe before fork(): it does not initialise CUDA.
    """
    value, machine = environ.get(VARIABLE), query()
    if value is None and machine is None:
        return None
    return count_named(value, machine)


def count_named(value: str | None, machine: Gpus | None) -> int:
    """Number of GPUs of `machine` that the driver shows where the variable is `value`.

    The first entry says of which kind all are: numbers, which strtol() reads, or
    beginnings of UUIDs that one GPU alone has. The list ends at the first entry that
    is no such thing; one GPU named twice empties it. A process sees one MIG instance
    at most. Where the machine's GPUs are not known (None), every name counts.
    """
    if value is None:
        assert machine is not None
        return len(machine.gpus)
    entries = value.split(",")
    if value.startswith("MIG-"):
        known = machine is None or _index(entries[0], machine.migs) is not None
        return 1 if known else 0
    seen: list[int | str] = []
    for entry in entries:
        found = _find(entry, value.startswith("GPU-"), machine)
        if found is None:
            break
        if found in seen:
            return 0
        seen.append(found)
    return len(seen)


def _find(entry: str, by_uuid: bool, machine: Gpus | None) -> int | str | None:
    """Which GPU an entry of the list names; None where it names none."""
    if by_uuid:
        if not entry.startswith("GPU-"):
            return None
        return entry if machine is None else _index(entry, machine.gpus)
    number = re.match(r"[ \t\n\v\f\r]*([+-]?)0*([0-9]+)", entry)
    if number is None or (number[1] == "-" and number[2] != "0"):
        return None
    # strtol() makes the largest number of what is larger.
    index = int(number[2]) if len(number[2]) < _DIGITS else 10**_DIGITS
    return index if machine is None or index < len(machine.gpus) else None


def _index(start: str, uuids: Sequence[str]) -> int | None:
    """Index of the one UUID that begins with `start`; None if there is not one."""
    matches = [i for i, uuid in enumerate(uuids) if uuid.startswith(start)]
    return matches[0] if len(matches) == 1 else None


def query() -> Gpus | None:
    """Asks NVML for the machine's GPUs; None where it cannot tell."""
    return _ask(_query)


def free_bytes(device: uuid.UUID) -> int | None:
    """Bytes of a GPU, or of a MIG instance, that nobody has taken.

    None where NVML cannot tell.
    """

    def free(nvml: ctypes.CDLL) -> int | None:
        handle = ctypes.c_void_p()
        memory = (ctypes.c_uint64 * 3)()  # total, free, used
        for kind in ("GPU", "MIG"):
            name = f"{kind}-{device}".encode()
            if (
                nvml.nvmlDeviceGetHandleByUUID(name, ctypes.byref(handle)) == 0
                and nvml.nvmlDeviceGetMemoryInfo(handle, memory) == 0
            ):
                return int(memory[1])
        return None

    return _ask(free)


def _ask(question: Callable[[ctypes.CDLL], T | None]) -> T | None:
    """What NVML answers; None where it cannot be asked."""
    try:
        nvml = ctypes.CDLL(_NVML_LIBRARY)
    except OSError:
        return None
    if nvml.nvmlInit_v2() != 0:
        return None
    try:
        return question(nvml)
    finally:
        nvml.nvmlShutdown()


def _query(nvml: ctypes.CDLL) -> Gpus | None:
    number = ctypes.c_uint()
    if nvml.nvmlDeviceGetCount_v2(ctypes.byref(number)) != 0:
        return None
    gpus, migs = [], []
    for index in range(number.value):
        device = ctypes.c_void_p()
        if nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)) != 0:
            gpus.append("")  # a GPU that has fallen off the bus counts, and has no name
            continue
        gpus.append(_uuid(nvml, device))
        migs += _instances(nvml, device)
    return Gpus(tuple(gpus), tuple(migs))


def _instances(nvml: ctypes.CDLL, device: ctypes.c_void_p) -> list[str]:
    """UUIDs of the MIG instances of a GPU; none where it is not in MIG mode."""
    most = ctypes.c_uint()
    uuids = []
    if nvml.nvmlDeviceGetMaxMigDeviceCount(device, ctypes.byref(most)) == 0:
        for index in range(most.value):
            instance = ctypes.c_void_p()
            found = nvml.nvmlDeviceGetMigDeviceHandleByIndex(
                device, index, ctypes.byref(instance)
            )
            if found == 0:
                uuids.append(_uuid(nvml, instance))
    return uuids


def _uuid(nvml: ctypes.CDLL, device: ctypes.c_void_p) -> str:
    text = ctypes.create_string_buffer(_UUID_BYTES)
    if nvml.nvmlDeviceGetUUID(device, text, len(text)) != 0:
        return ""
    return text.value.decode(errors="replace")
