"""Kernels from outside this package as XLA calls: the public surface for them.

Ways to bring a kernel, from the least work to the most (docs/extend.md):

    torch_op          an operator that torch has, by its name
    cuda_kernel       CUDA C++, as text
    triton_kernel     a function by triton.jit
    register_library  handlers in C++ or CUDA, built against the headers of this wheel

and what declares an op on top of a handler, as the ops of this package are declared:
`Op`, `CustomCall`, `mutable`, the checks, rules of autocast, gradients and sharding.

What is named here changes only with `API_VERSION`, which the headers and so the op
libraries built against them carry too. Nothing is imported before it is asked for.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..core import autocast as autocast
    from ..core import mutable as mutable
    from ..core.checks import Checker as Checker
    from ..core.custom_call import CustomCall as CustomCall
    from ..core.custom_call import OptionalOperand as OptionalOperand
    from ..core.gradients import Backward as Backward
    from ..core.gradients import Gradient as Gradient
    from ..core.hlo import Spec as Spec
    from ..core.op import Op as Op
    from ..core.sharding import Rule as ShardingRule  # noqa: F401
    from .cuda_kernels import cuda_kernel as cuda_kernel
    from .launch import Given as Given
    from .launch import ceil_div as ceil_div
    from .library import API_VERSION as API_VERSION
    from .library import include_dir as include_dir
    from .library import register_library as register_library
    from .torch_op import torch_op as torch_op
    from .triton_kernels import triton_kernel as triton_kernel

# Public name -> the module of this package, and the name there; "" is the module.
_PLACES = {
    "API_VERSION": ("extend.library", "API_VERSION"),
    "Backward": ("core.gradients", "Backward"),
    "Checker": ("core.checks", "Checker"),
    "CustomCall": ("core.custom_call", "CustomCall"),
    "Given": ("extend.launch", "Given"),
    "Gradient": ("core.gradients", "Gradient"),
    "Op": ("core.op", "Op"),
    "OptionalOperand": ("core.custom_call", "OptionalOperand"),
    "ShardingRule": ("core.sharding", "Rule"),
    "Spec": ("core.hlo", "Spec"),
    "autocast": ("core.autocast", ""),
    "include_dir": ("extend.library", "include_dir"),
    "ceil_div": ("extend.launch", "ceil_div"),
    "cuda_kernel": ("extend.cuda_kernels", "cuda_kernel"),
    "triton_kernel": ("extend.triton_kernels", "triton_kernel"),
    "mutable": ("core.mutable", ""),
    "register_library": ("extend.library", "register_library"),
    "torch_op": ("extend.torch_op", "torch_op"),
}

__all__ = list(_PLACES)


class _Package(types.ModuleType):
    """Keeps a module of this package from hiding the function it is named after."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _PLACES and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    place, attribute = _PLACES[name]
    module = importlib.import_module(f"..{place}", __name__)
    value = getattr(module, attribute) if attribute else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
