"""Products of groups of rows, each group with a matrix of its own."""

from __future__ import annotations

from ..core import autocast, sharding
from ..core.checks import Checker
from ..core.custom_call import CustomCall
from ..core.dtypes import FLOAT_DTYPES
from ..core.gradients import Backward, Gradient
from ..core.hlo import Spec
from ..core.lazy import torch
from ..core.op import Op

_check = Checker("grouped_matmul")


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

    Differentiable in input, by this op; weight has no gradient, and backward says so.

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


def _reference(
    input: torch.Tensor, weight: torch.Tensor, group_offsets: torch.Tensor
) -> torch.Tensor:
    # Every group over all rows, as no shape may depend on an offset's value.
    num_rows = input.shape[0]
    rows = torch.arange(num_rows, device=input.device).unsqueeze(-1)
    out = input.new_zeros((num_rows, weight.shape[1]))
    begin = group_offsets[0].clamp(0, num_rows)
    for group, matrix in enumerate(weight.unbind(0)):
        end = torch.maximum(group_offsets[group + 1].clamp(0, num_rows), begin)
        product = (input.float() @ matrix.float().t()).to(input.dtype)
        out = torch.where((rows >= begin) & (rows < end), product, out)
        begin = end
    return out


def _gradient(backward: Backward) -> dict[str, torch.Tensor]:
    """Of input: each row by its group's matrix again, transposed."""
    (grad,), args = backward.grads, backward.args
    assert grad is not None
    if "input" not in backward.wanted:
        return {}
    back = args["weight"].transpose(1, 2)
    return {"input": _op(grad, back, args["group_offsets"])}


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
    gradient=Gradient(_gradient, keeps=("weight", "group_offsets")),
)
