"""One decoder for Llama and Qwen3, with a paged KV cache, on xla_ops' ops.

SPDX-License-Identifier: Apache-2.0

All tokens of a step lie in one flat row, whatever sequence they belong to:
shape [num_tokens], not [batch, length]. `StepInputs` says which token belongs
where, so prefill, decode and a mix of both are the same function and differ in
shape alone. Module names are those of the checkpoints, so loading is a lookup.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import xla_ops
from config import ModelConfig, RopeConfig

Cache = tuple[torch.Tensor, torch.Tensor]


class StepInputs(NamedTuple):
    """What one step works on. Padding tokens have slot -1 and belong to no one.

    Attributes:
      token_ids: int32 [num_tokens].
      positions: int32 [num_tokens], the place of each token in its sequence.
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
    `factor`, short ones are kept, and those between are blended.
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
    return freq


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the halves of each head; x [T, heads, D], cos and sin [T, 1, D]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.head_dim = config.head_dim
        self.sliding_window = config.sliding_windows[layer]
        q_size = config.num_heads * config.head_dim
        kv_size = config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=config.o_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def forward(self, x, cos, sin, cache: Cache, step: StepInputs) -> torch.Tensor:
        num_tokens = x.shape[0]
        heads = (num_tokens, -1, self.head_dim)
        query = rotate(self.q_norm(self.q_proj(x).view(heads)), cos, sin)
        key = rotate(self.k_norm(self.k_proj(x).view(heads)), cos, sin)
        value = self.v_proj(x).view(heads)
        # Writes this step's keys and values into the cache, in place, before
        # they are read: a token sees itself.
        key_cache, value_cache = cache
        xla_ops.reshape_and_cache_flash(
            key, value, key_cache, value_cache, step.slot_mapping
        )
        out = xla_ops.paged_attention(
            query,
            (key_cache, value_cache),
            step.context_lens,
            step.block_tables,
            step.query_start_loc,
            step.num_seqs,
            self.head_dim**-0.5,
            self.sliding_window,
        )
        return self.o_proj(out.reshape(num_tokens, -1))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        sizes = (config.hidden_size, config.intermediate_size)
        self.gate_proj = nn.Linear(*sizes, bias=config.mlp_bias)
        self.up_proj = nn.Linear(*sizes, bias=config.mlp_bias)
        self.down_proj = nn.Linear(*reversed(sizes), bias=config.mlp_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, cache: Cache, step: StepInputs) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache, step)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """The whole model.

    Args:
      config: what config.json says.
      max_len: positions to make rotary tables for.
    """

    def __init__(self, config: ModelConfig, max_len: int):
        super().__init__()
        self.config = config
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(
            Layer(config, i) for i in range(config.num_layers)
        )
        self.model.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        positions = torch.arange(max_len, device="cpu").float()
        angles = torch.outer(positions, rope_frequencies(config.rope, config.head_dim))
        angles = torch.cat((angles, angles), dim=-1)[:, None]  # [max_len, 1, D]
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

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
        cos = self.cos[step.positions].to(x.dtype)
        sin = self.sin[step.positions].to(x.dtype)
        for layer, cache in zip(self.model.layers, caches, strict=True):
            x = layer(x, cos, sin, cache, step)
        x = self.model.norm(x[step.last_token])
        embedding = self.model.embed_tokens.weight
        head = embedding if self.config.tie_word_embeddings else self.lm_head.weight
        return F.linear(x, head).float()
