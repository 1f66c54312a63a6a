"""How gradients are split over devices: as the results are that they belong to.

A gradient is computed by other ops, so it says nothing of how it is split. Without a
word the ops of a backward would have to refuse it, as they refuse all such operands.

Tested by tests/sharding/test_sharded_gradients.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from . import handlers, sharding
from .tracing import is_plain


def specs_of(tensors: Sequence[torch.Tensor]) -> tuple[str, ...]:
    """How tensors say that they are split, for `split_alike`; "" for nothing."""
    if not handlers.is_spmd() or not all(map(_is_lazy, tensors)):
        return ("",) * len(tensors)
    return sharding.given(tensors).specs


def split_alike(tensors: Iterable[torch.Tensor | None], specs: Sequence[str]) -> None:
    """Says of tensors that do not know it that they are split as others were."""
    import torch_xla

    for t, spec in zip(tensors, specs, strict=True):
        if t is None or not sharding.parse(spec) or not _is_lazy(t):
            continue
        how = sharding.split(sharding.parse(spec))
        unsaid = not sharding.given([t]).specs[0] and sharding.is_unsaid(t, "")
        if how is not None and unsaid:
            torch_xla._XLAC._xla_annotate_custom_sharding(t, sharding.op_sharding(how))


def _is_lazy(t: torch.Tensor) -> bool:
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(t)
    return t.device.type == "xla" and is_plain(t) and not wrapped
