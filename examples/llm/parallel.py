"""Tensor parallelism: one decoder over several devices of this process.

SPDX-License-Identifier: Apache-2.0

Weights are split as Megatron (arXiv:1909.08053) splits them: the first product of each
pair by its columns, so by heads and by inner features, the second by its rows. A device
computes with its heads and features alone, and a layer adds up what the devices have
twice, by an all-reduce of the hidden state. Embedding and head are split by the
vocabulary, where the number of devices divides it, and whole on each device elsewhere.
torch_xla's SPMD keeps the model's code that of one device: `Sharded` marks the tensors,
and tells the ops what lazy tensors do not say (docs/several_gpus.md).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
import torch_xla.runtime as xr
from torch import nn
from torch_xla.distributed import spmd as xs

import xla_ops
from config import ModelConfig
from model import MLP, Attention, Decoder

AXIS = "tp"
ROWS, COLUMNS = (AXIS, None), (None, AXIS)  # of weights [out, in]
# Of the modules that hold a split weight: how the weight lies, and its bias.
SPLITS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate", "up"), (ROWS, (AXIS,))),
    **dict.fromkeys(("o_proj", "down_proj"), (COLUMNS, (None,))),
    **dict.fromkeys(("embed_tokens", "lm_head"), (ROWS, (None,))),
}


class OneDevice:
    """No parallelism: what `Sharded` does, for one device."""

    size = 1

    def place(self, decoder: Decoder, device: torch.device) -> Decoder:
        """Moves the weights to the device."""
        return decoder.to(device)

    def place_cache(self, cache: torch.Tensor) -> torch.Tensor:
        """Says how a new cache [blocks, page_size, heads, head_dim] lies."""
        return cache

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around each step."""
        yield


class Sharded(OneDevice):
    """All devices of this process, each with a part of every weight and cache.

    Make it before the first XLA tensor.

    Args:
      size: how many devices.
      config: of the model that is to be split.

    Raises:
      ValueError: there is another number of devices, or it does not divide the heads
        or features.
    """

    def __init__(self, size: int, config: ModelConfig):
        for name, count in (
            ("num_attention_heads", config.num_heads),
            ("num_key_value_heads", config.num_kv_heads),
            ("intermediate_size", config.intermediate_size),
        ):
            if count % size:
                raise ValueError(
                    f"--tensor-parallel must divide {name} of config.json, {count}, "
                    f"got {size}"
                )
        xr.use_spmd()
        found = xr.global_runtime_device_count()
        if found != size:
            raise ValueError(
                f"--tensor-parallel must be the number of devices, {found}, got {size}"
            )
        self.size = size
        self.mesh = xs.Mesh(np.arange(size), (size,), (AXIS,))

    def place(self, decoder: Decoder, device: torch.device) -> Decoder:
        for module in decoder.modules():
            if isinstance(module, MLP):
                packed = module.gate_up_proj
                assert isinstance(packed, nn.Linear)
                module.gate_up_proj = GateAndUp(packed)
                module.ops = module.ops._replace(silu_and_mul=_gated)
            elif isinstance(module, Attention):
                # Which rows of [tokens, heads, head_dim] are whose, the op cannot be
                # told: they are split in the second dimension.
                for name in ("q_norm", "k_norm"):
                    if not isinstance(norm := getattr(module, name), nn.Identity):
                        setattr(module, name, HeadNorm(norm.weight, norm.eps))
        for path, module in decoder.named_modules():
            weight, bias = SPLITS.get(path.rpartition(".")[2], (None, None))
            # One by one: until it is marked, a tensor is on the host.
            for name, parameter in module.named_parameters(recurse=False):
                spec = {"weight": weight, "bias": bias}.get(name)
                moved = self._mark(parameter.detach().to(device), spec)
                setattr(module, name, nn.Parameter(moved, requires_grad=False))
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, self._mark(buffer.to(device), None))
        return decoder

    def _mark(self, tensor: torch.Tensor, spec: tuple | None) -> torch.Tensor:
        whole = (None,) * tensor.dim()
        pairs = zip(tensor.shape, spec or whole, strict=True)
        if any(axis and size % self.size for size, axis in pairs):
            spec = None
        xs.mark_sharding(tensor, self.mesh, spec or whole)
        return tensor

    def place_cache(self, cache: torch.Tensor) -> torch.Tensor:
        return self._mark(cache, (None, None, AXIS, None))

    @contextmanager
    def step(self) -> Iterator[None]:
        with xla_ops.sharding(self.mesh, tokens=None, heads=AXIS, columns=AXIS):
            yield


class GateAndUp(nn.Module):
    """The two halves of a packed product apart: each device has rows of both."""

    def __init__(self, packed: nn.Linear):
        super().__init__()
        self.gate, self.up = (nn.Linear(1, 1, device="meta") for _ in "gu")
        for name, both in packed.named_parameters():
            for half, values in zip((self.gate, self.up), both.chunk(2), strict=True):
                setattr(half, name, nn.Parameter(values, requires_grad=False))
        if packed.bias is None:
            self.gate.bias = self.up.bias = None

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.gate(x), self.up(x)


def _gated(gate_and_up: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    gate, up = gate_and_up
    return F.silu(gate) * up


class HeadNorm(nn.Module):
    """RMSNorm over the last dimension, left to XLA."""

    def __init__(self, weight: nn.Parameter, eps: float):
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        exact = x.float()
        scale = torch.rsqrt(exact.square().mean(-1, keepdim=True) + self.eps)
        return (exact * scale * self.weight.float()).to(x.dtype)
