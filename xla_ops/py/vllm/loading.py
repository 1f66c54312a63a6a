"""Moves a model that vLLM has loaded on the host to the device, tensor by tensor.

Each host tensor is let go once it is moved, so that the host holds what vLLM has read
and no more, and the device one copy of the weights. Dummy weights (load_format="dummy")
are made on the device.

Tested by tests/engine/test_loading.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch_xla
import torch_xla.core.xla_model as xm
from tqdm import tqdm
from vllm.attention.layer import Attention
from vllm.config import ModelConfig, VllmConfig
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

# How many bytes may be on their way to the device at once.
_IN_FLIGHT = 1 << 30
# vLLM's range of dummy weights.
_DUMMY = 1e-3

DUMMY_FORMAT = "xla_ops_dummy"


@register_model_loader(DUMMY_FORMAT)
class DeviceDummyLoader(DummyModelLoader):
    """Leaves weights as they are: `move` makes them on the device."""

    def load_weights(self, model: torch.nn.Module, model_config: ModelConfig) -> None:
        for module in model.modules():
            method = getattr(module, "quant_method", None)
            if (empty := getattr(method, "leave_empty", None)) is not None:
                empty(module)


def can_be_dummy(quant_config: object) -> bool:
    """Whether dummy weights of such a model can be made on the device."""
    return quant_config is None or getattr(quant_config, "quantises_on_load", False)


def move(model: torch.nn.Module, device: torch.device, *, dummy: bool = False) -> int:
    """Replaces every tensor of `model` by one on `device`.

    Parameters, buffers, and the tensors that modules and attention layers hold as plain
    attributes, such as scales. A tensor that is held twice is moved once.

    Args:
        dummy: whether parameters get small random numbers instead.

    Returns:
        The bytes moved.
    """
    mover = _Mover(device, dummy)
    modules = list(model.modules())
    for module in modules:
        if isinstance(module, RotaryEmbeddingBase):
            # Otherwise cast at each call, in the program.
            module.cos_sin_cache = module.cos_sin_cache.to(module.dtype)
    total = sum(
        t.numel() * t.element_size()
        for t in {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    )
    with tqdm(
        total=total, unit="B", unit_scale=True, desc="Moving weights", disable=None
    ) as bar:
        for module in modules:
            groups: list[dict[str, Any]] = [module._parameters, module._buffers]
            for held in groups:
                for name, tensor in held.items():
                    if tensor is not None:
                        held[name] = mover(tensor, bar)
            if not isinstance(module, BaseLayerWithLoRA):  # it holds lora.py's stage
                _move_attributes(module, mover, bar)
            if isinstance(module, Attention):
                _move_attributes(module.impl, mover, bar)
    torch_xla.sync(wait=True)
    xm.wait_device_ops()
    return mover.moved


def reloading(load_weights: Callable, config: VllmConfig) -> Callable:
    """`load_weights` of a model that was moved: writes each tensor to the device.

    Raises:
        NotImplementedError: weights are not as the checkpoint has them.
    """
    held = "quantised weights" if config.quant_config is not None else None
    if config.lora_config is not None:
        held = "layers with adapters"

    @functools.wraps(load_weights)
    def load(
        weights: Iterable[tuple[str, torch.Tensor]], *args: Any, **kwargs: Any
    ) -> Any:
        if held is not None:
            raise NotImplementedError(
                "xla_ops: load_weights must be of a model whose weights are as the"
                f" checkpoint has them on XLA, got {held}"
            )

        def each() -> Iterator[tuple[str, torch.Tensor]]:
            for weight in weights:
                yield weight
                # Else all copies wait, beside the weights that they are to replace.
                torch_xla.sync()

        with torch.inference_mode(False), torch.no_grad():
            loaded = load_weights(each(), *args, **kwargs)
            torch_xla.sync(wait=True)
        return loaded

    return load


def _dummy(like: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Random numbers: small ones, or codes of 8 bits, beside which scales are small."""
    if like.element_size() > 1:
        made = torch.empty(like.shape, dtype=like.dtype, device=device)
        return made.uniform_(-_DUMMY, _DUMMY)
    most = torch.finfo(like.dtype).max
    codes = torch.empty(like.shape, dtype=torch.bfloat16, device=device)
    return codes.uniform_(-most, most).to(like.dtype)


def _move_attributes(holder: object, mover: _Mover, bar: tqdm) -> None:
    for name, value in list(vars(holder).items()):
        if isinstance(value, torch.Tensor):
            # Not setattr: a module would make a parameter of it.
            vars(holder)[name] = mover(value, bar)


class _Mover:
    def __init__(self, device: torch.device, dummy: bool):
        self._device = device
        self._dummy = dummy
        self._in_flight = 0
        # Holds the originals, whose identity is the key.
        self._known: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.moved = 0

    def __call__(self, tensor: torch.Tensor, bar: tqdm) -> torch.Tensor:
        if tensor.device.type == "xla":
            return tensor
        if (known := self._known.get(id(tensor))) is not None:
            return known[1]
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        size = tensor.numel() * tensor.element_size()
        if self._dummy and is_parameter and tensor.is_floating_point():
            moved = _dummy(tensor, self._device)
            torch_xla.sync()
        else:
            moved = tensor.detach().to(self._device)
        if is_parameter:
            # Of its class, and with what vLLM's layers ask a weight for: load_weights
            # may be called again.
            moved = torch.Tensor._make_subclass(type(tensor), moved, False)
            vars(moved).update(vars(tensor))
        self._known[id(tensor)] = (tensor, moved)
        if is_parameter:
            tensor.data = torch.empty(0, dtype=tensor.dtype)  # lets its memory go
        self.moved += size
        self._in_flight += size
        if self._in_flight > _IN_FLIGHT:
            xm.wait_device_ops()
            self._in_flight = 0
        bar.update(size)
        return moved
