"""The gradient of RMSNorm, which rms_norm and fused_add_rms_norm share."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from typing import Any

from ..core import autocast, handlers, sharding
from ..core.checks import Checker
from ..core.custom_call import CustomCall, OptionalOperand
from ..core.foreign import Foreign
from ..core.hlo import Spec
from ..core.lazy import torch
from ..core.op import Op

_check = Checker("rms_norm_backward")

# Parts of the weight's gradient on a device that shares the tokens with others, or
# whose kernel does not add them up, about: what it works on at once.
_NUM_PARTS = 480
# Of the sums of the CUDA kernel's blocks, which it then adds up to parts, elements
# that are enough for a large GPU to be full of blocks, and blocks of long rows.
_BLOCK_SUMS = 480 * 4096
_LONG_BLOCKS = 264


def gradients(
    grad: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor,
    added: torch.Tensor | None,
    eps: float,
    wanted: Container[str],
) -> dict[str, torch.Tensor]:
    """Returns the gradients of rms_norm's input and, if it is wanted, of its weight.

    Args:
        grad: of the result.
        input: as the forward took it, like weight and eps.
        added: a tensor like input that is added to input's gradient, or None.
        wanted: the arguments whose gradients are asked for.
    """
    if "weight" not in wanted:
        return {"input": _input(grad, input, weight, added, eps)}
    parts = _parts(input.shape[:-1], _adds_up(input))
    dx, sums = _both(grad, input, weight, added, eps, parts)
    # A sum of torch's: where tokens are split over devices, XLA adds theirs up.
    if math.prod(parts) == 1:
        sums = sums.reshape(weight.shape)
    else:
        sums = sums.sum(tuple(range(len(parts))))
    return {"input": dx, "weight": sums.to(weight.dtype)}


def _adds_up(input: torch.Tensor) -> bool:
    """Returns whether the kernel may add up all parts.

    CUDA's does, on one device: JAX may split any program over several.
    """
    is_cuda = handlers.platform_of(input.device) == handlers.CUDA
    return is_cuda and not handlers.is_spmd() and not isinstance(input, Foreign)


def _parts(leading: Sequence[int], one: bool) -> list[int]:
    """Returns how many parts each of a matrix' leading dimensions is cut into.

    One, or none of no rows, if `one`. Else all of the first few elements; beyond it
    numbers that 8 divides, if that many are needed, since the parts of a split
    dimension are shared out to its devices.
    """
    if one:
        return [min(size, 1) for size in leading]
    wanted = _NUM_PARTS * (sharding.num_devices() if handlers.is_spmd() else 1)
    parts: list[int] = []
    for size in leading:
        left = wanted / max(1, math.prod(parts))
        if not parts:
            count = wanted
        elif left >= 8:
            count = -8 * math.floor(-left / 8)
        else:
            count = 2 ** round(math.log2(max(1, left)))
        parts.append(min(size, count))
    return parts


def _check_rows(
    grad: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor,
    added: torch.Tensor | None,
    eps: float,
) -> None:
    _check.rows("input", input)
    _check.same_as("grad", grad, input)
    _check.dtype("weight", weight, [input.dtype])
    _check.shape("weight", weight, [input.shape[-1]])
    if added is not None:
        _check.same_as("added", added, input)
    _check.positive_finite("eps", eps)
    _check.same_device("input", input, grad=grad, weight=weight, added=added)


def _lower_input(
    grad: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor,
    added: torch.Tensor | None,
    eps: float,
) -> CustomCall:
    _check_rows(grad, input, weight, added, eps)
    return CustomCall(
        "xla_ops.rms_norm_backward_input",
        ("grad", "input", "weight", OptionalOperand("added", input.dtype)),
        (Spec.of(input),),
        {"eps": eps},
    )


def _lower_both(
    grad: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor,
    added: torch.Tensor | None,
    eps: float,
    parts: Sequence[int],
) -> CustomCall:
    _check_rows(grad, input, weight, added, eps)
    ok = len(parts) == input.dim() - 1
    _check.require(ok, "parts", f"have {input.dim() - 1} elements", list(parts))
    return CustomCall(
        "xla_ops.rms_norm_backward",
        ("grad", "input", "weight", OptionalOperand("added", input.dtype)),
        (Spec.of(input), Spec((*parts, input.shape[-1]), torch.float32)),
        {"eps": eps},
        scratch=(Spec((_num_blocks(input, parts), input.shape[-1]), torch.float32),),
    )


def _num_blocks(input: torch.Tensor, parts: Sequence[int]) -> int:
    """0 where a block has a part, and while a graph with symbolic sizes is traced."""
    sizes = (*input.shape, *parts)
    if handlers.platform_of(input.device) != handlers.CUDA:
        return 0
    if not all(isinstance(size, int) for size in sizes):
        return 0
    *leading, hidden = input.shape
    blocks = max(_BLOCK_SUMS // max(1, hidden), _LONG_BLOCKS)
    blocks = min(math.prod(leading), blocks)
    return blocks if blocks >= 2 * math.prod(parts) else 0


def _reference_both(
    grad: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor,
    added: torch.Tensor | None,
    eps: float,
    parts: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    x, g = input.float(), grad.float()
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    normed = x * scale
    weighted = g * weight.float()
    back = (weighted * normed).mean(-1, keepdim=True)
    dx = scale * (weighted - normed * back)
    if added is not None:
        dx = dx + added.float()
    hidden = input.shape[-1]
    total = (g * normed).reshape(-1, hidden).sum(0, keepdim=True)
    # The first part has all.
    rest = total.new_zeros(max(0, math.prod(parts) - 1), hidden)
    sums = torch.cat([total, rest])[: math.prod(parts)]
    return dx.to(input.dtype), sums.reshape(*parts, hidden)


def _reference_input(
    grad: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor,
    added: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    return _reference_both(grad, input, weight, added, eps, [1])[0]


def _localize(local: Mapping[str, Any], whole: Mapping[str, Any]) -> dict[str, Any]:
    sizes = zip(
        whole["parts"], local["input"].shape, whole["input"].shape, strict=False
    )
    return {"parts": [parts * part // size for parts, part, size in sizes]}


_ROWS = dict.fromkeys(("grad", "input", "added"), "... !hidden")
_OPERANDS = {**_ROWS, "weight": "!hidden"}
_autocast = autocast.like("input", "grad", "weight", "added")

_both = Op(
    "rms_norm_backward",
    "(Tensor grad, Tensor input, Tensor weight, Tensor? added, float eps,"
    " SymInt[] parts) -> (Tensor, Tensor)",
    _lower_both,
    _reference_both,
    autocast=_autocast,
    splits=sharding.Rule(_OPERANDS, ("... !hidden",) * 2, _localize),
)
_input = Op(
    "rms_norm_backward_input",
    "(Tensor grad, Tensor input, Tensor weight, Tensor? added, float eps) -> Tensor",
    _lower_input,
    _reference_input,
    autocast=_autocast,
    splits=sharding.Rule(_OPERANDS, ("... !hidden",)),
    public_name="rms_norm_backward",
)
