"""Finds the op libraries and registers their handlers with the XLA client in use.

Registration happens at the first lowering of any op: early enough, because XLA looks a
handler up when it compiles, and late enough, because a process that never meets an XLA
tensor pays nothing. Libraries and handlers fail one by one: what cannot be loaded or
registered takes no other down, and is tried again where it is wanted again.

Where an op has no handler, on a GPU that is an error with the reason: the plain torch
reference is right, but slower by orders of magnitude. Elsewhere the reference runs, and
a warning says so once an op. XLA_OPS_STRICT=1 makes it an error everywhere,
XLA_OPS_STRICT=0 nowhere.

Tested by tests/core/test_handlers.py.
"""

from __future__ import annotations

import functools
import os
import pathlib
import sys
import threading
import time
from collections.abc import Callable, Mapping, Set

from .. import _runtime
from . import elf, environment, paths
from .errors import Problem, warn_user
from .lazy import torch

HOST = "Host"
CUDA = "CUDA"

# A look into torch_xla's symbol table takes 40 ms, so it is not for every call.
_RETRY_S = 1.0
_REINSTALL = "reinstall xla_ops"
_DOCTOR = "`python -m xla_ops doctor` tells more"


_Register = Callable[[], Mapping[str, str]]


class _Platform:
    """The handlers for one platform, and what stands against the others."""

    def __init__(self, name: str, suffix: str, register: _Register):
        self.name = name
        self.suffix = suffix
        self.register = register
        self.lock = threading.Lock()
        self.libraries: set[pathlib.Path] = set()
        self.loaded: frozenset[str] = frozenset()
        self.registered: frozenset[str] = frozenset()
        self.broken: dict[str, str] = {}  # library -> why it cannot be loaded
        self.refused: dict[str, str] = {}  # target -> why XLA does not take it
        self.unregistrable = ""  # why XLA takes none
        self.retry_at = {"load": 0.0, "register": 0.0}

    def load(self) -> frozenset[str]:
        """Loads the libraries that are not yet; returns the targets in all."""
        with self.lock:
            if self._is_due("load"):
                self._load()
            return self.loaded

    def load_and_register(self) -> frozenset[str]:
        """Registers the handlers that are not yet; returns their targets.

        Raises:
            Problem: a setting of torch_xla's clashes with ours (`environment.clash`).
        """
        problem = environment.clash(os.environ)
        if problem is not None:
            raise problem
        with self.lock:
            if self._is_due("load"):
                self._load()
            if self._is_due("register"):
                self._register()
            return self.registered

    def _is_due(self, step: str) -> bool:
        return time.monotonic() >= self.retry_at[step]

    def _load(self) -> None:
        found = sorted(paths.LIB.glob(f"libxla_ops_*_{self.suffix}.so"))
        self.broken = {}
        for path in found:
            if path in self.libraries:
                continue
            try:
                elf.require_usable(path, _REINSTALL)
                handlers = _runtime.load_library(str(path))
            except (OSError, Problem) as error:
                self.broken[path.name] = str(error)
                continue
            self.libraries.add(path)
            self._add({target for target, kind in handlers if kind == self.name})
        self.retry_at["load"] = _next_try(bool(self.broken))

    def add(self, targets: frozenset[str]) -> None:
        """Adds targets of a library that was loaded."""
        with self.lock:
            self._add(targets)

    def _add(self, targets: Set[str]) -> None:
        if not targets <= self.loaded:
            self.loaded |= targets
            self.retry_at["register"] = 0.0

    def _register(self) -> None:
        self.unregistrable, self.refused = "", {}
        try:
            outcomes = self.register()
        except (OSError, RuntimeError) as error:
            self.unregistrable = str(error)
        else:
            self.refused = {target: why for target, why in outcomes.items() if why}
            self.registered = self.loaded - set(self.refused)
        self.retry_at["register"] = _next_try(bool(self.unregistrable or self.refused))

    def why_not_loaded(self, target: str) -> str:
        if self.broken:
            return f"no op library that loads has it; {'; '.join(self.broken.values())}"
        if not self.libraries:
            return f"there are {paths.no_libraries(self.suffix)}: {_REINSTALL}"
        return f"this build of xla_ops has no {self.name} handler for {target}"

    def why_not_registered(self, target: str) -> str:
        if target not in self.loaded:
            return self.why_not_loaded(target)
        return self.refused.get(target) or self.unregistrable


