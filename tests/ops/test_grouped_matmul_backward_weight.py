"""The gradients of grouped_matmul: numerics against float64, offsets, groups."""

import itertools

import pytest
import torch
import torch_xla
from hypothesis import given, settings
from hypothesis import strategies as st

import xla_ops
from differentiated import assert_gradients, double, gradients_of
from rows import DTYPES
from support import Path, assert_close_to_exact, int32, same
from xla_ops.core.op import OPS

ENDS = ("", "_backward_weight")


def weight_of(grad, input, offsets):
    return torch.ops.xla_ops.grouped_matmul_backward_weight(grad, input, offsets)


def grouped(x, w, offsets):
    """Each group by itself; rows of no group are zero."""
    bounds = offsets.tolist()
    parts = [x[a:b] @ m.t() for a, b, m in zip(bounds, bounds[1:], w, strict=False)]
    zeros = x.new_zeros((len(x), w.shape[1]))
    before, after = zeros[: bounds[0]], zeros[bounds[-1] :]
    return torch.cat([before, *parts, after])


def inputs(rows, columns, depth, offsets, dtype=torch.float32):
    weight = torch.randn(len(offsets) - 1, columns, depth)
    return [torch.randn(rows, depth).to(dtype), weight.to(dtype), int32(*offsets)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "rows, columns, depth, offsets",
    [
        (1, 1, 1, [0, 1]),
        (9, 16, 24, [1, 4, 4, 8]),
        (67, 70, 137, [0, 0, 1, 66, 67, 67]),
        (300, 136, 72, [0, 128, 300]),
        (40, 128, 256, list(range(0, 41, 5))),
    ],
)
def test_numerics(path, rows, columns, depth, offsets, dtype):
    args = inputs(rows, columns, depth, offsets, dtype)
    assert_gradients(path, xla_ops.grouped_matmul, grouped, args)


@pytest.mark.parametrize("wanted", [0, 1])
def test_only_what_is_asked_for(path, wanted):
    args = inputs(9, 16, 24, [1, 4, 4, 8])
    assert_gradients(path, xla_ops.grouped_matmul, grouped, args, wanted=[wanted])


@pytest.mark.parametrize("wanted", [0, 1])
def test_nothing_else_is_computed(wanted):
    leaves, _ = Path("lazy").put((inputs(9, 16, 24, [1, 4, 4, 8]), []))
    leaves[wanted].requires_grad_()
    with torch.enable_grad():
        loss = xla_ops.grouped_matmul(*leaves).sum()
    (found,) = torch.autograd.grad(loss, leaves[wanted])
    text = torch_xla._XLAC._get_xla_tensors_hlo([found])
    calls = [text.count(f'"xla_ops.grouped_matmul{end}"') for end in ENDS]
    assert calls == [1 - wanted, wanted]  # the forward's result is not asked for


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 70), min_size=1, max_size=6),
    before=st.integers(0, 3),
    after=st.integers(0, 3),
    columns=st.integers(0, 70),
    depth=st.integers(0, 140),
    dtype=st.sampled_from(DTYPES),
    seed=st.random_module(),
)
def test_any_groups(sizes, before, after, columns, depth, dtype, seed):
    offsets = list(itertools.accumulate(sizes, initial=before))
    args = inputs(before + sum(sizes) + after, columns, depth, offsets, dtype)
    assert_gradients(Path("cpu"), xla_ops.grouped_matmul, grouped, args)


def test_no_groups(path):
    """Of which plain torch has no graph."""
    args, grads = inputs(5, 16, 24, [3]), [torch.randn(5, 16)]
    found = gradients_of(path, xla_ops.grouped_matmul, args, grads, [0, 1])
    assert torch.equal(found[0], torch.zeros(5, 24))
    assert found[1].shape == (0, 16, 24)


def exact_weight(grad, input, offsets):
    """The definition in float64, for offsets that ascend and are in bounds."""
    parts = itertools.pairwise(offsets)
    return torch.stack([grad[a:b].double().t() @ input[a:b].double() for a, b in parts])


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
    grad, input = torch.randn(6, 4), torch.randn(6, 8)
    found, _ = path.run(weight_of, grad, input, int32(*offsets))
    exact = exact_weight(grad, input, meant)
    assert_close_to_exact(found, exact.float(), exact, floor=1e-6)
    reference = OPS["grouped_matmul_backward_weight"].reference
    assert_close_to_exact(
        reference(grad, input, int32(*offsets)), exact.float(), exact, floor=1e-6
    )


