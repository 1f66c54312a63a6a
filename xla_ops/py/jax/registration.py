"""Registers the handlers of the op libraries with JAX.

The libraries are those that torch_xla's client gets, and so are the reasons where one
cannot be loaded (`core/handlers.py`). JAX wants an address for each stage of a handler,
which is what a library's own table has.

Tested by tests/with_jax/test_register.py.
"""

from __future__ import annotations

import ctypes
import threading

import jax

from ..core import handlers

# As a library's table has it -> as JAX spells it.
_PLATFORMS = {"cpu": (handlers.HOST, "cpu"), "cuda": (handlers.CUDA, "CUDA")}
_STAGES = ("instantiate", "prepare", "initialize", "execute")


class _Handler(ctypes.Structure):
    """`XlaOpsHandler` of xla_ops/cc/core/registry.h."""

    _fields_ = (
        ("target", ctypes.c_char_p),
        ("platform", ctypes.c_char_p),
        *((stage, ctypes.c_void_p) for stage in _STAGES),
    )


_lock = threading.Lock()
_registered: dict[str, set[str]] = {kind: set() for kind in _PLATFORMS}


def require(kind: str, target: str) -> None:
    """Registers what is not yet, so that JAX can call `target` on "cpu" or "cuda".

    Raises:
        Problem: it cannot, with the reason.
    """
    if kind not in _PLATFORMS:
        op = target.rpartition(".")[2]
        raise ValueError(f"{op}: device must be a CPU or a GPU, got {kind}")
    if target not in _registered[kind]:
        handlers.require(_PLATFORMS[kind][0], target)
        register(kind)


def register(kind: str) -> frozenset[str]:
    """Registers every handler for "cpu" or "cuda"; returns their targets."""
    name, _ = _PLATFORMS[kind]
    with _lock:
        handlers.load(name)
        for path in handlers.libraries(name):
            _register(kind, str(path))
        return frozenset(_registered[kind])


def _register(kind: str, path: str) -> None:
    library = ctypes.CDLL(path)  # is loaded already, and stays so
    library.xla_ops_handlers.restype = ctypes.POINTER(_Handler)
    count = ctypes.c_size_t()
    table = library.xla_ops_handlers(ctypes.byref(count))
    name, jax_name = _PLATFORMS[kind]
    for handler in table[: count.value]:
        target = handler.target.decode()
        if handler.platform.decode() != name or target in _registered[kind]:
            continue
        bundle = {
            stage: jax.ffi.pycapsule(ctypes.c_void_p(getattr(handler, stage)))
            for stage in _STAGES
            if getattr(handler, stage)
        }
        jax.ffi.register_ffi_target(target, bundle, platform=jax_name)
        _registered[kind].add(target)
