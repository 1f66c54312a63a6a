"""xla_ops.new_op: numerics against float64, shapes, errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import xla_ops
from support import Path, assert_close_to_exact

SCALE = 0.3
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (7, 33), (3, 127), (2, 3, 100), (5, 4096)])
def test_numerics(path, shape, dtype):
    x = torch.randn(shape).to(dtype)
    out, _ = path.run(lambda x: xla_ops.new_op(x, SCALE), x)
    assert out.dtype == dtype
    assert_close_to_exact(out, x * SCALE, x.double() * SCALE)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8)])
def test_no_elements(path, shape):
    out, _ = path.run(lambda x: xla_ops.new_op(x, SCALE), torch.empty(shape))
    assert out.shape == torch.Size(shape)


def test_attributes_give_different_programs(path):
    x = torch.randn(3, 16)
    twice, _ = path.run(lambda x: xla_ops.new_op(x, 2.0), x)
    thrice, _ = path.run(lambda x: xla_ops.new_op(x, 3.0), x)
    assert torch.equal(twice, x * 2)
    assert torch.equal(thrice, x * 3)


def test_non_finite_elements_stay_in_their_place(path):
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0])
    out, _ = path.run(lambda x: xla_ops.new_op(x, -2.0), x)
    assert out[0].isnan()
    assert out[1:].tolist() == [-torch.inf, torch.inf, -2.0]


def test_strided_input(path):
    x = torch.randn(6, 96)
    out, _ = path.run(lambda x: xla_ops.new_op(x[:, 33:64], SCALE), x)
    x = x[:, 33:64]
    assert_close_to_exact(out, x * SCALE, x.double() * SCALE)


@settings(max_examples=50, deadline=None)
@given(
    shape=st.lists(st.integers(0, 40), max_size=3),
    dtype=st.sampled_from(DTYPES),
    scale=st.floats(-100, 100, width=32),
)
def test_any_shape(shape, dtype, scale):
    x = torch.randn(shape).to(dtype)
    out, _ = Path("cpu").run(lambda x: xla_ops.new_op(x, scale), x)
    assert_close_to_exact(out, x * scale, x.double() * scale)


@pytest.mark.parametrize(
    "x, scale, message",
    [
        (
            torch.ones(2, 8, dtype=torch.int32),
            1.0,
            "new_op: input must be float32, float16 or bfloat16, got int32",
        ),
        (torch.ones(2), float("inf"), "new_op: scale must be finite, got inf"),
        (torch.ones(2), float("nan"), "new_op: scale must be finite, got nan"),
    ],
)
def test_errors(path, x, scale, message):
    with pytest.raises(Exception) as error:
        path.run(lambda x: xla_ops.new_op(x, scale), x)
    assert message in str(error.value)


def test_wrong_type():
    with pytest.raises(TypeError, match="new_op: input must be a tensor, got list"):
        xla_ops.new_op([1.0, 1.0], SCALE)
