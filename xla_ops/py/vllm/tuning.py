"""What XLA is told of the program of a step, on a GPU.

Tested by tests/engine/test_step.py.
"""

from __future__ import annotations

import os

from ..gpu import flags

_TRITON = "xla_gpu_enable_triton_gemm"
_MOST_TRITON_ROWS = 16


def compile_options(tokens: int, *, is_quantised: bool) -> dict[str, bool]:
    """Options of the program of a step of so many tokens; none that the user has set.

    Among the kernels that XLA tries for a product are those that it makes by Triton. It
    tries them with operands in the L2 cache, where a model's weights never are. Of few
    rows they win all the same; of more it takes slower ones than cuBLAS has, and trying
    them is most of the time to compile: minutes, of codes of 8 bits (measured, in
    benchmarks/NOTES.md).
    """
    if flags.is_set(_TRITON, os.environ):
        return {}
    if tokens <= _MOST_TRITON_ROWS and not is_quantised:
        return {}
    return {_TRITON: False}
