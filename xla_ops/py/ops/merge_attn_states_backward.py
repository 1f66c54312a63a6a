"""The gradients of merge_attn_states."""

from __future__ import annotations

from ..core import autocast, sharding
from ..core.checks import Checker
from ..core.custom_call import CustomCall, OptionalOperand
from ..core.dtypes import FLOAT_DTYPES
from ..core.gradients import Backward
from ..core.hlo import Spec
from ..core.lazy import torch
from ..core.op import Op

_check = Checker("merge_attn_states_backward")

ARGUMENTS = ("prefix_output", "prefix_lse", "suffix_output", "suffix_lse")


def gradients(backward: Backward) -> dict[str, torch.Tensor]:
    grad_output, grad_lse = backward.grads
    if grad_output is None:
        grad_output = backward.zeros("prefix_output")
    args = [backward.args[name] for name in ARGUMENTS]
    return dict(zip(ARGUMENTS, _op(grad_output, grad_lse, *args), strict=True))


def _lower(
    grad_output: torch.Tensor,
    grad_lse: torch.Tensor | None,
    prefix_output: torch.Tensor,
    prefix_lse: torch.Tensor,
    suffix_output: torch.Tensor,
    suffix_lse: torch.Tensor,
) -> CustomCall:
    _check.dtype("prefix_output", prefix_output, FLOAT_DTYPES)
    _check.rank("prefix_output", prefix_output, "[num_tokens, num_heads, head_dim]")
    num_tokens, num_heads, _ = prefix_output.shape
    _check.same_as("grad_output", grad_output, prefix_output)
    operands = {
        "grad_lse": grad_lse,
        "prefix_lse": prefix_lse,
        "suffix_output": suffix_output,
        "suffix_lse": suffix_lse,
    }
    for name, t in operands.items():
        if t is None:
            continue
        if name == "suffix_output":
            _check.same_as(name, t, prefix_output)
        else:
            _check.dtype(name, t, [torch.float32])
            _check.shape(name, t, [num_heads, num_tokens])
    _check.same_device(
        "prefix_output", prefix_output, grad_output=grad_output, **operands
    )
    output, lse = Spec.of(prefix_output), Spec.of(prefix_lse)
    return CustomCall(
        "xla_ops.merge_attn_states_backward",
        ("grad_output", OptionalOperand("grad_lse", torch.float32), *ARGUMENTS),
        (output, lse, output, lse),
    )


def _reference(
    grad_output: torch.Tensor,
    grad_lse: torch.Tensor | None,
    prefix_output: torch.Tensor,
    prefix_lse: torch.Tensor,
    suffix_output: torch.Tensor,
    suffix_lse: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    p, s = (
        torch.where(lse == torch.inf, -torch.inf, lse)
        for lse in (prefix_lse, suffix_lse)
    )
    empty = (p == -torch.inf) & (s == -torch.inf)
    # Zero in place of -inf keeps -inf - -inf from being NaN.
    largest = torch.where(empty, 0.0, torch.maximum(p, s))
    wp, ws = torch.exp(p - largest), torch.exp(s - largest)
    wp = torch.where(empty, 1.0, wp)
    wp, ws = wp / (wp + ws), ws / (wp + ws)
    g = grad_output.float()
    dprefix, dsuffix = (
        torch.where(w.t().unsqueeze(-1) == 0, 0.0, w.t().unsqueeze(-1) * g)
        for w in (wp, ws)
    )
    change = (g * (prefix_output.float() - suffix_output.float())).sum(-1).t()
    shift = torch.where(wp * ws == 0, 0.0, wp * ws * change)
    lse = torch.zeros_like(p) if grad_lse is None else grad_lse
    lse = torch.where(empty, 0.0, lse)
    dtype = prefix_output.dtype
    dlse = (shift + wp * lse, ws * lse - shift)
    return dprefix.to(dtype), dlse[0], dsuffix.to(dtype), dlse[1]


_OUTPUT, _LSE = "tokens heads !head_dim", "heads tokens"
_op = Op(
    "merge_attn_states_backward",
    "(Tensor grad_output, Tensor? grad_lse, Tensor prefix_output, Tensor prefix_lse,"
    " Tensor suffix_output, Tensor suffix_lse) -> (Tensor, Tensor, Tensor, Tensor)",
    _lower,
    _reference,
    autocast=autocast.like(
        "prefix_output",
        "grad_output",
        "suffix_output",
        scales=("grad_lse", "prefix_lse", "suffix_lse"),
    ),
    splits=sharding.Rule(
        {
            "grad_output": _OUTPUT,
            "grad_lse": _LSE,
            "prefix_output": _OUTPUT,
            "prefix_lse": _LSE,
            "suffix_output": _OUTPUT,
            "suffix_lse": _LSE,
        },
        (_OUTPUT, _LSE) * 2,
    ),
)
