"""CUDA kernels for LLM inference inside PyTorch/XLA graphs, as typed-FFI custom calls.

The ops work on XLA tensors (lazily and under torch.compile(backend="openxla")) and, by
the same handlers, on CPU and CUDA tensors. Importing this package defines them as
torch.ops.xla_ops.* and torch.ops.xla_gpu.* too.
"""

# First: where the extension is missing, this says so, and `from . import _runtime` of
# another module would speak of a circular import.
from ._runtime import __name__ as _extension  # noqa: F401

# isort: split
from . import ops
from .core.debug import set_debug
from .core.sharding import sharding
from .extend.library import include_dir
from .ops import *  # noqa: F403
from .version import __version__

# In the form that type checkers read.
__all__ = ["__version__", "include_dir", "set_debug", "sharding"]
__all__ += ops.__all__
