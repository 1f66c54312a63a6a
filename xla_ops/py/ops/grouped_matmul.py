"""Products of groups of rows, each group with a matrix of its own."""

from __future__ import annotations

from collections.abc import Iterator

from ..core import autocast, sharding
from ..core.checks import Checker
from ..core.custom_call import CustomCall
from ..core.dtypes import FLOAT_DTYPES
from ..core.gradients import Backward, Gradient
from ..core.hlo import Spec
from ..core.lazy import torch
from ..core.op import Op

_check = Checker("grouped_matmul")
_check_weight = Checker("grouped_matmul_backward_weight")


def grouped_matmul(
    input: torch.Tensor, weight: torch.Tensor, group_offsets: torch.Tensor
) -> torch.Tensor:
    """Multiplies each group of rows by the matrix of its group.

    out[m] = T(weight[e] @ input[m]) for group_offsets[e] <= m < group_offsets[e + 1],
    accumulated in fp32 and rounded once to the dtype. Rows of no group are zero. With
    rows sorted by expert this is a mixture of experts: it costs M products of a row,
    whatever the number of experts.

    Offsets are read on the device and not trusted: one below the offset before it
    (below 0 for the first) or above M is taken for that bound.

    Differentiable in input, by this op, and in weight, by another.

    Under torch.autocast, input is taken as it is, and weight is cast to its dtype.

    Args:
        input: [M, K], float32, float16 or bfloat16.
        weight: [E, N, K], input's dtype.
        group_offsets: [E + 1], int32, ascending.

    Returns:
        [M, N], input's dtype.

    Raises:
        ValueError: an argument breaks one of the rules above.

    Source: Gale et al., MegaBlocks: Efficient Sparse Training with Mixture-of-Experts,
    2023, whose grouped products this is.

    Example:
        >>> weight = torch.tensor([[[1.0, 1.0]], [[10.0, 10.0]]])
        >>> offsets = torch.tensor([0, 1, 3], dtype=torch.int32)
        >>> grouped_matmul(torch.ones(4, 2), weight, offsets).flatten()
        tensor([ 2., 20., 20.,  0.])
    """
    _check.tensor("input", input)
    _check.tensor("weight", weight)
    _check.tensor("group_offsets", group_offsets)
    return _op(input, weight, group_offsets)


def _lower(
    input: torch.Tensor, weight: torch.Tensor, group_offsets: torch.Tensor
) -> CustomCall:
    _check.dtype("input", input, FLOAT_DTYPES)
    _check.rank("input", input, "[M, K]")
    num_rows, depth = input.shape
    _check.dtype("weight", weight, [input.dtype])
    if weight.dim() != 3 or weight.shape[2] != depth:
        rule = f"have shape [E, N, {depth}]"
        _check.require(False, "weight", rule, list(weight.shape))
    num_groups, num_columns, _ = weight.shape
    _check.dtype("group_offsets", group_offsets, [torch.int32])
    _check.shape("group_offsets", group_offsets, [num_groups + 1])
    _check.same_device("input", input, weight=weight, group_offsets=group_offsets)
    return CustomCall(
        "xla_ops.grouped_matmul",
        ("input", "weight", "group_offsets"),
        (Spec((num_rows, num_columns), input.dtype),),
    )


def _lower_weight(
    grad: torch.Tensor, input: torch.Tensor, group_offsets: torch.Tensor
) -> CustomCall:
    _check_weight.dtype("input", input, FLOAT_DTYPES)
    _check_weight.rank("input", input, "[M, K]")
    num_rows, depth = input.shape
    _check_weight.dtype("grad", grad, [input.dtype])
    if grad.dim() != 2 or grad.shape[0] != num_rows:
        rule = f"have shape [{num_rows}, N]"
        _check_weight.require(False, "grad", rule, list(grad.shape))
    _check_weight.dtype("group_offsets", group_offsets, [torch.int32])
    if group_offsets.dim() != 1 or group_offsets.shape[0] == 0:
        rule, got = "have shape [E + 1]", list(group_offsets.shape)
        _check_weight.require(False, "group_offsets", rule, got)
    _check_weight.same_device("input", input, grad=grad, group_offsets=group_offsets)
    shape = (group_offsets.shape[0] - 1, grad.shape[1], depth)
    return CustomCall(
        "xla_ops.grouped_matmul_backward_weight",
        ("grad", "input", "group_offsets"),
        (Spec(shape, input.dtype),),
    )


