"""One decoder for Llama's family, with a paged KV cache, on xla_ops' ops.

SPDX-License-Identifier: Apache-2.0

All tokens of a step lie in one flat row, whatever sequence they belong to:
shape [num_tokens], not [batch, length]. `StepInputs` says which token belongs
where, so prefill, decode and a mix of both are the same function and differ in
shape alone. Module names are those of the checkpoints, so loading is a lookup;
gate_up_proj alone holds two of theirs (`PACKED`).
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import xla_ops
from config import ModelConfig, RopeConfig
from layer_ops import LAYER_OPS, LayerOps

Cache = tuple[torch.Tensor, torch.Tensor]

# Modules that hold several of a checkpoint's, one below the other.
PACKED = {"gate_up_proj": ("gate_proj", "up_proj")}


class StepInputs(NamedTuple):
    """What one step works on. Padding tokens have slot -1 and belong to no one.

    Attributes:
      token_ids: int32 [num_tokens].
      positions: int64 [num_tokens], the place of each token in its sequence.
      slot_mapping: int64 [num_tokens], where its key and value go in the cache:
        block * page_size + offset; -1 goes nowhere.
      block_tables: int32 [max_seqs, max_blocks], the blocks of each sequence.
      context_lens: int32 [max_seqs], tokens of each sequence in the cache,
        those of this step included.
      query_start_loc: int32 [max_seqs + 1], where each sequence's tokens begin.
      num_seqs: int32 [1], how many of the max_seqs rows are in use.
      last_token: int32 [max_seqs], index of each sequence's last token.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    block_tables: torch.Tensor
    context_lens: torch.Tensor
    query_start_loc: torch.Tensor
    num_seqs: torch.Tensor
    last_token: torch.Tensor


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return xla_ops.rms_norm(x, self.weight, self.eps)


def rope_frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """Inverse wavelengths, fp32 [head_dim / 2].

    RoFormer (arXiv:2104.09864); kind "llama3" is the long-context rescaling
    that Llama 3.1 was released with: long wavelengths are stretched by
    `factor`, short ones are kept, and those between are blended. "yarn"
    (arXiv:2309.00071) blends by the place in the vector instead.
    """
    steps = torch.arange(0, head_dim, 2, device="cpu").float() / head_dim
    freq = 1.0 / rope.theta**steps
    if rope.kind == "linear":
        return freq / rope.factor
    if rope.kind == "llama3":
        turns = rope.original_max_len * freq / (2 * math.pi)
        keep = (turns - rope.low_freq_factor) / (
            rope.high_freq_factor - rope.low_freq_factor
        )
        keep = keep.clamp(0.0, 1.0)
        return keep * freq + (1.0 - keep) * freq / rope.factor
    if rope.kind == "yarn":
        keep = 1.0 - _yarn_ramp(rope, head_dim)
        return keep * freq + (1.0 - keep) * freq / rope.factor
    return freq


