"""Turns the declaration of one op into a torch operator that runs everywhere.

An op says what it checks, what shapes it gives, what it means in plain torch, and which
custom call computes it; this module registers the kernels:

    XLA        a node in the lazy graph, or the reference where XLA has no handler
    CPU, CUDA  the same handler called at once, or the reference where it is missing
    Meta       shapes only, after the same checks (what torch.compile traces with)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from . import handlers
from .custom_call import CustomCall, Node, call_directly, node_of
from .hlo import Spec

NAMESPACE = "xla_ops"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")

# Every declared op by name; the conformance test walks it.
OPS: dict[str, Op] = {}

# Shapes may change with every step, so an op forgets its plans at some number.
_MAX_PLANS = 1024


class Plan(NamedTuple):
    """What the XLA kernel does for every call of one signature.

    Attributes:
        node: the call, but for its operands.
        platform: of the handler.
        operands: which of the op's arguments those are; None where the lowering makes
            some of them, so that it has to run each time.
    """

    node: Node
    platform: str
    operands: tuple[int, ...] | None


@dataclass(frozen=True)
class Op:
    """One functional op.

    Attributes:
        name: the op is `torch.ops.xla_ops.<name>`.
        schema: arguments and results in torch's schema language. An op that updates
            an argument's value takes a last argument `Tensor? donor`, see `in_place`.
        lower: (*args) -> CustomCall. Checks its arguments first, so it is the one
            place that knows what is legal. Sees tensors of any device, fake ones too.
            Of an XLA tensor it may use shape, dtype and device only: it runs once a
            signature, not once a call, where its operands are arguments.
        reference: (*args) -> Tensor or tuple, the meaning in plain torch.
    """

    name: str
    schema: str
    lower: Callable[..., CustomCall]
    reference: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]
    _plans: dict[tuple, Plan] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self):
        OPS[self.name] = self
        _library.define(self.name + self.schema)
        _library.impl(self.name, self._in_graph, "XLA")
        _library.impl(self.name, self._at_once, "CPU")
        _library.impl(self.name, self._at_once, "CUDA")
        torch.library.register_fake(
            f"{NAMESPACE}::{self.name}", self._fake, lib=_library
        )

    def __call__(self, *args):
        return getattr(torch.ops.xla_ops, self.name).default(*args)

    @property
    def has_donor(self) -> bool:
        return "Tensor? donor" in self.schema

    def update_at_once(self, *args) -> list[torch.Tensor]:
        """Runs the handler on CPU or CUDA tensors, updating aliased operands."""
        call = self.lowered(args)
        if _is_empty(call):
            return [_new(spec, call) for spec in call.results]
        return call_directly(call)

    def lowered(self, args) -> CustomCall:
        """Checks the arguments and returns the call that they make."""
        return self.lower(*(args[:-1] if self.has_donor else args))

    def compute(
        self, args, into: Mapping[int, torch.Tensor] | None = None
    ) -> list[torch.Tensor]:
        """Computes the results now, from CPU or CUDA tensors.

        Args:
            args: the op's arguments; none is changed, but by `into`.
            into: result index -> tensor of its dtype and number of elements that
                should take the result.

        Returns:
            The results. One that could go to its tensor in `into` directly is that
            tensor; where it could not (a strided tensor, one that overlaps an operand
            still to be read, no handler) it is another one, and the caller copies.
        """
        call = self.lowered(args)
        if _is_empty(call):
            return _untouched(call)
        platform = handlers.HOST
        if call.operands[0].device.type == "cuda":
            platform = handlers.CUDA
        if not handlers.loaded(platform, call.target):
            results = self._reference(args)
            return list(results) if isinstance(results, tuple) else [results]
        # A functional op must not touch its arguments.
        updated = set(call.aliases.values())
        operands = tuple(
            t.clone() if i in updated else t for i, t in enumerate(call.operands)
        )
        direct = {
            i: t for i, t in (into or {}).items() if _may_write(call, i, operands, t)
        }
        return call_directly(CustomCall(**{**vars(call), "operands": operands}), direct)

    def _reference(self, args):
        return self.reference(*(args[:-1] if self.has_donor else args))

    def _fake(self, *args):
        call = self.lowered(args)
        return _unpack([_new(spec, call) for spec in call.results])

    def _in_graph(self, *args):
        signature = _signature(args)
        plan = self._plans.get(signature)
        if plan is None or plan.operands is None:
            call = self.lowered(args)
            if _is_empty(call):
                return _unpack(_untouched(call))
            plan = plan or self._new_plan(signature, args, call)
            operands = call.tensors
        else:
            operands = [args[i] for i in plan.operands]
        if not handlers.available(plan.platform, plan.node.target):
            return self._reference(args)
        results = plan.node.add(operands)
        if self.has_donor and args[-1] is not None:
            import torch_xla

            torch_xla._XLAC._set_buffer_donation(args[-1], True)
        return _unpack(results)

    def _new_plan(self, signature: tuple, args, call: CustomCall) -> Plan:
        # One tensor may be several arguments: lower again with one each, so that an
        # operand tells which argument it is.
        args = [t.detach() if isinstance(t, torch.Tensor) else t for t in args]
        index = {id(t): i for i, t in enumerate(args) if isinstance(t, torch.Tensor)}
        operands = tuple(index.get(id(t)) for t in self.lowered(args).tensors)
        plan = Plan(
            node_of(call),
            handlers.xla_platform(),
            None if None in operands else operands,
        )
        if len(self._plans) >= _MAX_PLANS:  # more where threads add at once
            self._plans.clear()
        self._plans[signature] = plan
        return plan

    def _at_once(self, *args):
        return _unpack(self.compute(args))


def _signature(args) -> tuple:
    """Returns what a lowering of XLA tensors depends on, as a key.

    The schema fixes the type of every argument, so 1, 1.0 and True never meet. 0.0 and
    -0.0 do, and are told apart by their texts.
    """
    return tuple(
        [
            arg
            if arg is None
            else (arg.shape, arg.dtype, arg.device)
            if isinstance(arg, torch.Tensor)
            else tuple(arg)
            if isinstance(arg, list)
            else arg or repr(arg)
            for arg in args
        ]
    )


def _new(spec: Spec, call: CustomCall) -> torch.Tensor:
    return call.operands[0].new_empty(spec.shape, dtype=spec.dtype)


def _is_empty(call: CustomCall) -> bool:
    """Whether there is nothing to compute: no result, or no token to write."""
    return call.nothing_to_do or all(0 in spec.shape for spec in call.results)


def _untouched(call: CustomCall) -> list[torch.Tensor]:
    return [
        call.operands[call.aliases[i]].clone()
        if i in call.aliases
        else _new(spec, call)
        for i, spec in enumerate(call.results)
    ]


def _may_write(call: CustomCall, i: int, operands, t: torch.Tensor) -> bool:
    """Whether result `i` may go straight to `t`'s memory."""
    if i in call.aliases or not t.is_contiguous():
        return False
    for j, operand in enumerate(operands):
        if isinstance(operand, Spec):
            continue
        same = t.data_ptr() == operand.data_ptr() and t.nbytes == operand.nbytes
        if same and call.may_overwrite.get(i) == j:
            continue
        if (
            t.data_ptr() < operand.data_ptr() + operand.nbytes
            and operand.data_ptr() < t.data_ptr() + t.nbytes
        ):
            return False
    return True


def _unpack(results):
    return results[0] if len(results) == 1 else tuple(results)
