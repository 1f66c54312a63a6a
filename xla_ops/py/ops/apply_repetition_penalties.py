"""Repetition penalties on the logits of a batch, in place."""

from __future__ import annotations

from ..core import autocast, front, in_place, sharding
from ..core.checks import Checker
from ..core.custom_call import CustomCall
from ..core.dtypes import FLOAT_DTYPES
from ..core.foreign import Foreign
from ..core.hlo import Spec
from ..core.lazy import torch
from ..core.op import NAMESPACE, Op

_check = Checker("apply_repetition_penalties_")


def apply_repetition_penalties_(
    logits: torch.Tensor,
    prompt_mask: torch.Tensor,
    output_mask: torch.Tensor,
    repetition_penalties: torch.Tensor,
) -> None:
    """Makes tokens that a sequence already has less likely, in place.

    Where prompt_mask or output_mask is true, a logit x of sequence s becomes T(x / p)
    if it is above 0 and T(x * p) otherwise, with p = repetition_penalties[s]; computed
    in fp32, T rounds to the dtype. NaN stays NaN; other logits stay.

    In place: lazily, under torch.compile(backend="openxla"), and through views.

    Under torch.autocast, repetition_penalties are cast to logits' dtype.

    Args:
        logits: [num_seqs, vocab_size], float32, float16 or bfloat16.
        prompt_mask, output_mask: the same shape, bool: which tokens are in a sequence's
            prompt and in what was generated.
        repetition_penalties: [num_seqs], logits' dtype.

    Raises:
        ValueError: an argument breaks one of the rules above.

    Source: Keskar et al., CTRL: A Conditional Transformer Language Model for
    Controllable Generation, 2019. Semantics: vLLM's `apply_repetition_penalties_`.

    Example:
        >>> logits = torch.tensor([[3.0, -3.0, 1.0]])
        >>> prompt, output = torch.tensor([[[True, True, False]], [[False] * 3]])
        >>> apply_repetition_penalties_(logits, prompt, output, torch.tensor([2.0]))
        >>> logits
        tensor([[ 1.5000, -6.0000,  1.0000]])
    """
    for name, t in (
        ("logits", logits),
        ("prompt_mask", prompt_mask),
        ("output_mask", output_mask),
        ("repetition_penalties", repetition_penalties),
    ):
        _check.tensor(name, t)
    is_foreign = isinstance(logits, Foreign)
    op = _front if is_foreign else torch.ops.xla_ops.apply_repetition_penalties_
    op(logits, prompt_mask, output_mask, repetition_penalties)


def _front(logits: torch.Tensor, *rest: torch.Tensor) -> None:
    _lower(logits, *rest)  # the checks, before a buffer is touched
    if not logits.numel():
        return
    in_place.check_writable(_check.op, {"logits": (logits, in_place.locate(logits))})
    if in_place.is_value(logits):
        in_place.update(_op, logits, *rest)
    else:
        _op.update_at_once(logits, *rest, None)


def _lower(
    logits: torch.Tensor,
    prompt_mask: torch.Tensor,
    output_mask: torch.Tensor,
    repetition_penalties: torch.Tensor,
) -> CustomCall:
    _check.dtype("logits", logits, FLOAT_DTYPES)
    _check.rank("logits", logits, "[num_seqs, vocab_size]")
    for name, mask in (("prompt_mask", prompt_mask), ("output_mask", output_mask)):
        _check.dtype(name, mask, [torch.bool])
        _check.shape(name, mask, logits.shape)
    _check.dtype("repetition_penalties", repetition_penalties, [logits.dtype])
    _check.shape("repetition_penalties", repetition_penalties, logits.shape[:1])
    _check.same_device(
        "logits",
        logits,
        prompt_mask=prompt_mask,
        output_mask=output_mask,
        repetition_penalties=repetition_penalties,
    )
    return CustomCall(
        "xla_ops.apply_repetition_penalties",
        ("logits", "prompt_mask", "output_mask", "repetition_penalties"),
        (Spec.of(logits),),
        aliases={0: "logits"},
        nothing_to_do=logits.numel() == 0,
    )


def _reference(
    logits: torch.Tensor,
    prompt_mask: torch.Tensor,
    output_mask: torch.Tensor,
    repetition_penalties: torch.Tensor,
) -> torch.Tensor:
    x, p = logits.float(), repetition_penalties.float()[:, None]
    penalised = torch.where(x > 0, x / p, x * p).to(logits.dtype)
    return torch.where(prompt_mask | output_mask, penalised, logits)


_autocast = autocast.like("logits", "repetition_penalties")
_op = Op(
    "apply_repetition_penalties_functional",
    "(Tensor logits, Tensor prompt_mask, Tensor output_mask,"
    " Tensor repetition_penalties, Tensor? donor) -> Tensor",
    _lower,
    _reference,
    autocast=_autocast,
    splits=sharding.Rule(
        {
            "logits": "tokens columns",
            "prompt_mask": "tokens columns",
            "output_mask": "tokens columns",
            "repetition_penalties": "tokens",
        },
        ("tokens columns",),
    ),
    public_name="apply_repetition_penalties_",
)

front.define(
    NAMESPACE,
    "apply_repetition_penalties_(Tensor(a!) logits, Tensor prompt_mask,"
    " Tensor output_mask, Tensor repetition_penalties) -> ()",
    _front,
    autocast=_autocast,
)
