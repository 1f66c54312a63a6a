"""Finds the op libraries and registers their handlers with the XLA client in use.

Registration happens once a platform, at the first lowering of any op: early enough,
because XLA looks a handler up when it compiles, and late enough, because a process that
never meets an XLA tensor pays nothing.
"""

from __future__ import annotations

import functools
import threading
import warnings

import torch

from .. import _runtime
from .paths import LIB, bridge_path

HOST = "Host"
CUDA = "CUDA"

_SUFFIX = {HOST: "cpu", CUDA: "cuda"}
_lock = threading.Lock()
_unavailable: dict[str, str] = {}
_told: set[str] = set()


@functools.cache
def load(platform: str) -> frozenset[str]:
    """Loads all op libraries built for `platform`.

    Args:
        platform: "Host" or "CUDA".

    Returns:
        The custom-call targets found, such as "xla_ops.rms_norm".

    Raises:
        OSError: a library cannot be loaded; the message names it.
    """
    with _lock:
        return frozenset(
            target
            for path in sorted(LIB.glob(f"libxla_ops_*_{_SUFFIX[platform]}.so"))
            for target, found in _runtime.load_library(str(path))
            if found == platform
        )


def is_spmd() -> bool:
    """Returns whether torch_xla shards tensors over the devices of this process."""
    import torch_xla.runtime as xr

    return xr.is_spmd()


def xla_platform() -> str:
    """Returns the platform of torch_xla's client: "Host", "CUDA" or its own name."""
    import torch_xla.runtime as xr

    kind = xr.device_type()
    if kind is None:
        return "unknown"
    return {"CPU": HOST, "GPU": CUDA, "CUDA": CUDA}.get(kind, kind)


def platform_of(device: torch.device) -> str:
    """Returns the platform whose handlers run on a device's tensors, fake ones too."""
    if device.type == "xla":
        return xla_platform()
    return {"cpu": HOST, "cuda": CUDA}.get(device.type, device.type)


@functools.lru_cache(maxsize=1024)
def plan(
    platform: str, op: str, request: tuple[int, ...], num_results: int
) -> tuple[int, ...] | None:
    """Asks an op's library what a call needs of its caller.

    No device need be there: a library answers from numbers.

    Args:
        platform: "Host", "CUDA" or another one, which has no libraries.
        op: the library exports `xla_ops_<op>_plan`.
        request: the fields of its request, the size left out.
        num_results: how many fields of its plan are wanted.

    Returns:
        Those fields; None where there is no library to load, so that the reference
        will run.

    Raises:
        ValueError: the library refuses the request.
    """
    if platform not in _SUFFIX:
        return None
    path = LIB / f"libxla_ops_{op}_{_SUFFIX[platform]}.so"
    try:
        fields = _runtime.plan(str(path), f"xla_ops_{op}_plan", request, num_results)
    except OSError:  # the call will say what is wrong with it
        return None
    return tuple(fields)


@functools.cache
def registered_targets(platform: str) -> frozenset[str]:
    """Registers the handlers with torch_xla's client, and returns their targets.

    Empty where the platform has no handlers or where they cannot be registered; why
    is what `unavailable_reason` returns.
    """
    if platform not in _SUFFIX:
        _unavailable[platform] = f"xla_ops has no handlers for {platform}"
        return frozenset()
    try:
        targets = load(platform)
        with _lock:
            if platform == HOST:
                import _XLAC

                _runtime.register_cpu(_XLAC.__file__)
            else:
                _runtime.register_gpu(bridge_path())
    except (OSError, RuntimeError) as error:
        _unavailable[platform] = str(error)
        return frozenset()
    return targets


def unavailable_reason(platform: str, target: str) -> str:
    """Returns why `target` has no registered handler on `platform`."""
    return _unavailable.get(
        platform, f"this build of xla_ops has no {platform} handler for {target}"
    )


def available(platform: str, target: str) -> bool:
    """Returns whether XLA can call `target`; warns once an op where it cannot."""
    if target in registered_targets(platform):
        return True
    _tell_once(target, unavailable_reason(platform, target))
    return False


def loaded(platform: str, target: str) -> bool:
    """Returns whether `target` can be called directly; warns once where it cannot."""
    if target in load(platform):
        return True
    _tell_once(target, f"this build of xla_ops has no {platform} handler for {target}")
    return False


def _tell_once(target: str, reason: str) -> None:
    if target not in _told:
        _told.add(target)
        warnings.warn(
            f"{target}: using the plain torch reference, because {reason}. "
            "`python -m xla_ops doctor` tells more.",
            stacklevel=3,
        )
