"""What XLA is told of the program of a step, on a GPU.

Tested by tests/engine/test_step.py.
"""

from __future__ import annotations

import os

from ..gpu import flags

_TRITON = "xla_gpu_enable_triton_gemm"
_LEVEL = "xla_gpu_autotune_level"
_MOST_TRITON_ROWS = 16
_MOST_READING_ROWS = 256


def compile_options(tokens: int, *, is_quantised: bool) -> dict[str, bool | int]:
    """Options of the program of a step of so many tokens; none that the user has set.

    XLA tries the kernels for a product with operands in the L2 cache, where a model's
    weights never are. Of few rows those that it makes by Triton win all the same. Of
    more, trying them is most of the time to compile (minutes, of codes of 8 bits) and
    finds slower ones than cuBLAS has. Where a product is hardly more than the reading
    of its weight, nothing is tried: what cuBLAS takes by itself is better than what is
    found in a cache. Measured, in benchmarks/NOTES_ENGINE.md.
    """
    if tokens <= _MOST_TRITON_ROWS and not is_quantised:
        return {}
    options: dict[str, bool | int] = {_TRITON: False}
    if tokens <= _MOST_READING_ROWS and not is_quantised:
        options[_LEVEL] = 0
    if any(flags.is_set(name, os.environ) for name in (_TRITON, _LEVEL)):
        return {}
    return options
