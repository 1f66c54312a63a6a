"""One custom call: what a lowering says of it, and the two ways to run it: as a node of
the XLA graph, or at once on CPU and CUDA tensors."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .. import _runtime
from . import handlers, sharding
from .dtypes import primitive_type
from .hlo import (
    AttributeValue,
    ShardedArray,
    Spec,
    Split,
    encode_attributes,
    encode_module,
    encode_sharded_module,
)
from .lazy import torch


class OptionalOperand(NamedTuple):
    """An operand that a caller may leave out: absent, it has no element.

    Attributes:
        name: of the op's argument.
        dtype: of the operand where it is absent.
    """

    name: str
    dtype: torch.dtype


@dataclass(frozen=True)
class CustomCall:
    """What a lowering says: which handler, on what, giving what.

    It holds no tensor, only names of the op's arguments, so that one lowering serves
    every call of a signature.

    Attributes:
        target: name of the handler, such as "xla_ops.rms_norm".
        operands: in the handler's order, the op's arguments that it takes. The first is
            always there.
        results: shape and dtype of each result.
        attributes: typed FFI attributes (int: i64, float: f32, bool, str).
        aliases: result index -> the operand that it updates. Its tensor is a dense
            buffer.
        nothing_to_do: the call would leave its aliased results as they are (no
            token to write, say), so it need not run.
        may_overwrite: result index -> an operand in whose buffer the handler may also
            be asked to put the result: it reads each element before it writes it. XLA
            never asks; mutable fronts of CPU and CUDA tensors do.
        scratch: memory that the handler works in, as results after `results` that
            nobody gets to see.
    """

    target: str
    operands: tuple[str | OptionalOperand, ...]
    results: tuple[Spec, ...]
    attributes: Mapping[str, AttributeValue] = field(default_factory=dict)
    aliases: Mapping[int, str] = field(default_factory=dict)
    nothing_to_do: bool = False
    may_overwrite: Mapping[int, str] = field(default_factory=dict)
    scratch: tuple[Spec, ...] = ()

    def __post_init__(self) -> None:
        known = self.names
        for name in (*self.aliases.values(), *self.may_overwrite.values()):
            if name not in known:
                raise ValueError(
                    f"{self.target}: aliases and may_overwrite must name operands,"
                    f" got {name!r}"
                )

    @property
    def names(self) -> tuple[str, ...]:
        """The operands' names."""
        return tuple(o if isinstance(o, str) else o.name for o in self.operands)

    def bind(self, arguments: Mapping[str, object]) -> BoundCall:
        """Joins the call with an op's arguments by name.

        Raises:
            TypeError: an operand's argument is no tensor, and not None where it may be
                absent.
        """
        updated = set(self.aliases.values())
        operands: list[torch.Tensor | Spec] = []
        for operand in self.operands:
            name = operand if isinstance(operand, str) else operand.name
            value = arguments[name]
            if isinstance(value, torch.Tensor):
                # A copy of an operand that is updated would take the update.
                operands.append(value if name in updated else value.contiguous())
            elif value is None and isinstance(operand, OptionalOperand):
                operands.append(Spec((0,), operand.dtype))
            else:
                kind = type(value).__name__
                raise TypeError(f"{self.target}: {name} must be a tensor, got {kind}")
        return BoundCall(self, tuple(operands))

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to compute: no result, or no token to write."""
        return self.nothing_to_do or all(0 in spec.shape for spec in self.results)


class BoundCall(NamedTuple):
    """A call with its operands; a Spec of no element stands for an absent one."""

    call: CustomCall
    operands: tuple[torch.Tensor | Spec, ...]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The operands that are there."""
        return [t for t in self.operands if isinstance(t, torch.Tensor)]

    def operand(self, name: str) -> torch.Tensor:
        """The tensor of the operand `name`, which is there."""
        found = self.operands[self.call.names.index(name)]
        assert isinstance(found, torch.Tensor), name
        return found

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    def untouched(self, *, copy: bool = True) -> list[torch.Tensor]:
        """The results of an empty call: what is updated, as it was, or a copy of it."""
        aliases = self.call.aliases
        olds = {i: self.operand(name) for i, name in aliases.items()}
        return [
            self.new(spec) if i not in olds else olds[i].clone() if copy else olds[i]
            for i, spec in enumerate(self.call.results)
        ]

    def new(self, spec: Spec) -> torch.Tensor:
        """A new tensor on the operands' device, fake where they are."""
        return self.tensors[0].new_empty(spec.shape, dtype=spec.dtype)