def _next_try(failed: bool) -> float:
    return time.monotonic() + _RETRY_S if failed else float("inf")


def _register_cpu() -> Mapping[str, str]:
    import _XLAC

    return _runtime.register_cpu(_XLAC.__file__)


def _register_gpu() -> Mapping[str, str]:
    return _runtime.register_gpu(paths.bridge_path())


_platforms = {
    HOST: _Platform(HOST, "cpu", _register_cpu),
    CUDA: _Platform(CUDA, "cuda", _register_gpu),
}
_told: set[str] = set()


def load(platform: str) -> frozenset[str]:
    """Loads the op libraries built for `platform`, "Host" or "CUDA".

    Returns:
        The custom-call targets found, such as "xla_ops.rms_norm". A library that cannot
        be loaded has none; `unavailable_reason` tells why.
    """
    return _platforms[platform].load()


def register(path: str) -> dict[str, frozenset[str]]:
    """Loads an op library of any folder, for every platform that it has handlers for.

    Returns:
        Its targets by platform.

    Raises:
        OSError: it cannot be loaded, is no op library, or has a target that another
            library has.
    """
    for state in _platforms.values():
        state.load()  # the package's own come first, whoever is asked for first
    found = _runtime.load_library(path)
    targets = {
        platform: frozenset(target for target, kind in found if kind == platform)
        for platform in _platforms
    }
    for platform, state in _platforms.items():
        state.add(targets[platform])
    return targets


def is_spmd() -> bool:
    """Returns whether torch_xla shards tensors over the devices of this process."""
    runtime = sys.modules.get("torch_xla.runtime")
    return runtime is not None and runtime.is_spmd()


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
    if platform not in _platforms:
        return None
    try:
        return _ask(op, _platforms[platform].suffix, request, num_results)
    except (OSError, Problem):  # the call will say what is wrong with it
        return None


@functools.lru_cache(maxsize=1024)  # of answers; a failure is tried again
def _ask(
    op: str, suffix: str, request: tuple[int, ...], num_results: int
) -> tuple[int, ...]:
    path = paths.op_library(op, suffix)
    return tuple(_runtime.plan(path, f"xla_ops_{op}_plan", request, num_results))


def unavailable_reason(platform: str, target: str) -> str:
    """Returns why XLA cannot call `target` on `platform`."""
    if platform not in _platforms:
        return f"xla_ops has no handlers for {platform}"
    return _platforms[platform].why_not_registered(target)


def available(platform: str, target: str) -> bool:
    """Returns whether XLA can call `target`. Where not, warns once an op.

    Raises:
        Problem: it cannot, and that is an error (see the module).
    """
    state = _platforms.get(platform)
    if state is not None and (
        target in state.registered or target in state.load_and_register()
    ):
        return True
    _fall_back(platform, target, unavailable_reason(platform, target))
    return False


def loaded(platform: str, target: str) -> bool:
    """Returns whether `target` can be called directly; else as `available`."""
    state = _platforms[platform]
    if target in state.loaded or target in state.load():
        return True
    _fall_back(platform, target, state.why_not_loaded(target))
    return False


def libraries(platform: str) -> list[pathlib.Path]:
    """Returns the libraries that are loaded."""
    return sorted(_platforms[platform].libraries)


def require(platform: str, target: str) -> None:
    """Raises Problem with the reason where `target` cannot be called directly."""
    state = _platforms[platform]
    if target not in state.loaded and target not in state.load():
        raise _missing(platform, target, state.why_not_loaded(target), _DOCTOR)


def _is_strict(platform: str) -> bool:
    strict = environment.boolean(os.environ, "XLA_OPS_STRICT")
    return platform == CUDA if strict is None else strict


def _missing(platform: str, target: str, reason: str, fix: str) -> Problem:
    op = target.rpartition(".")[2]
    return Problem(
        f"{op}: handler must be there for {platform}, got none: {reason}", fix
    )


def _fall_back(platform: str, target: str, reason: str) -> None:
    if _is_strict(platform):
        fix = f"{_DOCTOR}; with XLA_OPS_STRICT=0 the slow plain torch reference runs"
        raise _missing(platform, target, reason, fix)
    if target in _told:
        return
    _told.add(target)
    warn_user(
        f"{target}: using the slow plain torch reference, because {reason}. {_DOCTOR}."
    )