def test_rows_of_other_groups_do_not_count(path):
    """Not by zeros either, which would make NaN of what is infinite."""
    grad, input = torch.randn(7, 16), torch.randn(7, 24)
    grad[[0, 3]], input[[0, 6]] = torch.nan, torch.inf
    found, _ = path.run(weight_of, grad, input, int32(1, 3, 4, 4, 6))
    assert found[1].isnan().all() and not found[2].any()
    for group, (begin, end) in ((0, (1, 3)), (3, (4, 6))):
        (exact,) = exact_weight(grad, input, (begin, end))
        assert_close_to_exact(found[group], exact.float(), exact, floor=1e-6)


def test_one_program_serves_all_offsets(path):
    """Offsets are data: the same program takes others, even under torch.compile."""
    grad, input = torch.randn(6, 4), torch.randn(6, 8)
    function = path.function(weight_of)
    for offsets in ((0, 1, 6), (0, 6, 6), (2, 3, 4)):
        found = function(*path.put((grad, input, int32(*offsets))))
        path.wait()
        exact = exact_weight(grad, input, offsets)
        assert_close_to_exact(found.cpu(), exact.float(), exact, floor=1e-6)


def test_equal_runs(path):
    """To the bit, with no switch: a group's rows are added up in order."""
    args = inputs(500, 40, 72, [0, 400, 410, 500], torch.bfloat16)
    grads = [torch.randn(500, 40).bfloat16()]
    runs = [
        gradients_of(path, xla_ops.grouped_matmul, args, grads, [0, 1])
        for _ in range(2)
    ]
    assert all(same(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("wanted", [[0], [1], [0, 1]])
@pytest.mark.parametrize("device", ["cpu", "lazy"])
def test_a_second_derivative(device, wanted):
    """By the same two ops, through which a gradient's gradient is right."""
    args, grad = inputs(9, 4, 8, [1, 4, 4, 8]), torch.randn(9, 4)
    weights = [torch.randn_like(args[i]) for i in wanted]

    def second(product, args, grad, weights):
        leaves = [t.clone().requires_grad_() for t in (*args[:2], grad)]
        with torch.enable_grad():
            out = product(*leaves[:2], args[2])
            some = [leaves[i] for i in wanted]
            found = torch.autograd.grad(out, some, leaves[2], create_graph=True)
            total = sum((f * w).sum() for f, w in zip(found, weights, strict=True))
            return torch.autograd.grad(total, leaves, allow_unused=True)

    given = Path(device).put((args, grad, weights))
    found = second(xla_ops.grouped_matmul, *given)
    exact = second(grouped, double(args), grad.double(), double(weights))
    for got, right in zip(found, exact, strict=True):
        if right is None:
            assert got is None
            continue
        assert_close_to_exact(got.cpu(), right.float(), right, floor=1e-6)


GRAD, INPUT, OFFSETS = torch.ones(4, 3), torch.ones(4, 8), int32(0, 2, 4)


@pytest.mark.parametrize(
    "args, message",
    [
        (
            (GRAD, INPUT.int(), OFFSETS),
            "input must be float32, float16 or bfloat16, got int32",
        ),
        ((GRAD, INPUT[0], OFFSETS), "input must have shape [M, K], got [8]"),
        ((GRAD.half(), INPUT, OFFSETS), "grad must be float32, got float16"),
        ((GRAD[1:], INPUT, OFFSETS), "grad must have shape [4, N], got [3, 3]"),
        ((GRAD[0], INPUT, OFFSETS), "grad must have shape [4, N], got [3]"),
        ((GRAD, INPUT, OFFSETS.long()), "group_offsets must be int32, got int64"),
        (
            (GRAD, INPUT, OFFSETS[:0]),
            "group_offsets must have shape [E + 1], got [0]",
        ),
        (
            (GRAD, INPUT, OFFSETS[None]),
            "group_offsets must have shape [E + 1], got [1, 3]",
        ),
    ],
)
def test_errors(path, args, message):
    with pytest.raises(Exception) as error:
        path.run(weight_of, *args)
    assert f"grouped_matmul_backward_weight: {message}" in str(error.value)
