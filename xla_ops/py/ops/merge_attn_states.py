"""Merges two attention results over disjoint keys."""

from __future__ import annotations

from ..core import autocast, mutable, sharding
from ..core.checks import Checker
from ..core.custom_call import CustomCall
from ..core.dtypes import FLOAT_DTYPES
from ..core.gradients import Gradient
from ..core.hlo import Spec
from ..core.lazy import torch
from ..core.op import Op
from . import merge_attn_states_backward

_check = Checker("merge_attn_states")


def merge_attn_states(
    prefix_output: torch.Tensor,
    prefix_lse: torch.Tensor,
    suffix_output: torch.Tensor,
    suffix_lse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merges attention over a prefix of the keys with attention over the rest.

    With m = max(p, s) of the two lse values of a token and head, the weights are
    exp(p - m) and exp(s - m) over their sum, output = T(prefix * wp + suffix * ws) and
    lse = log(sum) + m, in fp32 until T rounds to the dtype. An lse of +inf is taken as
    -inf, "no key seen"; where both are, output = prefix and lse = -inf. A side of
    weight zero adds nothing, even where it holds NaN. NaN in an lse gives NaN.

    vLLM's form, which writes into its first arguments, is
    `torch.ops.xla_ops.merge_attn_states(output, output_lse, prefix_output, prefix_lse,
    suffix_output, suffix_lse)`, where output_lse may be None.

    Differentiable in all arguments, through output and lse. An empty side gets zeros.

    Under torch.autocast, suffix_output is cast to prefix_output's dtype, and each lse
    to float32.

    Args:
        prefix_output, suffix_output: [num_tokens, num_heads, head_dim], float32,
            float16 or bfloat16, any head_dim.
        prefix_lse, suffix_lse: [num_heads, num_tokens], float32: the natural logarithm
            of the sum of exponentials of the scaled scores.

    Returns:
        output like prefix_output, and lse like prefix_lse.

    Raises:
        ValueError: an argument breaks one of the rules above.

    Source: section 2.2 of Ye et al., FlashInfer: Efficient and Customizable Attention
    Engine for LLM Inference Serving, 2025. Semantics: vLLM's `merge_attn_states`.
    """
    _check.tensor("prefix_output", prefix_output)
    _check.tensor("prefix_lse", prefix_lse)
    _check.tensor("suffix_output", suffix_output)
    _check.tensor("suffix_lse", suffix_lse)
    return _op(prefix_output, prefix_lse, suffix_output, suffix_lse)


def _lower(
    prefix_output: torch.Tensor,
    prefix_lse: torch.Tensor,
    suffix_output: torch.Tensor,
    suffix_lse: torch.Tensor,
) -> CustomCall:
    _check.dtype("prefix_output", prefix_output, FLOAT_DTYPES)
    _check.rank("prefix_output", prefix_output, "[num_tokens, num_heads, head_dim]")
    num_tokens, num_heads, _ = prefix_output.shape
    _check.dtype("prefix_lse", prefix_lse, [torch.float32])
    _check.shape("prefix_lse", prefix_lse, [num_heads, num_tokens])
    _check.dtype("suffix_output", suffix_output, [prefix_output.dtype])
    _check.shape("suffix_output", suffix_output, prefix_output.shape)
    _check.dtype("suffix_lse", suffix_lse, [torch.float32])
    _check.shape("suffix_lse", suffix_lse, [num_heads, num_tokens])
    operands = {
        "prefix_output": prefix_output,
        "prefix_lse": prefix_lse,
        "suffix_output": suffix_output,
        "suffix_lse": suffix_lse,
    }
    _check.same_device("prefix_output", prefix_output, **operands)
    return CustomCall(
        "xla_ops.merge_attn_states",
        tuple(operands),
        (Spec.of(prefix_output), Spec.of(prefix_lse)),
        may_overwrite={0: "prefix_output"},
    )


def _reference(
    prefix_output: torch.Tensor,
    prefix_lse: torch.Tensor,
    suffix_output: torch.Tensor,
    suffix_lse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    p, s = (
        torch.where(lse == torch.inf, -torch.inf, lse)
        for lse in (prefix_lse, suffix_lse)
    )
    empty = (p == -torch.inf) & (s == -torch.inf)
    # Zero in place of -inf keeps -inf - -inf from being NaN.
    largest = torch.where(empty, 0.0, torch.maximum(p, s))
    wp, ws = torch.exp(p - largest), torch.exp(s - largest)
    wp = torch.where(empty, 1.0, wp)
    total = wp + ws
    lse = torch.where(empty, -torch.inf, torch.log(total) + largest)
    output = _weighted(prefix_output, wp / total) + _weighted(suffix_output, ws / total)
    return output.to(prefix_output.dtype), lse


def _weighted(output: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    weight = weight.t().unsqueeze(-1)
    return torch.where(weight == 0, 0.0, output.float() * weight)


_autocast = autocast.like(
    "prefix_output", "suffix_output", scales=("prefix_lse", "suffix_lse")
)
_op = Op(
    "merge_attn_states",
    "(Tensor prefix_output, Tensor prefix_lse, Tensor suffix_output,"
    " Tensor suffix_lse) -> (Tensor, Tensor)",
    _lower,
    _reference,
    autocast=_autocast,
    splits=sharding.Rule(
        {
            "prefix_output": "tokens heads !head_dim",
            "prefix_lse": "heads tokens",
            "suffix_output": "tokens heads !head_dim",
            "suffix_lse": "heads tokens",
        },
        ("tokens heads !head_dim", "heads tokens"),
    ),
    gradient=Gradient(
        merge_attn_states_backward.gradients,
        keeps=merge_attn_states_backward.ARGUMENTS,
    ),
)

mutable.define(
    "merge_attn_states.out(Tensor(a!) output, Tensor(b!)? output_lse,"
    " Tensor prefix_output, Tensor prefix_lse, Tensor suffix_output,"
    " Tensor suffix_lse) -> ()",
    lambda output, output_lse, *args: mutable.Update(
        _op, args, {"output": output, "output_lse": output_lse}
    ),
    autocast=_autocast,
)
