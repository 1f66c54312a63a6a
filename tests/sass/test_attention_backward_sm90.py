"""The Hopper kernels of attention's gradient: size, products and spills of the loop.

A compiler that waits for each product, or spills sums of dk and dv among them, shows in
no result. After a change that is meant: measure, then record what `sass.py` prints.
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
LIBRARY = PACKAGE / "lib" / "libxla_ops_attention_backward_cuda.so"

# head_dim, and whether logits are capped or have slopes.
KERNEL = re.compile(r"BackwardSm90KernelI(?:13__nv_bfloat16|6__half)Li(\d+)ELb([01])E")

# Instructions, products, loads and stores of spilled registers, and how many of those
# stand among the products. With caps and slopes at head_dim 64, whose tiles have 128
# rows, what a thread keeps does not fit.
BOUNDS = {
    (64, False): (1060, 32, 2, 0),
    (64, True): (3010, 32, 34, 32),
    (128, False): (820, 32, 1, 0),
    (128, True): (1790, 32, 1, 0),
    (256, False): (930, 44, 0, 0),
    (256, True): (1420, 44, 0, 0),
}
REGISTERS = 168  # of all threads, before warpgroups take and give theirs


def key_of(name):
    found = KERNEL.search(name)
    return None if found is None else (int(found[1]), found[2] == "1")


@pytest.fixture(scope="module")
def kernels():
    """The kernels of each key, of both types."""
    by_key = {}
    for name, kernel in sass.read_library(LIBRARY, "sm_90a", TOOLS).items():
        by_key.setdefault(key_of(name), []).append(kernel)
    return by_key


@pytest.mark.parametrize("key", BOUNDS)
def test_hot_loop(kernels, key):
    size, products, spills, among_products = BOUNDS[key]
    assert len(kernels[key]) == 2
    for kernel in kernels[key]:
        loop = kernel.hot_loop()
        assert loop.products == products
        assert len(loop) <= size
        assert loop.spills <= spills
        assert loop.spills_among_products <= among_products


def test_registers():
    used = sass.read_resources(LIBRARY, "sm_90a", TOOLS)
    found = {key_of(name): r["registers"] for name, r in used.items()}
    assert set(found) - {None} == set(BOUNDS)
    assert max(found[key] for key in BOUNDS) <= REGISTERS
