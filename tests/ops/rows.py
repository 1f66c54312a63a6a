"""What the tests of ops on rows share: sizes, data, and calls that Hypothesis draws.

A row is the last dimension; kernels take it in vectors, by one block or several.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Rows shorter than a vector, no multiple of one, longer than a block; more rows than
# blocks; several dimensions before the row, and none.
SHAPES = [
    (1, 1),
    (7, 33),
    (3, 127),
    (2, 3, 100),
    (5, 4096),
    (2, 1, 3, 64),
    (17,),
    (1, 8193),
    (300, 24),
]


def each_shape_and_dtype(test):
    """Runs a test of (shape, dtype) on all of them."""
    test = pytest.mark.parametrize("shape", SHAPES)(test)
    return pytest.mark.parametrize("dtype", DTYPES)(test)


def any_rows(**more):
    """Runs a test of (rows, hidden, dtype, magnitude, seed) on what Hypothesis draws.

    Args:
        **more: further arguments of the test, and the strategies that draw them.
    """

    def decorate(test):
        drawn = given(
            rows=st.integers(0, 5),
            hidden=st.integers(1, 300),
            dtype=st.sampled_from(DTYPES),
            magnitude=st.sampled_from([1e-3, 1.0, 100.0]),
            seed=st.random_module(),
            **more,
        )
        return settings(max_examples=50)(drawn(test))

    return decorate


def numbers(shape, dtype, magnitude=3.0, offset=0.0) -> torch.Tensor:
    return (offset + torch.randn(shape) * magnitude).to(dtype)


def weights(shape, dtype) -> torch.Tensor:
    """A norm's weight for rows of that shape."""
    return (1 + 0.1 * torch.randn(shape[-1])).to(dtype)


def residual_inputs(shape, dtype, magnitude=1.0) -> tuple[torch.Tensor, ...]:
    """Input, residual and weight of a fused norm."""
    x, r = (numbers(shape, dtype, magnitude) for _ in "xr")
    return x, r, weights(shape, dtype)
