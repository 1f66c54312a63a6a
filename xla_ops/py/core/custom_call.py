"""Runs one custom call: as a node of the XLA graph, or at once on CPU and CUDA tensors."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from .. import _runtime
from . import handlers
from .dtypes import primitive_type
from .hlo import AttributeValue, Spec, encode_attributes, encode_module


@dataclass(frozen=True)
class CustomCall:
    """What a lowering says: which handler, on what, giving what.

    Attributes:
        target: name of the handler, such as "xla_ops.rms_norm".
        operands: tensors of one device, contiguous where that is not XLA. A Spec of no
            element stands for an operand that is absent; the first is a tensor.
        results: shape and dtype of each result.
        attributes: typed FFI attributes (int: i64, float: f32, bool, str).
        aliases: result index -> index of the operand that it updates.
        nothing_to_do: the call would leave its aliased results as they are (no
            token to write, say), so it need not run.
        may_overwrite: result index -> index of an operand in whose buffer the handler
            may also be asked to put the result: it reads each element before it
            writes it. XLA never asks; mutable fronts of CPU and CUDA tensors do.
        scratch: memory that the handler works in, as results after `results` that
            nobody gets to see.
    """

    target: str
    operands: tuple[torch.Tensor | Spec, ...]
    results: tuple[Spec, ...]
    attributes: Mapping[str, AttributeValue] = field(default_factory=dict)
    aliases: Mapping[int, int] = field(default_factory=dict)
    nothing_to_do: bool = False
    may_overwrite: Mapping[int, int] = field(default_factory=dict)
    scratch: tuple[Spec, ...] = ()

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The operands that are there."""
        return [t for t in self.operands if isinstance(t, torch.Tensor)]


def operand(t: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | Spec:
    """An operand as a call takes it; None, of that dtype, is an absent one."""
    return Spec((0,), dtype) if t is None else t.contiguous()


@functools.lru_cache(maxsize=4096)
def _computation(target, operands, results, backend_config, aliases, absent=()):
    """Returns the XLA computation of a signature.

    Attributes enter the key as encoded text: as Python values, 1, 1.0 and True would
    be one key, and so would 0.0 and -0.0.
    """
    import torch_xla.core.xla_builder as xb

    module = encode_module(
        target, operands, results, backend_config, dict(aliases), absent
    )
    return xb.computation_from_module_proto(target, module)


class Node(NamedTuple):
    """A call as a node of the lazy graph, but for its operands.

    Attributes:
        target: name of the handler.
        computation: XLA's computation of the call.
        num_results: how many results the caller sees.
    """

    target: str
    computation: object
    num_results: int

    def add(self, operands: list[torch.Tensor]) -> list[torch.Tensor]:
        """Adds the node to the graph of its operands, the absent ones left out."""
        import torch_xla

        results = torch_xla._XLAC._xla_user_computation(
            self.target.replace(".", "::"), operands, self.computation
        )
        return results[: self.num_results]


def node_of(call: CustomCall) -> Node:
    """Encodes the call."""
    computation = _computation(
        call.target,
        tuple(_spec(t) for t in call.operands),
        (*call.results, *call.scratch),
        encode_attributes(call.attributes),
        tuple(call.aliases.items()),
        tuple(i for i, t in enumerate(call.operands) if isinstance(t, Spec)),
    )
    return Node(call.target, computation, len(call.results))


def call_in_graph(call: CustomCall) -> list[torch.Tensor]:
    """Adds the call to the lazy graph of its XLA operands and returns its results."""
    return node_of(call).add(call.tensors)


def call_directly(
    call: CustomCall, into: Mapping[int, torch.Tensor] | None = None
) -> list[torch.Tensor]:
    """Runs the handler now, on CPU tensors or, on torch's stream, CUDA tensors.

    Args:
        into: result index -> contiguous tensor of its dtype and number of elements
            that takes the result; other results get new tensors.

    Returns:
        The results. An aliased one is the operand itself, updated in place.
    """
    device = call.operands[0].device
    into = into or {}
    results = []
    for i, spec in enumerate(call.results):
        if i in call.aliases:
            results.append(call.operands[call.aliases[i]])
        elif i in into:
            results.append(into[i])
        else:
            results.append(_new(spec, device))
    scratch = [_new(spec, device) for spec in call.scratch]
    if device.type == "cuda":
        platform = handlers.CUDA
        handlers.load(platform)
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream(device).cuda_stream
            _run(call, platform, stream, results + scratch)
    else:
        handlers.load(handlers.HOST)
        _run(call, handlers.HOST, 0, results + scratch)
    return results


def _run(call: CustomCall, platform: str, stream: int, results) -> None:
    specs = (*call.results, *call.scratch)
    _runtime.call(
        call.target,
        platform,
        stream,
        [_buffer(t, _spec(t)) for t in call.operands],
        [_buffer(t, spec) for t, spec in zip(results, specs, strict=True)],
        dict(call.attributes),
    )


def _buffer(t: torch.Tensor | Spec, spec: Spec) -> tuple[int, int, tuple[int, ...]]:
    address = 0 if isinstance(t, Spec) else t.data_ptr()
    return address, primitive_type(spec.dtype), tuple(spec.shape)


def _spec(t: torch.Tensor | Spec) -> Spec:
    return t if isinstance(t, Spec) else Spec.of(t)


def _new(spec: Spec, device: torch.device) -> torch.Tensor:
    return torch.empty(spec.shape, dtype=spec.dtype, device=device)
