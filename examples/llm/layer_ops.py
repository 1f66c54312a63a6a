"""The elementwise operations of a decoder layer, as custom calls or left to XLA.

SPDX-License-Identifier: Apache-2.0

Both sets compute the same, to the rounding: what a user of the ops takes out of a
model, and what is put in its place.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

import xla_ops


class LayerOps(NamedTuple):
    """The operations.

    Attributes:
      add_rms_norm: (x, residual, weight, eps) -> (norm of the sum, the sum).
      rotate: (positions, query, key, cos_sin_cache) -> (query, key), rotated;
        [num_tokens, heads, head_dim] each.
      silu_and_mul: [..., 2 * size] -> [..., size], the SwiGLU of two halves.
    """

    add_rms_norm: Callable
    rotate: Callable
    silu_and_mul: Callable


def _rotate_by_call(positions, query, key, cos_sin_cache):
    return xla_ops.rotary_embedding(
        positions, query, key, query.shape[-1], cos_sin_cache
    )


def _add_rms_norm(x, residual, weight, eps):
    total = x + residual
    return xla_ops.rms_norm(total, weight, eps), total


def _rotate(positions, query, key, cos_sin_cache):
    cos, sin = cos_sin_cache[positions][:, None].chunk(2, dim=-1)

    def one(x):
        first, second = x.chunk(2, dim=-1)
        pair = (first * cos - second * sin, second * cos + first * sin)
        return torch.cat(pair, dim=-1)

    return one(query), one(key)


def _silu_and_mul(x):
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


# By the value of --ops. RMSNorm, the cache write and the attention are custom calls in
# both: nothing else updates a cache in place.
LAYER_OPS = {
    "all": LayerOps(xla_ops.fused_add_rms_norm, _rotate_by_call, xla_ops.silu_and_mul),
    "attention": LayerOps(_add_rms_norm, _rotate, _silu_and_mul),
}