def _yarn_ramp(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """0 where a wave turns over beta_fast times in the original length, 1 where less
    than beta_slow times, and between them a straight line."""

    def place(turns: float) -> float:
        scale = rope.original_max_len / (turns * 2 * math.pi)
        return head_dim * math.log(scale) / (2 * math.log(rope.theta))

    first, last = place(rope.beta_fast), place(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 0.001
    ramp = torch.arange(head_dim // 2, device="cpu").float() - first
    return (ramp / (last - first)).clamp(0.0, 1.0)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, ops: LayerOps):
        super().__init__()
        self.ops = ops
        self.head_dim = config.head_dim
        self.sliding_window = config.sliding_windows[layer]
        q_size = config.num_heads * config.head_dim
        kv_size = config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.o_proj: nn.Module = nn.Linear(
            q_size, config.hidden_size, bias=config.o_bias
        )
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def project(self, x, cos_sin_cache, positions) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values, [num_tokens, heads, head_dim] each."""
        heads = (x.shape[0], -1, self.head_dim)
        query = self.q_norm(self.q_proj(x).view(heads))
        key = self.k_norm(self.k_proj(x).view(heads))
        query, key = self.ops.rotate(positions, query, key, cos_sin_cache)
        return query, key, self.v_proj(x).view(heads)

    def forward(self, x, cos_sin_cache, cache: Cache, step: StepInputs) -> torch.Tensor:
        query, key, value = self.project(x, cos_sin_cache, step.positions)
        # Writes this step's keys and values into the cache, in place, before
        # they are read: a token sees itself.
        key_cache, value_cache = cache
        xla_ops.reshape_and_cache_flash(
            key, value, key_cache, value_cache, step.slot_mapping
        )
        out: torch.Tensor = xla_ops.paged_attention(  # type: ignore[assignment]
            query,
            (key_cache, value_cache),
            step.context_lens,
            step.block_tables,
            step.query_start_loc,
            step.num_seqs,
            self.head_dim**-0.5,
            self.sliding_window,
        )
        return self.o_proj(out.reshape(x.shape[0], -1))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig, ops: LayerOps):
        super().__init__()
        self.ops = ops
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_up_proj: nn.Module = nn.Linear(
            hidden, 2 * inner, bias=config.mlp_bias
        )
        self.down_proj: nn.Module = nn.Linear(inner, hidden, bias=config.mlp_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.ops.silu_and_mul(self.gate_up_proj(x)))


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, ops: LayerOps):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer, ops)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, ops)


class Body(nn.Module):
    """The model without its head."""

    layers: Iterable[Layer]

    def __init__(self, config: ModelConfig, ops: LayerOps):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(  # type: ignore[assignment]
            Layer(config, i, ops) for i in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Decoder(nn.Module):
    """The whole model.

    Args:
      config: what config.json says.
      max_len: positions to make rotary tables for.
      ops: "all" (custom calls wherever there is one) or "attention", see
        layer_ops.py.
    """

    cos_sin_cache: torch.Tensor

    def __init__(self, config: ModelConfig, max_len: int, ops: str = "all"):
        super().__init__()
        self.config = config
        self.ops = LAYER_OPS[ops]
        self.model = Body(config, self.ops)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        positions = torch.arange(max_len, device="cpu").float()
        angles = torch.outer(positions, rope_frequencies(config.rope, config.head_dim))
        # Row p: the cosines of position p, then its sines, [max_len, head_dim].
        table = torch.cat((angles.cos(), angles.sin()), dim=-1)
        table *= config.rope.attention_factor
        self.register_buffer("cos_sin_cache", table, persistent=False)

    def forward(self, step: StepInputs, caches: list[Cache]) -> torch.Tensor:
        """Runs one step and updates the caches in place.

        Args:
          step: the tokens and where they belong.
          caches: for each layer K and V, [num_blocks, page_size, num_kv_heads,
            head_dim] each.

        Returns:
          The next-token logits of each sequence, fp32 [max_seqs, vocab_size];
          rows from num_seqs on mean nothing.
        """
        x = self.model.embed_tokens(step.token_ids)
        # What a layer adds is added by the norm that comes next: `x` is the output of
        # the last block, `residual` the sum of those before it.
        residual: torch.Tensor | None = None
        for layer, cache in zip(self.model.layers, caches, strict=True):
            x, residual = self.add_norm(layer.input_layernorm, x, residual)
            x = layer.self_attn(x, self.cos_sin_cache, cache, step)
            x, residual = self.add_norm(layer.post_attention_layernorm, x, residual)
            x = layer.mlp(x)
        assert residual is not None  # there is a layer
        last = step.last_token
        x, _ = self.add_norm(self.model.norm, x[last], residual[last])
        return self.logits(x)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Of the last norm's result."""
        embedding = self.model.embed_tokens.weight
        head = embedding if self.config.tie_word_embeddings else self.lm_head.weight
        return F.linear(x, head).float()

    def add_norm(self, norm: RMSNorm, x: torch.Tensor, residual: torch.Tensor | None):
        """The norm of the sum, and the sum."""
        if residual is None:
            return norm(x), x
        return self.ops.add_rms_norm(x, residual, norm.weight, norm.eps)
