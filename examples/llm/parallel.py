"""Tensor parallelism: one decoder over several devices.

SPDX-License-Identifier: Apache-2.0

Weights are split as Megatron (arXiv:1909.08053) splits them: the first product of each
pair by its columns, so by heads and by inner features, the second by its rows. A device
computes with its heads and features alone, and a layer adds up what the devices have
twice, by an all-reduce of the hidden state. Embedding and head are split by the
vocabulary, where the number of devices divides it, and whole on each device elsewhere.

Two ways (docs/several_gpus.md). torch_xla's SPMD has one process for all devices and
keeps the model's code that of one device: `Sharded` marks the tensors, and tells the
ops what lazy tensors do not say. Or each device has a process, which torchrun starts:
`Ranks` loads this process's part of the weights, and adds up where SPMD would.
"""

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch_xla.runtime as xr
from torch import nn
from torch_xla.distributed import spmd as xs

import xla_ops
from config import ModelConfig
from model import MLP, Attention, Decoder
from xla_ops.programs import processes
from xla_ops.programs.replay import replay

AXIS = "tp"
ROWS, COLUMNS = (AXIS, None), (None, AXIS)  # of weights [out, in]
# Of the modules that hold a split weight: how the weight lies, and its bias.
SPLITS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate", "up"), (ROWS, (AXIS,))),
    **dict.fromkeys(("o_proj", "down_proj"), (COLUMNS, (None,))),
    **dict.fromkeys(("embed_tokens", "lm_head"), (ROWS, (None,))),
}


