"""linear's kernels on compute capability 9.0: the loop is products and nothing spilled.

Its four products of a step are one group, between a wait and an arrival; a compiler
that spills sums, or waits for each product, shows in no result.
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

KERNEL = re.compile(r"LinearSm90KernelI(?:13__nv_bfloat16|6__half)Li(\d+)E")
ROWS = {8, 16, 32, 64, 128}
LOOP = 72  # instructions
REGISTERS = 120  # of 17 warps


@pytest.fixture(scope="module")
def kernels():
    found = sass.read_library(LIBRARY, "sm_90a", TOOLS)
    return {name: kernel for name, kernel in found.items() if KERNEL.search(name)}


def test_hot_loop(kernels):
    assert len(kernels) == 2 * len(ROWS)
    for name, kernel in kernels.items():
        loop = kernel.hot_loop()
        assert loop.products == 4, name
        assert len(loop) <= LOOP, name
        assert loop.spills == 0, name


def test_registers():
    used = sass.read_resources(LIBRARY, "sm_90a", TOOLS)
    linear = {name: r for name, r in used.items() if KERNEL.search(name)}
    assert {int(KERNEL.search(name)[1]) for name in linear} == ROWS
    for name, resources in linear.items():
        assert resources["registers"] <= REGISTERS, name
