"""LoRA for vLLM's engine: adapters' matrices on the device, and their products.

vLLM's manager reads adapters, gives each a slot and writes its matrices into the LoRA
layers, `layer.lora_a_stacked[slot]`. Here these tensors are a stage: host memory for
one adapter, whatever the slot. From there it goes to the device as one vector, and one
program puts the parts into the slot of every layer's buffers, in place. The programs of
steps take the buffers as inputs, so that the next step has what was written.

A step says of each token which slot its adapter has. Rows are sorted by slot, and
`grouped_matmul` multiplies each run of rows by its adapter's matrices. So a step costs
the products of its tokens, whatever max_loras is, and reads no adapter but theirs.

Tested by tests/engine/test_lora.py and test_lora_models.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch_xla
from vllm.logger import init_logger
from vllm.lora.layers import (
    BaseLayerWithLoRA,
    VocabParallelEmbeddingWithLoRA,
)
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperABC
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.model_executor.layers.fused_moe.layer import FusedMoE
from vllm.v1.core import kv_cache_utils
from vllm.v1.request import Request
from vllm.v1.worker import lora_model_runner_mixin

try:
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.model_manager import LRUCacheLoRAModelManager
except ImportError:  # vLLM 0.12
    from vllm.lora.models import LoRAModel, LRUCacheLoRAModelManager

from ..core import in_place
from ..ops import grouped_matmul
from ..programs.replay import replay

logger = init_logger("vllm.xla_ops")


class Groups(NamedTuple):
    """Rows sorted by slot.

    Attributes:
        slots: [n] int32, each row's; -1 of one without an adapter.
        order: [n] int32, the row that comes first, second, ...
        places: [n] int32, where each row went: the inverse of `order`.
        offsets: [max_loras + 1] int32, where each slot's rows begin; behind them are
            the rows of no adapter.
    """

    slots: torch.Tensor
    order: torch.Tensor
    places: torch.Tensor
    offsets: torch.Tensor

    @staticmethod
    def of(slots: torch.Tensor, max_loras: int) -> Groups:
        """Sorts rows by their slots."""
        n, device = slots.shape[0], slots.device
        keys = torch.where(slots < 0, max_loras, slots)
        _, order = torch.sort(keys, stable=True)
        every = torch.arange(max_loras + 1, dtype=torch.int32, device=device)
        counting = torch.arange(n, dtype=order.dtype, device=device)
        places = torch.zeros_like(order).scatter(0, order, counting)
        # A cast: torch_xla aborts where index_select takes a result of sort as it is.
        return Groups(
            slots,
            order.to(torch.int32),
            places.to(torch.int32),
            (keys < every.unsqueeze(-1)).sum(-1, dtype=torch.int32),
        )


def add_products(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: Sequence[torch.Tensor],
    groups: Groups,
) -> torch.Tensor:
    """y + b[slot] @ a[slot] @ x, row by row; rows of no adapter are y's.

    Args:
        y: [n, out_features]; what the products lack of that is zero.
        x: [n, in_features].
        a: [max_loras, len(b) * max_rank, in_features]: A of each part of the layer.
        b: of each part [max_loras, its out_features, max_rank].
    """
    rows = x.to(a.dtype).index_select(0, groups.order)
    low = grouped_matmul(rows, a, groups.offsets)
    return _expand(y, low.chunk(len(b), -1), b, groups)


def _expand(
    y: torch.Tensor,
    low: Sequence[torch.Tensor],
    b: Sequence[torch.Tensor],
    groups: Groups,
) -> torch.Tensor:
    parts = [
        grouped_matmul(rows, matrices, groups.offsets)
        for rows, matrices in zip(low, b, strict=True)
    ]
    products = torch.cat(parts, -1) if len(parts) > 1 else parts[0]
    products = products.index_select(0, groups.places).to(y.dtype)
    # An output layer's rows are padded.
    padding = y.shape[-1] - products.shape[-1]
    return y + torch.nn.functional.pad(products, (0, padding))


class AdapterSlots:
    """The matrices of `max_loras` adapters on the device, and the stage on the host.

    Attributes:
        buffers: every tensor on the device.
    """

    def __init__(
        self,
        layers: Iterable[BaseLayerWithLoRA],
        max_loras: int,
        device: torch.device,
    ):
        self.max_loras = max_loras
        self._device = device
        self.buffers: list[torch.Tensor] = []
        # The stage, one adapter's, in the order in which it lies in the vector.
        self._staged: list[torch.Tensor] = []
        # By the id of the tensor that a layer holds.
        self._on_device: dict[int, torch.Tensor] = {}
        for layer in layers:
            self._add(layer)
        torch_xla.sync(wait=True)
        self._write = replay(self._put, state=self.buffers)
        self.write(0)  # compiles the program

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.buffers)

    def of(self, held: torch.Tensor) -> torch.Tensor:
        """What is on the device of a tensor that a layer holds."""
        return self._on_device[id(held)]

    def _add(self, layer: BaseLayerWithLoRA) -> None:
        a, b = _stacks(layer, "lora_a_stacked"), _stacks(layer, "lora_b_stacked")
        a_shape = (len(a) * a[0].shape[-2], a[0].shape[-1])
        a_buffer = self._buffer(a, a_shape)
        held = self._hold(layer, "lora_a_stacked", a)
        self._on_device[id(held[0])] = a_buffer
        buffers = [self._buffer([stack], stack.shape[-2:]) for stack in b]
        held = self._hold(layer, "lora_b_stacked", b)
        self._on_device.update(zip(map(id, held), buffers, strict=True))

    def _buffer(
        self, parts: Sequence[torch.Tensor], shape: tuple[int, ...]
    ) -> torch.Tensor:
        self._staged += parts
        buffer = torch.zeros(
            (self.max_loras, *shape), dtype=parts[0].dtype, device=self._device
        )
        self.buffers.append(buffer)
        return buffer

    def _hold(
        self, layer: BaseLayerWithLoRA, name: str, stacks: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Gives a layer its part of the stage, which is the same in every slot."""
        held = [t.expand(self.max_loras, *t.shape[1:]) for t in stacks]
        is_one = isinstance(getattr(layer, name), torch.Tensor)
        setattr(layer, name, held[0] if is_one else tuple(held))
        return held

    def write(self, slot: int) -> None:
        """Puts the adapter on the stage into a slot, behind the steps that are queued.

        One adapter's bytes go to the device, and nothing is compiled.
        """
        with torch.inference_mode(False), torch.no_grad():
            # The transfer may still read it when the stage gets the next adapter.
            vector = torch.cat([t.flatten() for t in self._staged])
            place = torch.tensor([slot], dtype=torch.int32)
            self._write(vector.to(self._device), place.to(self._device))

    def _put(self, vector: torch.Tensor, slot: torch.Tensor) -> None:
        every = torch.arange(self.max_loras, dtype=torch.int32, device=vector.device)
        is_slot = (every == slot).view(-1, 1, 1)
        sizes = [buffer.numel() // self.max_loras for buffer in self.buffers]
        for buffer, part in zip(self.buffers, vector.split(sizes), strict=True):
            new = torch.where(is_slot, part.view(1, *buffer.shape[1:]), buffer)
            in_place.overwrite(buffer, new)


def _stacks(layer: BaseLayerWithLoRA, name: str) -> list[torch.Tensor]:
    """A layer's tensors of one slot, one for each layer that it is packed of."""
    held = getattr(layer, name)
    return [held] if isinstance(held, torch.Tensor) else list(held)


class XlaPunicaWrapper(PunicaWrapperABC):
    """What vLLM's LoRA layers call. It returns sums and changes nothing in place."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.slots: AdapterSlots | None = None
        self._groups: Groups | None = None

    @contextlib.contextmanager
    def rows_of(self, slots: torch.Tensor | None) -> Iterator[None]:
        """While a program is traced: the slot of each row that layers are given.

        Args:
            slots: [n] int32, -1 of rows of no adapter; None where all rows are.
        """
        assert self.slots is not None
        if slots is not None:
            self._groups = Groups.of(slots, self.slots.max_loras)
        try:
            yield
        finally:
            self._groups = None

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: tuple[torch.Tensor, ...] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        assert scale == 1.0  # it is in B
        if self._groups is None:
            return y
        assert self.slots is not None
        a = self.slots.of(lora_a_stacked[0])
        b = [self.slots.of(held) for held in lora_b_stacked]
        return add_products(y, x, a, b, self._groups)

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        *,
        buffer: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        sizes = (y.shape[-1],)
        a, b = (lora_a_stacked,), (lora_b_stacked,)
        return self.add_lora_linear(y, x, a, b, scale, sizes)

    def add_embedding(
        self, y: torch.Tensor, x: torch.Tensor, layer: VocabParallelEmbeddingWithLoRA
    ) -> torch.Tensor:
        """What a layer's adapters add to the embeddings `y` of the tokens `x`."""
        if self._groups is None:
            return y
        assert self.slots is not None
        a = self.slots.of(layer.lora_a_stacked)
        b = self.slots.of(layer.lora_b_stacked)
        tokens = x.flatten() + self._groups.slots.clamp(min=0) * a.shape[1]
        low = torch.nn.functional.embedding(tokens, a.flatten(0, 1))
        low = low.index_select(0, self._groups.order)
        return _expand(y.flatten(0, -2), [low], [b], self._groups).view(y.shape)

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("slots go to the device with the step")

    def add_shrink(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("fully_sharded_loras is refused")

    add_expand = add_shrink

    def add_lora_embedding(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("the embedding layer calls add_embedding")


def _embed(self: VocabParallelEmbeddingWithLoRA, x: torch.Tensor) -> torch.Tensor:
    return self.punica_wrapper.add_embedding(self.base_layer(x), x, self)


# vLLM's would look the rows up in the stage.
VocabParallelEmbeddingWithLoRA.forward = _embed


class XlaLoRAModelManager(LRUCacheLoRAModelManager):
    """vLLM's, whose layers hold one adapter, and which writes it to the device."""

    _is_making_layers = False

    @property
    def lora_slots(self) -> int:
        return 1 if self._is_making_layers else self.lora_config.max_loras

    def _create_lora_modules(self) -> None:
        # Experts' products have no adapters here: one that brings some is refused.
        experts = {
            name.rpartition(".")[2]
            for name, module in self.model.named_modules()
            if isinstance(module, FusedMoE)
        }
        for name in experts:
            self.supported_lora_modules.remove(name)
        self._is_making_layers = True
        super()._create_lora_modules()
        self._is_making_layers = False

    def place(self, device: torch.device) -> None:
        """Makes the adapters' buffers on the device."""
        self.slots = AdapterSlots(self.modules.values(), self.lora_slots, device)
        self.punica_wrapper.slots = self.slots

    def slots_of(self, lora_ids: Sequence[int]) -> np.ndarray:
        """The slot of each adapter, [n] int32, and -1 of number 0, which is none."""
        ids = np.asarray(lora_ids)
        slots = np.full(ids.shape, -1, np.int32)
        for slot, lora_id in enumerate(self.lora_index_to_id):
            if lora_id is not None:
                slots[ids == lora_id] = slot
        assert ((slots >= 0) == (ids > 0)).all(), (ids, self.lora_index_to_id)
        return slots

    def activate_adapter(self, lora_id: int) -> bool:
        is_new = super().activate_adapter(lora_id)
        if is_new:
            self.slots.write(self.lora_index_to_id.index(lora_id))
        return is_new

    def make_room(self, needed: set[int]) -> None:
        """Sees to it that adapters which a step needs find a place beside each other.

        They are evicted last, and where all places are taken by pinned ones, those give
        way: vLLM's scheduler does not know of them.
        """
        for cache in (self._registered_adapters, self._active_adapters):
            for lora_id in needed:
                if lora_id in cache:
                    cache.touch(lora_id)
            pinned = [i for i in cache.order if i in cache.pinned_items - needed]
            excess = len(pinned) + len(needed) - int(cache.capacity)
            for lora_id in pinned[: max(excess, 0)]:
                logger.warning(
                    "LoRA %d is pinned no more: its place is needed", lora_id
                )
                cache.pinned_items.discard(lora_id)

    def check(self, lora: LoRAModel, path: str) -> None:
        """Raises ValueError where an adapter is not one of this model's."""
        shapes = {}
        for name, layer in self.modules.items():
            names = self.packed_modules.get(name, [name])
            a, b = _stacks(layer, "lora_a_stacked"), _stacks(layer, "lora_b_stacked")
            is_embedding = isinstance(layer, VocabParallelEmbeddingWithLoRA)
            inputs = a[0].shape[-2 if is_embedding else -1]
            for part, matrices in zip(names, b, strict=True):
                shapes[part] = (inputs, matrices.shape[-2])
        if not lora.loras:
            raise ValueError(
                f"xla_ops: an adapter must have matrices, got none in {path}"
            )
        for name, weights in lora.loras.items():
            if name not in shapes:
                raise ValueError(
                    "xla_ops: an adapter's modules must be the model's, got"
                    f" {name} in {path}"
                )
            rank, (inputs, outputs) = lora.rank, shapes[name]
            got = [
                None if t is None else tuple(t.shape)
                for t in (weights.lora_a, weights.lora_b)
            ]
            if got != [(rank, inputs), (outputs, rank)]:
                raise ValueError(
                    f"xla_ops: an adapter's {name} must have A of shape"
                    f" {[rank, inputs]} and B of {[outputs, rank]}, got"
                    f" {got[0]} and {got[1]} in {path}"
                )


class XlaWorkerLoRAManager(LRUCacheWorkerLoRAManager):
    """vLLM's, which looks at an adapter before it puts another one out for it."""

    _manager_cls = XlaLoRAModelManager

    def _load_adapter(self, lora_request: LoRARequest) -> LoRAModel:
        lora = super()._load_adapter(lora_request)
        self._adapter_manager.check(lora, lora_request.lora_path)
        return lora

    def _apply_adapters(self, lora_requests: set[LoRARequest]) -> None:
        self._adapter_manager.make_room(
            {request.lora_int_id for request in lora_requests if request}
        )
        super()._apply_adapters(lora_requests)

    def add_adapter(self, lora_request: LoRARequest) -> bool:
        if lora_request.lora_int_id not in self.list_adapters():
            self._adapter_manager.make_room({lora_request.lora_int_id})
        return super().add_adapter(lora_request)


def _keys_of_blocks(request: Request) -> list[str]:
    """What sets an adapter's cached prefixes apart: its number too.

    vLLM's name alone may have been another adapter's, before it was loaded anew.
    """
    lora = request.lora_request
    return [] if lora is None else [lora.lora_name, str(lora.lora_int_id)]


lora_model_runner_mixin.LRUCacheWorkerLoRAManager = XlaWorkerLoRAManager
kv_cache_utils._gen_lora_extra_hash_keys = _keys_of_blocks