class OneDevice:
    """No parallelism: what the others do, for one device.

    Attributes:
      size: how many devices work on the model.
      cache_parts: into how many parts a cache of this process is split.
    """

    size = 1
    cache_parts = 1

    def part_of_config(self, config: ModelConfig) -> ModelConfig:
        """The sizes of the part of the model that this process has."""
        return config

    def part_of_weight(
        self, name: str, weight: torch.Tensor, config: ModelConfig
    ) -> torch.Tensor:
        """This process's part of a weight, by its name in the checkpoint."""
        return weight

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

    def run(self, decoder: Decoder, *inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """A step's likeliest tokens, and its logits or this process's part of them."""
        logits = decoder(*inputs)
        return logits.argmax(dim=-1), logits

    def whole_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """All logits of a step, of the part that `run` returned."""
        return logits


def _check_divides(size: int, name: str, count: int) -> None:
    if count % size:
        raise ValueError(
            f"--tensor-parallel must divide {name} of config.json, {count}, got {size}"
        )


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
        _check_divides(size, "num_attention_heads", config.num_heads)
        _check_divides(size, "num_key_value_heads", config.num_kv_heads)
        _check_divides(size, "intermediate_size", config.intermediate_size)
        xr.use_spmd()
        found = xr.global_runtime_device_count()
        if found != size:
            raise ValueError(
                f"--tensor-parallel must be the number of devices, {found}, got {size}"
            )
        self.size = self.cache_parts = size
        self.mesh = xs.Mesh(np.arange(size), (size,), (AXIS,))

    def place(self, decoder: Decoder, device: torch.device) -> Decoder:
        embedding = SplitEmbedding(decoder.model.embed_tokens)
        decoder.model.embed_tokens = embedding  # type: ignore[assignment]
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


class SplitEmbedding(nn.Module):
    """An embedding whose rows are split over devices.

    XLA makes the lookup of one row a slice before it partitions, and a slice of what is
    split moves a part of the whole matrix to every device. So one row is two.
    """

    def __init__(self, whole: nn.Embedding):
        super().__init__()
        self.weight = whole.weight

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        if token_ids.shape[0] > 1:
            return F.embedding(token_ids, self.weight)
        two = torch.cat((token_ids, torch.zeros_like(token_ids)))
        return F.embedding(two, self.weight)[:1]


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


class Ranks(OneDevice):
    """A process a device: this one has a part of every weight and cache.

    Make it before the first XLA tensor, in each process that torchrun has started.
    Steps have to be replayed.

    Args:
      config: of the whole model.

    Raises:
      ValueError: the processes do not divide the heads or features; KV heads may be
        fewer than processes, which then have the same.
    """

    def __init__(self, config: ModelConfig):
        self.size = int(os.environ["WORLD_SIZE"])
        rank = int(os.environ["RANK"])
        _check_divides(self.size, "num_attention_heads", config.num_heads)
        if config.num_kv_heads < self.size and self.size % config.num_kv_heads == 0:
            self._kv_part = rank * config.num_kv_heads // self.size, config.num_kv_heads
        else:
            _check_divides(self.size, "num_key_value_heads", config.num_kv_heads)
            self._kv_part = rank, self.size
        _check_divides(self.size, "intermediate_size", config.intermediate_size)
        self._part = rank, self.size
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        world = dist.group.WORLD
        assert world is not None
        self.group = processes.join(world)
        # The first token of this process's part of the vocabulary, if it is split.
        self._first_token: int | None = None
        self._gathered = replay(self._gather)

    def part_of_config(self, config: ModelConfig) -> ModelConfig:
        return dataclasses.replace(
            config,
            num_heads=config.num_heads // self.size,
            num_kv_heads=config.num_kv_heads // self._kv_part[1],
            intermediate_size=config.intermediate_size // self.size,
            vocab_size=config.vocab_size // self._vocabulary_parts(config),
        )

    def _vocabulary_parts(self, config: ModelConfig) -> int:
        return 1 if config.vocab_size % self.size else self.size

    def part_of_weight(
        self, name: str, weight: torch.Tensor, config: ModelConfig
    ) -> torch.Tensor:
        *_, module, kind = name.split(".")
        part, dim = self._part, 0
        if module in ("k_proj", "v_proj"):
            part = self._kv_part
        elif module in ("o_proj", "down_proj"):
            dim = 1
        elif module in ("embed_tokens", "lm_head"):
            part = (part[0], self._vocabulary_parts(config))
        elif module not in ("q_proj", "gate_proj", "up_proj"):
            return weight
        index, count = part
        if count == 1 or (dim == 1 and kind == "bias"):
            return weight
        return weight.chunk(count, dim)[index].clone()

    def place(self, decoder: Decoder, device: torch.device) -> Decoder:
        config, body = decoder.config, decoder.model
        if decoder.ops.add_rms_norm is xla_ops.fused_add_rms_norm and not (
            config.o_bias or config.mlp_bias
        ):
            # The norm behind each of a layer's second products adds up what they give.
            decoder.ops = decoder.ops._replace(
                add_rms_norm=self.group.all_reduce_add_rms_norm
            )
        else:
            for module in decoder.modules():
                for name in ("o_proj", "down_proj"):
                    if isinstance(product := getattr(module, name, None), nn.Linear):
                        setattr(module, name, Summed(product, self.group))
        rows = body.embed_tokens.weight.shape[0]
        if rows < decoder.config.vocab_size:
            part = PartOfEmbedding(body.embed_tokens.weight, self.group)
            body.embed_tokens = part  # type: ignore[assignment]
            self._first_token = self.group.rank * rows
        return decoder.to(device)

    def run(self, decoder: Decoder, *inputs) -> tuple[torch.Tensor, torch.Tensor]:
        with self.group.in_order():
            logits = decoder(*inputs)
            return self._argmax(logits), logits

    def _argmax(self, logits: torch.Tensor) -> torch.Tensor:
        if self._first_token is None:
            return logits.argmax(dim=-1)
        # Of each process its best, not its logits: 8 bytes a row.
        best, token = logits.max(dim=-1)
        pair = torch.stack((best, (token + self._first_token).float()))  # exact to 2^24
        bests, tokens = self.group.all_gather(pair[None]).unbind(1)
        return tokens.gather(0, bests.argmax(dim=0)[None])[0].long()

    def whole_logits(self, logits: torch.Tensor) -> torch.Tensor:
        return logits if self._first_token is None else self._gathered(logits)

    def _gather(self, logits: torch.Tensor) -> torch.Tensor:
        with self.group.in_order():
            return self.group.all_gather(logits, -1)


class Summed(nn.Module):
    """A linear layer of which each process has some of the inputs."""

    def __init__(self, part: nn.Linear, group: processes.Group):
        super().__init__()
        self.weight, self.bias, self.group = part.weight, part.bias, group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = self.group.all_reduce(F.linear(x, self.weight))
        return total if self.bias is None else total + self.bias


class PartOfEmbedding(nn.Module):
    """An embedding of which each process has some of the tokens."""

    def __init__(self, weight: torch.Tensor, group: processes.Group):
        super().__init__()
        self.weight, self.group = weight, group

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        rows = self.weight.shape[0]
        own = token_ids - self.group.rank * rows
        is_own = (own >= 0) & (own < rows)
        part = F.embedding(own.clamp(0, rows - 1), self.weight)
        return self.group.all_reduce(torch.where(is_own[:, None], part, 0.0))
