"""vLLM's unquantised linear layers and output layer, as a custom call for few rows.

A decoding step has a row a request, and its products read each weight for those few:
`xla_ops.linear` is made for that. A prefill's rows are many, and XLA's own products
take them. Rows are known when a step is traced: a program has one or the other.

Tested by tests/engine/test_layers.py.
"""

from __future__ import annotations

import functools

import torch
from torch.nn import functional as F
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import (
    UnquantizedEmbeddingMethod,
)
from vllm.platforms import current_platform

from .. import ops
from .platform import is_gpu

# Up to how many rows the custom call takes less time than XLA's product, as measured
# (benchmarks/NOTES.md): on the CPU, and on a GPU of compute capability 9.0, where the
# layers of a step win and lose the same, so that it is used for none.
CPU_MAX_ROWS = {torch.float32: 128, torch.float16: 128, torch.bfloat16: 128}
HOPPER_MAX_ROWS = {torch.float16: 0, torch.bfloat16: 0}


@functools.cache
def _max_rows(dtype: torch.dtype) -> int:
    if not is_gpu():
        return CPU_MAX_ROWS.get(dtype, 0)
    capability = current_platform.get_device_capability()
    is_hopper = capability is not None and capability == (9, 0)
    return HOPPER_MAX_ROWS.get(dtype, 0) if is_hopper else 0


def _apply(
    self: UnquantizedLinearMethod | UnquantizedEmbeddingMethod,
    layer: torch.nn.Module,
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    weight: torch.Tensor = layer.weight.data  # type: ignore[assignment]
    num_rows = x.shape[:-1].numel()
    if num_rows > _max_rows(x.dtype) or weight.dtype != x.dtype:
        return F.linear(x, weight, bias)
    out = ops.linear(x.reshape(num_rows, x.shape[-1]), weight, bias)
    return out.view(*x.shape[:-1], out.shape[-1])


# The methods are no layers, and vLLM has no register_oot for them. Those of quantised
# layers are classes of their own.
UnquantizedLinearMethod.apply = _apply
UnquantizedEmbeddingMethod.apply = _apply
