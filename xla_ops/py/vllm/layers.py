"""vLLM's layers that are a custom call here: norms, activations, rotary embedding.

vLLM asks a platform of another tree for `forward_oot`. Layers without one run as the
plain torch that vLLM has for them, which XLA fuses.

Tested by tests/engine/test_layers.py.
"""

from __future__ import annotations

import torch
from vllm.model_executor.layers import activation, layernorm
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

from .. import ops
from . import projection


@layernorm.RMSNorm.register_oot
class XlaRMSNorm(layernorm.RMSNorm):
    """Root mean square norm, with the residual's addition."""

    def forward_oot(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        if (
            self.variance_size_override is not None
            or not self.has_weight
            or self.weight.dtype != x.dtype
        ):
            return self.forward_native(x, residual)
        weight = self.weight.data
        if residual is None:
            out = ops.rms_norm(x, weight, self.variance_epsilon)
            projection.note_norm(out, x, weight, self.variance_epsilon)
            return out
        return ops.fused_add_rms_norm(x, residual, weight, self.variance_epsilon)


@activation.SiluAndMul.register_oot
class XlaSiluAndMul(activation.SiluAndMul):
    """silu(x) * y of the halves of a row."""

    def forward_oot(self, x: torch.Tensor) -> torch.Tensor:
        return ops.silu_and_mul(x)


@activation.MulAndSilu.register_oot
class XlaMulAndSilu(activation.MulAndSilu):
    """x * silu(y) of the halves of a row."""

    def forward_oot(self, x: torch.Tensor) -> torch.Tensor:
        return ops.mul_and_silu(x)


@activation.GeluAndMul.register_oot
class XlaGeluAndMul(activation.GeluAndMul):
    """gelu(x) * y of the halves of a row."""

    def forward_oot(self, x: torch.Tensor) -> torch.Tensor:
        if self.approximate == "tanh":
            return ops.gelu_tanh_and_mul(x)
        return ops.gelu_and_mul(x)


@activation.FatreluAndMul.register_oot
class XlaFatreluAndMul(activation.FatreluAndMul):
    """fatrelu(x) * y of the halves of a row."""

    def forward_oot(self, x: torch.Tensor) -> torch.Tensor:
        return ops.fatrelu_and_mul(x, self.threshold)


@activation.SwigluOAIAndMul.register_oot
class XlaSwigluOAIAndMul(activation.SwigluOAIAndMul):
    """The clamped SwiGLU of gpt-oss."""

    def forward_oot(self, x: torch.Tensor) -> torch.Tensor:
        return ops.swigluoai_and_mul(x, self.alpha, self.limit)


@activation.NewGELU.register_oot
class XlaNewGELU(activation.NewGELU):
    """GPT-2's GELU."""

    def forward_oot(self, x: torch.Tensor) -> torch.Tensor:
        return ops.gelu_new(x)


@activation.FastGELU.register_oot
class XlaFastGELU(activation.FastGELU):
    """GPT-2's GELU with fewer products."""

    def forward_oot(self, x: torch.Tensor) -> torch.Tensor:
        return ops.gelu_fast(x)


@activation.QuickGELU.register_oot
class XlaQuickGELU(activation.QuickGELU):
    """GELU by the logistic function."""

    def forward_oot(self, x: torch.Tensor) -> torch.Tensor:
        return ops.gelu_quick(x)


def _rotary(
    self: RotaryEmbedding,
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """forward_oot of rotary embeddings that differ in their table alone."""
    is_base = type(self).forward_cuda is RotaryEmbedding.forward_cuda
    if not is_base or key is None or self.cos_sin_cache.dtype != query.dtype:
        return self.forward_native(positions, query, key)
    how = (self.head_size, self.cos_sin_cache, self.is_neox_style)
    rotated = ops.rotary_embedding(positions, query, key, *how)
    projection.note_rotation(rotated, positions, query, key, *how)
    return rotated


# register_oot goes by the name of a class. The many that make another table (Llama 3,
# linear, YaRN, ...) are classes of their own and inherit this method.
RotaryEmbedding.forward_oot = _rotary
