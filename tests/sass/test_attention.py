"""The attention kernels' hot loops on compute capability 9.0: size and spills.

A compiler's choice that costs speed shows in no result. The bounds are what the pinned
compiler makes of the source; after a change of either, measure, then record what
`sass.py` prints.
"""

import importlib.util
import pathlib
import re

import pytest

import sass
from support import setting

TOOLS = pathlib.Path(setting("XLA_OPS_TEST_CUOBJDUMP", "CUDA's cuobjdump")).parent
# Found and not imported, which would take seconds.
SPEC = importlib.util.find_spec("xla_ops")
assert SPEC is not None and SPEC.submodule_search_locations
PACKAGE = pathlib.Path(SPEC.submodule_search_locations[0])
LIBRARY = PACKAGE / "lib" / "libxla_ops_attention_cuda.so"

# sm90: head_dim, whether a box holds all panels. mma.sync: query's type or fp8 keys,
# head_dim; prefill: rows of a tile too.
SM90 = re.compile(r"AttentionSm90KernelI(?:13__nv_bfloat16|6__half)Li(\d+)ELb([01])E")
# Decode: its form too.
DECODE = re.compile(
    r"AttentionMmaDecodeKernelI(?:13__nv_bfloat16|6__half)Lb([01])ELi(\d+)E"
    r"LNS_10DecodeFormE(\d)E"
)
# In DecodeForm's order (attention_mma_decode.cuh).
FORMS = ("decode", "slots", "cluster", "short")
PREFILL = re.compile(
    r"AttentionMmaPrefillKernelI(?:13__nv_bfloat16|6__half)Lb([01])ELi(\d+)ELi(\d+)E"
)

# The hot loop, of tiles without a mask where those have their own: instructions,
# products, loads and stores of spilled registers, and how many of those stand among the
# products.
BOUNDS = {
    ("sm90", 64, "panel"): (563, 12, 1, 0),
    ("sm90", 128, "panel"): (605, 16, 0, 0),
    ("sm90", 128, "all panels"): (605, 16, 0, 0),
    ("sm90", 256, "panel"): (572, 21, 0, 0),
    ("sm90", 256, "all panels"): (572, 21, 0, 0),
    ("decode", 64, "16 bits"): (870, 32, 0, 0),
    ("decode", 128, "16 bits"): (767, 32, 0, 0),
    ("decode", 256, "16 bits"): (1071, 64, 0, 0),
    ("decode", 64, "8 bits"): (1009, 64, 0, 0),
    ("decode", 128, "8 bits"): (1510, 128, 0, 0),
    ("decode", 256, "8 bits"): (2510, 256, 0, 0),
    ("slots", 64, "16 bits"): (872, 32, 0, 0),
    ("slots", 128, "16 bits"): (766, 32, 0, 0),
    ("slots", 256, "16 bits"): (1056, 64, 0, 0),
    ("slots", 64, "8 bits"): (1010, 64, 0, 0),
    ("slots", 128, "8 bits"): (1507, 128, 0, 0),
    ("slots", 256, "8 bits"): (2500, 256, 0, 0),
    ("cluster", 64, "16 bits"): (874, 32, 0, 0),
    ("cluster", 128, "16 bits"): (773, 32, 0, 0),
    ("cluster", 256, "16 bits"): (1074, 64, 0, 0),
    ("cluster", 64, "8 bits"): (1001, 64, 0, 0),
    ("cluster", 128, "8 bits"): (1500, 128, 0, 0),
    ("cluster", 256, "8 bits"): (2508, 256, 0, 0),
    ("short", 64, "8 bits"): (631, 32, 0, 0),
    ("short", 128, "8 bits"): (904, 64, 0, 0),
    ("short", 256, "8 bits"): (1508, 128, 0, 0),
    ("128 rows", 64, "16 bits"): (1954, 128, 0, 0),
    ("128 rows", 128, "16 bits"): (2293, 256, 0, 0),
    ("128 rows", 64, "8 bits"): (2491, 256, 0, 0),
    ("128 rows", 128, "8 bits"): (3352, 512, 0, 0),
    ("64 rows", 64, "16 bits"): (1161, 64, 0, 0),
    ("64 rows", 128, "16 bits"): (1093, 96, 0, 0),
    ("64 rows", 256, "16 bits"): (1870, 256, 0, 0),
    ("64 rows", 64, "8 bits"): (1531, 128, 0, 0),
    ("64 rows", 128, "8 bits"): (2162, 256, 0, 0),
    ("64 rows", 256, "8 bits"): (3426, 512, 0, 0),
}
# Of all threads, or by mma.sync of the blocks that a multiprocessor should hold: 4 of
# decode (3 in clusters, 2 at head_dim 256), 2 of prefill (3 of 64 rows at head_dim 64).
REGISTERS = {
    ("sm90", 64): 128,
    ("sm90", 128): 168,
    ("sm90", 256): 168,
    ("decode", 64): 128,
    ("decode", 128): 128,
    ("decode", 256): 255,
    ("slots", 64): 128,
    ("slots", 128): 128,
    ("slots", 256): 255,
    ("cluster", 64): 168,
    ("cluster", 128): 168,
    ("cluster", 256): 255,
    ("short", 64): 168,
    ("short", 128): 168,
    ("short", 256): 255,
    ("128 rows", 64): 255,
    ("128 rows", 128): 255,
    ("64 rows", 64): 168,
    ("64 rows", 128): 255,
    ("64 rows", 256): 255,
}


def key_of(name):
    """Returns a kernel's key in BOUNDS, None for other kernels."""
    if found := SM90.search(name):
        return "sm90", int(found[1]), "all panels" if found[2] == "1" else "panel"
    if found := DECODE.search(name):
        name = FORMS[int(found[3])]
        return name, int(found[2]), "8 bits" if found[1] == "1" else "16 bits"
    if found := PREFILL.search(name):
        bits = "8 bits" if found[1] == "1" else "16 bits"
        return f"{found[3]} rows", int(found[2]), bits
    return None


@pytest.fixture(scope="module")
def kernels():
    """The kernels of each key, of both types of query where there are two."""
    by_key = {}
    for name, kernel in sass.read_library(LIBRARY, "sm_90a", TOOLS).items():
        by_key.setdefault(key_of(name), []).append(kernel)
    return by_key


@pytest.mark.parametrize("key", BOUNDS, ids=lambda key: "-".join(map(str, key)))
def test_hot_loop(kernels, key):
    size, products, spills, among_products = BOUNDS[key]
    assert len(kernels[key]) == (1 if key[2] == "8 bits" else 2)
    for kernel in kernels[key]:
        loop = kernel.hot_loop()
        assert loop.products == products
        assert len(loop) <= size
        assert loop.spills <= spills
        assert loop.spills_among_products <= among_products


def test_every_kernel_has_bounds(kernels):
    assert set(kernels) - {None} == set(BOUNDS)


def test_registers():
    used = sass.read_resources(LIBRARY, "sm_90a", TOOLS)
    seen = set()
    for name, resources in used.items():
        key = key_of(name)
        if key is not None:
            seen.add(key)
            assert resources["registers"] <= REGISTERS[key[:2]], name
    assert seen == set(BOUNDS)
