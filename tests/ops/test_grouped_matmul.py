"""xla_ops.grouped_matmul: numerics against float64, offsets, shapes, errors."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import xla_ops
from rows import DTYPES
from support import Path, assert_close_to_exact, int32


def product(input, weight, offsets, dtype=None):
    """The definition, for offsets that ascend and are in bounds."""
    dtype = dtype or input.dtype
    out = torch.zeros(input.shape[0], weight.shape[1], dtype=dtype)
    for e, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        out[begin:end] = input[begin:end].to(dtype) @ weight[e].to(dtype).t()
    return out


def check(out, input, weight, offsets):
    assert out.dtype == input.dtype
    exact = product(input, weight, offsets, torch.float64)
    # fp32 sums in another order than torch's: floor is for those.
    same = product(input, weight, offsets, torch.float32).to(input.dtype)
    assert_close_to_exact(out, same, exact, floor=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "rows, columns, depth, offsets",
    [
        (1, 1, 1, [0, 1]),
        (7, 5, 3, [0, 2, 2, 7]),
        (40, 33, 130, [0, 33, 40]),
        (67, 70, 256, [0, 0, 1, 66, 67, 67]),
        (300, 136, 72, [0, 128, 300]),
        (16, 128, 512, list(range(17))),
    ],
)
def test_numerics(path, rows, columns, depth, offsets, dtype):
    input = torch.randn(rows, depth).to(dtype)
    weight = torch.randn(len(offsets) - 1, columns, depth).to(dtype)
    args = (input, weight, int32(*offsets))
    out, _ = path.run(xla_ops.grouped_matmul, *args)
    check(out, *args)


def test_rows_of_no_group_are_zero(path):
    input, weight = torch.randn(9, 16), torch.randn(2, 24, 16)
    input[0] = torch.nan
    args = (input, weight, int32(2, 4, 7))
    out, _ = path.run(xla_ops.grouped_matmul, *args)
    assert out[:2].eq(0).all() and out[7:].eq(0).all()
    check(out[2:7], input[2:7], weight, int32(0, 2, 5))


@pytest.mark.parametrize(
    "offsets, meant",
    [
        ((-3, 2, 4, 6), (0, 2, 4, 6)),
        ((0, 4, 2, 6), (0, 4, 4, 6)),
        ((0, 2, 4, 9), (0, 2, 4, 6)),
        ((5, 1, 0, 3), (5, 5, 5, 5)),
        ((7, 8, 9, 10), (6, 6, 6, 6)),
    ],
)
def test_offsets_are_not_trusted(path, offsets, meant):
    input, weight = torch.randn(6, 8), torch.randn(3, 4, 8)
    out, _ = path.run(xla_ops.grouped_matmul, input, weight, int32(*offsets))
    check(out, input, weight, int32(*meant))


@pytest.mark.parametrize(
    "rows, groups, columns, depth",
    [(0, 2, 4, 8), (3, 0, 4, 8), (3, 1, 0, 8), (3, 1, 4, 0)],
)
def test_zero_sizes(path, rows, groups, columns, depth):
    offsets = int32(*[0] * groups, rows)
    out, _ = path.run(
        xla_ops.grouped_matmul,
        torch.randn(rows, depth),
        torch.randn(groups, columns, depth),
        offsets,
    )
    assert out.shape == (rows, columns)
    assert out.eq(0).all()


def test_strided_arguments(path):
    input = torch.randn(8, 48)
    weight = torch.randn(2, 16, 24)
    offsets = int32(0, 0, 3, 0, 8, 0)
    out, _ = path.run(
        lambda i, w, o: xla_ops.grouped_matmul(i[:, 8:24], w.transpose(1, 2), o[::2]),
        input,
        weight,
        offsets,
    )
    check(out, input[:, 8:24], weight.transpose(1, 2), offsets[::2])


def test_one_program_serves_all_offsets(path):
    """Offsets are data: the same program takes others, even under torch.compile."""
    input, weight = torch.randn(6, 8), torch.randn(2, 4, 8)
    function = path.function(xla_ops.grouped_matmul)
    for offsets in (int32(0, 1, 6), int32(0, 6, 6), int32(2, 3, 4)):
        out = function(*path.put((input, weight, offsets)))
        path.wait()
        wanted = product(input, weight, offsets)
        torch.testing.assert_close(out.cpu(), wanted, rtol=1e-5, atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    before=st.integers(0, 3),
    after=st.integers(0, 3),
    columns=st.integers(1, 70),
    depth=st.integers(0, 140),
    dtype=st.sampled_from(DTYPES),
    seed=st.random_module(),
)
def test_any_shape(sizes, before, after, columns, depth, dtype, seed):
    offsets = int32(*itertools.accumulate(sizes, initial=before))
    rows = before + sum(sizes) + after
    input = torch.randn(rows, depth).to(dtype)
    weight = torch.randn(len(sizes), columns, depth).to(dtype)
    out, _ = Path("cpu").run(xla_ops.grouped_matmul, input, weight, offsets)
    check(out, input, weight, offsets)


INPUT, WEIGHT, OFFSETS = torch.ones(4, 8), torch.ones(2, 3, 8), int32(0, 2, 4)


@pytest.mark.parametrize(
    "args, message",
    [
        (
            (INPUT.int(), WEIGHT, OFFSETS),
            "input must be float32, float16 or bfloat16, got int32",
        ),
        ((INPUT[0], WEIGHT, OFFSETS), "input must have shape [M, K], got [8]"),
        ((INPUT, WEIGHT.half(), OFFSETS), "weight must be float32, got float16"),
        (
            (INPUT, WEIGHT[..., :7], OFFSETS),
            "weight must have shape [E, N, 8], got [2, 3, 7]",
        ),
        (
            (INPUT, WEIGHT[0], OFFSETS),
            "weight must have shape [E, N, 8], got [3, 8]",
        ),
        (
            (INPUT, WEIGHT, OFFSETS.long()),
            "group_offsets must be int32, got int64",
        ),
        (
            (INPUT, WEIGHT, OFFSETS[:2]),
            "group_offsets must have shape [3], got [2]",
        ),
    ],
)
def test_errors(path, args, message):
    with pytest.raises(Exception) as error:
        path.run(xla_ops.grouped_matmul, *args)
    assert f"grouped_matmul: {message}" in str(error.value)


def test_wrong_type():
    with pytest.raises(TypeError, match="weight must be a tensor, got float"):
        xla_ops.grouped_matmul(INPUT, 1.0, OFFSETS)
