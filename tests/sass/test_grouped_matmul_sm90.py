"""The kernels of grouped_matmul's weight gradient: products, and nothing spilled.

A step of the ring is 32 products a warp, of fragments that ldmatrix transposes. Sums
that are spilled, or a third of the registers more, show in no result: two blocks must
fit a multiprocessor.
"""

import importlib.util
import pathlib
import re

import pytest

import sass
from support import setting

TOOLS = pathlib.Path(setting("XLA_OPS_TEST_CUOBJDUMP", "CUDA's cuobjdump")).parent
SPEC = importlib.util.find_spec("xla_ops")
assert SPEC is not None and SPEC.submodule_search_locations
PACKAGE = pathlib.Path(SPEC.submodule_search_locations[0])
LIBRARY = PACKAGE / "lib" / "libxla_ops_grouped_matmul_cuda.so"

KERNEL = re.compile(r"GroupedWeightMmaKernelI(13__nv_bfloat16|6__half)")
LOOP = 190  # instructions
REGISTERS = 128  # of two blocks of 256 threads


@pytest.fixture(scope="module")
def kernels():
    found = sass.read_library(LIBRARY, "sm_90a", TOOLS)
    return {name: kernel for name, kernel in found.items() if KERNEL.search(name)}


def test_hot_loop(kernels):
    assert len(kernels) == 2
    for name, kernel in kernels.items():
        loop = kernel.hot_loop()
        assert loop.products == 32, name
        assert len(loop) <= LOOP, name
        transposed = [i for i in loop.body if i.opcode.startswith("LDSM.16.MT88")]
        assert len(transposed) == loop.count("LDSM") == 12, name
        assert sass.Loop(kernel.instructions).spills == 0, name


def test_registers():
    used = sass.read_resources(LIBRARY, "sm_90a", TOOLS)
    found = {name: r for name, r in used.items() if KERNEL.search(name)}
    assert len(found) == 2
    for name, resources in found.items():
        assert resources["registers"] <= REGISTERS, name
        assert resources["stack"] == 0, name
