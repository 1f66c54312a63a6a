"""CUDA kernels for LLM inference inside PyTorch/XLA graphs, as typed-FFI custom calls.

The ops work on XLA tensors (lazily and under torch.compile(backend="openxla")) and, by
the same handlers, on CPU and CUDA tensors. Importing this package defines them as
torch.ops.xla_ops.* and torch.ops.xla_gpu.* too.

`xla_ops.jax` has them for JAX arrays and needs no torch. Where JAX was imported first
and torch was not, torch is imported when one of its ops is asked for.
"""

# First: where the extension cannot be imported, this says so, and `from . import
# _runtime` of another module would speak of a circular import.
from .core import extension as _extension  # noqa: F401

# isort: split
from typing import Any as _Any

from . import ops
from .core import lazy as _lazy
from .core.debug import set_debug
from .core.sharding import sharding
from .extend.library import include_dir
from .version import __version__

# In the form that type checkers read.
__all__ = ["__version__", "include_dir", "set_debug", "sharding", "straight_through"]
__all__ += ops.__all__

if _lazy.is_wanted():
    _lazy.attach()
    from .core.straight_through import straight_through
    from .ops import *  # noqa: F403
else:

    def __getattr__(name: str) -> _Any:
        if name not in (*ops.__all__, "straight_through"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        _lazy.attach()
        from .core import straight_through as estimate

        return getattr(ops if name in ops.__all__ else estimate, name)