@functools.lru_cache(maxsize=4096)
def _computation(
    target: str,
    operands: tuple[Spec, ...],
    results: tuple[Spec, ...],
    backend_config: str,
    aliases: tuple[tuple[int, int], ...],
    absent: tuple[int, ...] = (),
) -> object:
    """Returns the XLA computation of a signature.

    Attributes enter the key as encoded text: as Python values, 1, 1.0 and True would
    be one key, and so would 0.0 and -0.0.
    """
    import torch_xla.core.xla_builder as xb

    from . import extraction

    extraction.install()  # before a graph that has the call is extracted
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
        shardings: of those results, as torch_xla's objects, where they are sharded.
    """

    target: str
    computation: object
    num_results: int
    shardings: tuple[Any, ...] = ()

    def add(self, operands: list[torch.Tensor]) -> list[torch.Tensor]:
        """Adds the node to the graph of its operands, the absent ones left out."""
        import torch_xla

        results = torch_xla._XLAC._xla_user_computation(
            self.target.replace(".", "::"), operands, self.computation
        )
        results = results[: self.num_results]
        for result, how in zip(results, self.shardings, strict=False):
            # XLA knows; this lets the calls that take the result know too.
            torch_xla._XLAC._xla_annotate_custom_sharding(result, how)
        return results


def node_of(bound: BoundCall) -> Node:
    """Encodes the call."""
    call = bound.call
    index = {name: i for i, name in enumerate(call.names)}
    computation = _computation(
        call.target,
        tuple(_spec(t) for t in bound.operands),
        (*call.results, *call.scratch),
        encode_attributes(call.attributes),
        tuple((result, index[name]) for result, name in call.aliases.items()),
        tuple(i for i, t in enumerate(bound.operands) if isinstance(t, Spec)),
    )
    return Node(call.target, computation, len(call.results))


def sharded_node_of(
    whole: BoundCall, local: CustomCall, decision: sharding.Decision
) -> Node:
    """Encodes a call that each device runs on its shards.

    Args:
        whole: the call on whole tensors.
        local: what the lowering says of one device's call.
        decision: how the operands and results lie.
    """
    import torch_xla.core.xla_builder as xb

    call = whole.call
    everywhere = tuple(range(sharding.num_devices()))
    operands = [
        ShardedArray(_spec(t), decision.operands.get(name) or Split((1,), everywhere))
        for name, t in zip(call.names, whole.operands, strict=True)
    ]
    results = [
        ShardedArray(spec, split)
        for spec, split in zip(call.results, decision.results, strict=True)
    ]
    for array, spec in zip(results, local.results, strict=True):
        if array.shard != spec:
            raise RuntimeError(
                f"{call.target}: its rule says that a device has {array.shard} of a"
                f" result, its lowering {spec}"
            )
    index = {name: i for i, name in enumerate(call.names)}
    module = encode_sharded_module(
        call.target,
        operands,
        results,
        local.scratch,
        encode_attributes(local.attributes),
        {result: index[name] for result, name in local.aliases.items()},
        [i for i, t in enumerate(whole.operands) if isinstance(t, Spec)],
    )
    return Node(
        call.target,
        xb.computation_from_module_proto(call.target, module),
        len(call.results),
        tuple(sharding.op_sharding(split) for split in decision.results),
    )


def call_in_graph(bound: BoundCall) -> list[torch.Tensor]:
    """Adds the call to the lazy graph of its XLA operands and returns its results."""
    return node_of(bound).add(bound.tensors)


def call_directly(
    bound: BoundCall, into: Mapping[int, torch.Tensor] | None = None
) -> list[torch.Tensor]:
    """Runs the handler now, on CPU tensors or, on torch's stream, CUDA tensors.

    Args:
        into: result index -> contiguous tensor of its dtype and number of elements
            that takes the result; other results get new tensors.

    Returns:
        The results. An aliased one is the operand itself, updated in place.
    """
    call, device = bound.call, bound.device
    into = into or {}
    results = []
    for i, spec in enumerate(call.results):
        if i in call.aliases:
            results.append(bound.operand(call.aliases[i]))
        elif i in into:
            results.append(into[i])
        else:
            results.append(bound.new(spec))
    scratch = [bound.new(spec) for spec in call.scratch]
    if device.type == "cuda":
        handlers.require(handlers.CUDA, call.target)
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream(device).cuda_stream
            _run(bound, handlers.CUDA, stream, results + scratch)
    else:
        handlers.require(handlers.HOST, call.target)
        _run(bound, handlers.HOST, 0, results + scratch)
    return results


def _run(
    bound: BoundCall, platform: str, stream: int, results: list[torch.Tensor]
) -> None:
    call = bound.call
    specs = (*call.results, *call.scratch)
    _runtime.call(
        call.target,
        platform,
        stream,
        [_buffer(t, _spec(t)) for t in bound.operands],
        [_buffer(t, spec) for t, spec in zip(results, specs, strict=True)],
        dict(call.attributes),
    )


def _buffer(t: torch.Tensor | Spec, spec: Spec) -> tuple[int, int, tuple[int, ...]]:
    address = 0 if isinstance(t, Spec) else t.data_ptr()
    return address, primitive_type(spec.dtype), tuple(spec.shape)


def _spec(t: torch.Tensor | Spec) -> Spec:
    return t if isinstance(t, Spec) else Spec.of(t)
