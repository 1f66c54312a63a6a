"""xla_ops.linear: numerics against float64, rows alone, shapes, errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import xla_ops
from rows import DTYPES
from support import Path, assert_close_to_exact


def product(input, weight, bias, dtype):
    out = input.to(dtype) @ weight.to(dtype).t()
    return out if bias is None else out + bias.to(dtype)


def check(out, input, weight, bias=None):
    assert out.dtype == input.dtype
    assert out.shape == (input.shape[0], weight.shape[0])
    exact = product(input, weight, bias, torch.float64)
    # fp32 sums in another order than torch's: floor is for those.
    same = product(input, weight, bias, torch.float32).to(input.dtype)
    assert_close_to_exact(out, same, exact, floor=4e-6)


def operands(rows, columns, depth, dtype, bias=True):
    made = [torch.randn(rows, depth).to(dtype), torch.randn(columns, depth).to(dtype)]
    return (*made, torch.randn(columns).to(dtype) if bias else None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "rows, columns, depth",
    [(1, 1, 1), (1, 40, 64), (7, 5, 3), (33, 49, 130), (130, 72, 264), (70, 576, 96)],
)
def test_numerics(path, rows, columns, depth, bias, dtype):
    args = operands(rows, columns, depth, dtype, bias)
    out, _ = path.run(xla_ops.linear, *args)
    check(out, *args)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_others(path, dtype):
    """On the CPU to the bit: the same answer alone and in a batch."""
    input, weight, bias = operands(21, 50, 72, dtype)
    together, _ = path.run(xla_ops.linear, input, weight, bias)
    alone, _ = path.run(xla_ops.linear, input[13:14].clone(), weight, bias)
    torch.testing.assert_close(alone[0], together[13])
    if path.name == "cpu":
        assert torch.equal(alone[0], together[13])


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_in_its_row_and_column(path, dtype):
    input, weight, _ = operands(9, 30, 72, dtype)
    input[4, 71] = torch.nan
    weight[17, 0] = torch.inf
    out, _ = path.run(xla_ops.linear, input, weight)
    assert out[4].isnan().all()
    assert out[torch.arange(9) != 4, 17].isinf().all()
    rows, columns = torch.arange(9) != 4, torch.arange(30) != 17
    check(out[rows][:, columns], input[rows], weight[columns])


def test_rounded_once(path):
    """The bias joins the sum before it is rounded to bf16."""
    input = torch.tensor([[1.0, 2**-9]], dtype=torch.bfloat16)
    bias = torch.tensor([2**-8], dtype=torch.bfloat16)
    out, _ = path.run(xla_ops.linear, input, torch.ones(1, 2).bfloat16(), bias)
    # Rounded before, 1 + 2^-9 were 1, and 1 + 2^-8 then too.
    assert out.item() == 1.0 + 2**-7


@pytest.mark.parametrize("rows, columns, depth", [(0, 4, 8), (3, 0, 8), (3, 4, 0)])
@pytest.mark.parametrize("bias", [False, True])
def test_zero_sizes(path, rows, columns, depth, bias):
    args = operands(rows, columns, depth, torch.float32, bias)
    out, _ = path.run(xla_ops.linear, *args)
    check(out, *args)


def test_strided_arguments(path):
    input, weight, bias = torch.randn(8, 48), torch.randn(24, 16), torch.randn(32)
    out, _ = path.run(
        lambda i, w, b: xla_ops.linear(i[:, 8:32], w.t(), b[::2]), input, weight, bias
    )
    check(out, input[:, 8:32], weight.t(), bias[::2])


@settings(max_examples=50, deadline=None)
@given(
    rows=st.integers(0, 140),
    columns=st.integers(0, 90),
    depth=st.integers(0, 140),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    seed=st.random_module(),
)
def test_any_shape(rows, columns, depth, dtype, bias, seed):
    args = operands(rows, columns, depth, dtype, bias)
    out, _ = Path("cpu").run(xla_ops.linear, *args)
    check(out, *args)


INPUT, WEIGHT, BIAS = torch.ones(4, 8), torch.ones(3, 8), torch.ones(3)


@pytest.mark.parametrize(
    "args, message",
    [
        (
            (INPUT.int(), WEIGHT, BIAS),
            "input must be float32, float16 or bfloat16, got int32",
        ),
        ((INPUT[0], WEIGHT, BIAS), "input must have shape [M, K], got [8]"),
        ((INPUT, WEIGHT.half(), BIAS), "weight must be float32, got float16"),
        (
            (INPUT, WEIGHT[:, :7], BIAS),
            "weight must have shape [N, 8], got [3, 7]",
        ),
        ((INPUT, WEIGHT[0], BIAS), "weight must have shape [N, 8], got [8]"),
        ((INPUT, WEIGHT, BIAS.half()), "bias must be float32, got float16"),
        ((INPUT, WEIGHT, BIAS[:2]), "bias must have shape [3], got [2]"),
    ],
)
def test_errors(path, args, message):
    with pytest.raises(Exception) as error:
        path.run(xla_ops.linear, *args)
    assert f"linear: {message}" in str(error.value)


def test_wrong_type():
    with pytest.raises(TypeError, match="weight must be a tensor, got float"):
        xla_ops.linear(INPUT, 1.0)
