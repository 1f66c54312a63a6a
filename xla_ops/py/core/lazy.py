"""Torch, and what is made for it, as names that can be imported without it.

Ops are declared once, for torch and for JAX. The modules that declare them import
`torch` from here, so that `xla_ops.jax` needs no torch: it is then `no_torch`, which
has the names that declarations use. What only torch calls for (registering an op, say)
waits in `when_torch`, and whole modules wait as names of this one.

Torch may come later, where a process began with JAX. `attach` then puts the real
modules in their places: when torch is imported, by whomever (`_Attaching`).

Tested by tests/core/test_lazy.py.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch as torch

    from . import autograd as autograd
    from . import ownership as ownership
    from . import references as references
    from . import tracing as tracing

_PACKAGE = __package__.rpartition(".")[0]


class _Later(ModuleType):
    """Stands where a module of this package will be once torch is there."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise RuntimeError(f"{self.__name__} must not be used without torch")


_waiting: list[Callable[[], None]] = []
# Name -> what stands for it in modules that import it, and the real module's name.
_places: dict[str, tuple[ModuleType, str]] = {}
_is_attached = False


def is_wanted() -> bool:
    """Whether this process runs on torch, as far as can be told at the import.

    It does where torch is imported or could be, unless JAX was imported and torch was
    not.
    """
    if sys.modules.get("torch") is not None:
        return True
    return "jax" not in sys.modules and importlib.util.find_spec("torch") is not None


def when_torch(define: Callable[[], None]) -> None:
    """Calls `define` now, or when torch is attached."""
    if _is_attached:
        define()
    else:
        _waiting.append(define)


def is_attached() -> bool:
    return _is_attached


def attach() -> None:
    """Defines all that was declared as ops of torch. The second time does nothing."""
    global _is_attached  # noqa: PLW0603 - one torch a process
    if _is_attached:
        return
    importlib.import_module("torch")
    if _is_attached:  # by that import
        return
    _is_attached = True
    for name, (place, real_name) in _places.items():
        real = importlib.import_module(real_name)
        for module in list(sys.modules.values()):
            inside = getattr(module, "__name__", "").startswith(f"{_PACKAGE}.")
            if inside and vars(module).get(name) is place:
                setattr(module, name, real)
    _put_dtypes()
    while _waiting:
        _waiting.pop(0)()


def _put_dtypes() -> None:
    """Puts torch's dtypes where constants of modules hold those of `no_torch`.

    Those equal torch's, but torch itself takes its own alone.
    """
    stand_in = _places["torch"][0].DType if "torch" in _places else None
    if stand_in is None:
        return

    def real(value: Any) -> Any:
        if isinstance(value, stand_in):
            return getattr(sys.modules["torch"], value.name)
        if type(value) in (tuple, list):
            found = [real(item) for item in value]
            same = all(one is other for one, other in zip(found, value, strict=True))
            return value if same else type(value)(found)
        if type(value) is dict:
            for key, item in value.items():  # others have the same dict
                value[key] = real(item)
        return value

    for name, module in list(sys.modules.items()):
        if not name.startswith(f"{_PACKAGE}.") or module is _places["torch"][0]:
            continue
        for constant, value in list(vars(module).items()):
            if constant.strip("_").isupper():
                setattr(module, constant, real(value))


class _Attaching:
    """Finds torch as ever, and attaches it as soon as it is imported."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "torch":
            return None
        sys.meta_path[:] = [f for f in sys.meta_path if f is not _Attaching]
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_and_attach(module: ModuleType) -> None:
            execute(module)
            try:
                attach()
            except Exception as error:  # noqa: BLE001 - torch itself is whole
                warnings.warn(
                    "xla_ops: torch.ops.xla_ops could not be defined for this torch:"
                    f" {error}",
                    stacklevel=2,
                )

        spec.loader.exec_module = exec_and_attach  # type: ignore[method-assign]
        return spec


if not TYPE_CHECKING:
    for _name in ("autograd", "ownership", "references", "tracing"):
        _place = globals()[_name] = _Later(f"{__package__}.{_name}")
        _places[_name] = _place, _place.__name__
    if is_wanted():
        import torch
    else:
        from . import no_torch as torch

        _places["torch"] = torch, "torch"
        sys.meta_path.insert(0, _Attaching)
