"""What XLA is told of the program of a step, on a GPU.

Tested by tests/engine/test_step.py.
"""

from __future__ import annotations

import os

from ..gpu import flags

_TRITON = "xla_gpu_enable_triton_gemm"
_LEVEL = "xla_gpu_autotune_level"
_MOST_TRITON_ROWS = 16
# Where a product takes as long as its weight is read, more or less.
_MOST_READING_ROWS = 256


def compile_options(tokens: int, *, is_quantised: bool) -> dict[str, bool | int]:
    """Options of the program of a step of so many tokens; none that the user has set.

    XLA tries the kernels for a product with operands in the L2 cache, where a model's
    weights never are. Among them are those that it makes by Triton: of few rows they
    win all the same; of more it takes slower ones than cuBLAS has, and trying them is
    most of the time to compile: minutes, of codes of 8 bits. From there to where
    products are more than reading weights nothing is tried, since what cuBLAS takes by
    itself is better than what a cache finds (measured, in benchmarks/NOTES_ENGINE.md).
    """
    if tokens <= _MOST_TRITON_ROWS and not is_quantised:
        return {}
    options: dict[str, bool | int] = {_TRITON: False}
    if tokens <= _MOST_READING_ROWS and not is_quantised:
        options[_LEVEL] = 0
    if any(flags.is_set(name, os.environ) for name in (_TRITON, _LEVEL)):
        return {}
    return options
