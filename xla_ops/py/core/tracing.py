"""The graph that is being traced, if one is."""

from __future__ import annotations

import torch
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx.experimental import proxy_tensor


def node_of(t: torch.Tensor) -> torch.fx.Node | None:
    """Returns the node of `t`'s value in the graph being traced, if any."""
    if not isinstance(t, FunctionalTensor):
        return None
    mode = proxy_tensor.get_proxy_mode()
    if mode is None:
        return None
    slot = proxy_tensor.get_proxy_slot(
        torch._from_functional_tensor(t.elem), mode.tracer, None, lambda p: p.proxy
    )
    return None if slot is None else slot.node