def _groups(group_offsets: torch.Tensor, num_rows: int) -> Iterator[torch.Tensor]:
    """Yields for each group which of the rows are its own, as [M, 1].

    No shape may depend on an offset's value.
    """
    rows = torch.arange(num_rows, device=group_offsets.device).unsqueeze(-1)
    begin = group_offsets[0].clamp(0, num_rows)
    for offset in group_offsets[1:].unbind(0):
        end = torch.maximum(offset.clamp(0, num_rows), begin)
        yield (rows >= begin) & (rows < end)
        begin = end


def _reference(
    input: torch.Tensor, weight: torch.Tensor, group_offsets: torch.Tensor
) -> torch.Tensor:
    num_rows = input.shape[0]
    out = input.new_zeros((num_rows, weight.shape[1]))
    groups = _groups(group_offsets, num_rows)
    for is_own, matrix in zip(groups, weight.unbind(0), strict=True):
        product = (input.float() @ matrix.float().t()).to(input.dtype)
        out = torch.where(is_own, product, out)
    return out


def _reference_weight(
    grad: torch.Tensor, input: torch.Tensor, group_offsets: torch.Tensor
) -> torch.Tensor:
    # Zeros for other rows in both, as what they hold may be NaN.
    matrices = [
        torch.where(is_own, grad, 0).float().t() @ torch.where(is_own, input, 0).float()
        for is_own in _groups(group_offsets, input.shape[0])
    ]
    if not matrices:
        return input.new_zeros((0, grad.shape[1], input.shape[1]))
    return torch.stack(matrices).to(input.dtype)


def _gradient(backward: Backward) -> dict[str, torch.Tensor]:
    """Of input: each row by its group's matrix again, transposed."""
    (grad,), args, found = backward.grads, backward.args, {}
    assert grad is not None
    offsets = args["group_offsets"]
    if "input" in backward.wanted:
        found["input"] = _op(grad, args["weight"].transpose(1, 2), offsets)
    if "weight" in backward.wanted:
        found["weight"] = _weight(grad, args["input"], offsets)
    return found


def _gradient_weight(backward: Backward) -> dict[str, torch.Tensor]:
    """Products of rows by the gradient's matrices: linear in either operand."""
    (grad,), args, found = backward.grads, backward.args, {}
    assert grad is not None
    offsets = args["group_offsets"]
    if "grad" in backward.wanted:
        found["grad"] = _op(args["input"], grad, offsets)
    if "input" in backward.wanted:
        found["input"] = _op(args["grad"], grad.transpose(1, 2), offsets)
    return found


_op = Op(
    "grouped_matmul",
    "(Tensor input, Tensor weight, Tensor group_offsets) -> Tensor",
    _lower,
    _reference,
    autocast=autocast.like("input", "weight"),
    splits=sharding.Rule(
        {"input": "!rows !depth", "weight": "!groups columns !depth"},
        ("!rows columns",),
    ),
    gradient=Gradient(_gradient, keeps=("input", "weight", "group_offsets")),
)
_weight = Op(
    "grouped_matmul_backward_weight",
    "(Tensor grad, Tensor input, Tensor group_offsets) -> Tensor",
    _lower_weight,
    _reference_weight,
    autocast=autocast.like("input", "grad"),
    splits=sharding.Rule(
        {"grad": "!rows columns", "input": "!rows !depth"},
        ("!groups columns !depth",),
    ),
    gradient=Gradient(_gradient_weight, keeps=("grad", "input", "group_offsets")),
)
