"""The declaration of one op, and the torch operator that is made of it.

An op says what it checks, what shapes it gives, what it means in plain torch, and which
custom call computes it; this module registers the kernels:

    XLA        a node in the lazy graph, or the reference where XLA has no handler
    CPU, CUDA  the same handler called at once, or the reference where it is missing
    Meta       shapes only, after the same checks (what torch.compile traces with)
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from . import gradients, handlers, lazy, sharding, wrapped_tensors
from .autocast import Rule
from .autocast import register as register_autocast
from .custom_call import (
    BoundCall,
    CustomCall,
    Node,
    call_directly,
    node_of,
    sharded_node_of,
)
from .foreign import Foreign, Framework
from .hlo import Spec
from .lazy import autograd, ownership, references, torch, tracing

NAMESPACE = "xla_ops"

# What an op returns: one tensor, or several.
Results = torch.Tensor | tuple[torch.Tensor, ...]

_DONORS = re.compile(r"(?:, Tensor\? donor(?:_\w+)?)+(?=\) -> )")
_SCHEMA = re.compile(r"\((?P<arguments>.*?)\) -> ", re.DOTALL)

# Every declared op by name; the conformance test walks it.
OPS: dict[str, Op] = {}

# Shapes may change with every step, so an op forgets its plans at some number.
_MAX_PLANS = 1024


class Plan(NamedTuple):
    """What the XLA kernel does for every call of one signature.

    Attributes:
        node: the call, but for its operands.
        platform: of the handler.
        operands: which of the op's arguments those are.
    """

    node: Node
    platform: str
    operands: tuple[int, ...]


@dataclass(frozen=True)
class Op:
    """One functional op.

    Attributes:
        name: the op is `torch.ops.xla_ops.<name>`.
        schema: arguments and results in torch's schema language. An op that gives its
            first argument a new value takes a last one, `Tensor? donor`: that argument
            again where its memory may become the result's, see `in_place`. It has a
            twin that writes the argument, `torch.ops.xla_ops.<name>_`. One that gives
            several arguments new values takes as many, `Tensor? donor_<argument>`, and
            has no twin.
        lower: (*args) -> CustomCall. Checks its arguments first, so it is the one
            place that knows what is legal. Sees tensors of any device, fake ones too,
            and may use of a tensor its shape, dtype and device only: on XLA it runs
            once a signature, not once a call.
        reference: (*args) -> Tensor or tuple, the meaning in plain torch. It is given
            copies, see `references`.
        autocast: what torch.autocast means for it.
        splits: which dimensions may be split over devices, see `sharding.Rule`; None:
            none, the op raises for sharded operands.
        gradient: how backward differentiates the op; None: it raises, see `gradients`.
        public_name: of the function that calls the op, for error texts.
        labels: what that function calls its arguments, where its names are others.
        gradient_labels: the same where a gradient is missing, which is of an argument
            as the user gave it, not of a part that is checked.
    """

    name: str
    schema: str
    lower: Callable[..., CustomCall]
    reference: Callable[..., Results]
    autocast: Rule = field(kw_only=True)
    splits: sharding.Rules | None = field(default=None, kw_only=True)
    gradient: gradients.Gradient | None = None
    public_name: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    gradient_labels: Mapping[str, str] = field(default_factory=dict, kw_only=True)
    # Of `Foreign` arguments, where one is in use.
    framework: ClassVar[Framework | None] = None
    arguments: tuple[str, ...] = field(init=False)
    num_donors: int = field(init=False)  # the last arguments
    overload: torch._ops.OpOverload = field(init=False, repr=False, compare=False)
    _plans: dict[tuple, Plan] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _shardings: dict[tuple, tuple] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "arguments", argument_names(self.schema))
        object.__setattr__(self, "num_donors", num_donors(self.schema))
        object.__setattr__(self, "public_name", self.public_name or self.name)
        OPS[self.name] = self
        lazy.when_torch(self._register)

    def gradient_label(self, argument: str) -> str:
        """What an error about an argument's gradient calls the argument."""
        labels = {**self.labels, **self.gradient_labels}
        return labels.get(argument, argument)

    def _register(self) -> None:
        """Defines torch.ops.xla_ops.<name>."""
        ops = library(NAMESPACE)
        ops.define(self.name + self.schema)
        overload = getattr(torch.ops.xla_ops, self.name).default
        object.__setattr__(self, "overload", overload)
        ops.impl(self.name, tracing.untraced(autograd.kernel(self)), "Autograd")
        register_autocast(ops, overload, self.autocast)
        ops.impl(self.name, tracing.untraced(self._in_graph), "XLA")
        for key in ("CPU", "CUDA"):
            ops.impl(self.name, tracing.untraced(self._at_once), key)
        torch.library.register_fake(f"{NAMESPACE}::{self.name}", self._fake, lib=ops)
        if self.has_donor:
            self._define_twin()

    def _define_twin(self) -> None:
        """Defines the op that writes its first argument, for CPU and CUDA tensors.

        Compilers that know what an op writes, as Inductor does, keep it in place.
        """
        arguments = self.schema[1 : self.schema.index(", Tensor? donor")]
        written = arguments.replace("Tensor ", "Tensor(a!) ", 1)
        ops = library(NAMESPACE)
        ops.define(f"{self.name}_({written}) -> ()")
        for key in ("CPU", "CUDA"):
            ops.impl(f"{self.name}_", tracing.untraced(self._write), key)
        torch.library.register_fake(f"{NAMESPACE}::{self.name}_", self._check, lib=ops)

    @property
    def twin(self) -> torch._ops.OpOverload:
        return getattr(torch.ops.xla_ops, f"{self.name}_").default

    def _write(self, *args: Any) -> None:
        self.update_at_once(*args, None)

    def _check(self, *args: Any) -> None:
        self.lowered((*args, None))

    def __call__(self, *args: Any) -> Any:
        is_compiling = torch.compiler.is_dynamo_compiling()
        is_known = self.framework is None or is_compiling
        if not is_known and any(isinstance(a, Foreign) for a in args):
            assert self.framework is not None
            return self.framework.call(self, args)
        if is_compiling or not autograd.is_untracked(args):
            return self.overload(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return self.overload(*args)

    @property
    def has_donor(self) -> bool:
        return self.num_donors == 1 and self.arguments[-1] == "donor"

    def lowered(self, args: Sequence) -> BoundCall:
        """Checks the arguments and returns the call that they make."""
        values = self.given(args)
        return self.lower(*values.values()).bind(values)

    def given(self, args: Sequence) -> dict[str, Any]:
        """The arguments by name, but for donors."""
        values = dict(zip(self.arguments, args, strict=True))
        for name in self.arguments[len(args) - self.num_donors :]:
            del values[name]
        return values

    def update_at_once(self, *args: Any) -> list[torch.Tensor]:
        """Runs the handler on CPU or CUDA tensors, updating aliased operands.

        Those may have any strides. An op that is told where a cache lies, by
        `geometry`, is told it in elements from the tensor's first.

        Returns:
            The results; one that is aliased is the operand.
        """
        bound = self.lowered(args)
        names = bound.call.aliases.values()
        updated = [bound.operand(name) for name in names]
        if bound.call.is_empty:
            return bound.untouched(copy=False)
        if all(t.is_contiguous() for t in updated):
            return self._update_dense(bound, args)
        in_place = "geometry" in self.arguments
        dense = [elements_of(t) if in_place else t.contiguous() for t in updated]
        given = dict(zip(self.arguments, args, strict=True))
        given |= dict(zip(names, dense, strict=True))
        args = tuple(given.values())
        results = self._update_dense(self.lowered(args), args)
        for i, t, new in zip(bound.call.aliases, updated, dense, strict=True):
            results[i] = t
            if not in_place:
                t.copy_(new)
        return results

    def _update_dense(self, bound: BoundCall, args: Sequence) -> list[torch.Tensor]:
        call = bound.call
        updated = {name: bound.operand(name) for name in call.aliases.values()}
        platform = handlers.CUDA if bound.device.type == "cuda" else handlers.HOST
        if self._runs(platform, call.target, at_once=True):
            # The handler may write before it has read, so what it reads is set apart.
            operands = tuple(
                t.clone()
                if name not in updated
                and isinstance(t, torch.Tensor)
                and any(_share_memory(t, other) for other in updated.values())
                else t
                for name, t in zip(call.names, bound.operands, strict=True)
            )
            return call_directly(BoundCall(call, operands))
        found = self._reference(args)
        results = list(found) if isinstance(found, tuple) else [found]
        pairs = [
            (_bits(updated[name]), _bits(results[i]))
            for i, name in call.aliases.items()
        ]
        # Caches may lie in each other's gaps, which hold old values in these results.
        changed = [old != new for old, new in pairs]
        for (old, new), places in zip(pairs, changed, strict=True):
            old.copy_(torch.where(places, new, old))
        for i, name in call.aliases.items():
            results[i] = updated[name]
        return results

    def compute(
        self, args: Sequence, into: Mapping[int, torch.Tensor] | None = None
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
        bound = self.lowered(args)
        call = bound.call
        if call.is_empty:
            return bound.untouched()
        platform = handlers.CUDA if bound.device.type == "cuda" else handlers.HOST
        if not self._runs(platform, call.target, at_once=True):
            results = self._reference(args)
            return list(results) if isinstance(results, tuple) else [results]
        # A functional op must not touch its arguments.
        updated = set(call.aliases.values())
        operands = tuple(
            t.clone() if name in updated and isinstance(t, torch.Tensor) else t
            for name, t in zip(call.names, bound.operands, strict=True)
        )
        bound = BoundCall(call, operands)
        direct = {i: t for i, t in (into or {}).items() if _may_write(bound, i, t)}
        return call_directly(bound, direct)

    def _runs(self, platform: str, target: str, *, at_once: bool) -> bool:
        """Whether a handler computes a call; where not, the reference does."""
        ask = handlers.loaded if at_once else handlers.available
        return ask(platform, target)

    def _reference(self, args: Sequence) -> Results:
        given = args[: len(args) - self.num_donors]
        return references.run(self.reference, given)

    def _fake(self, *args: Any) -> Results:
        bound = self.lowered(args)
        if self.has_donor:
            # The argument itself, where it is the donor.
            old = bound.operand(bound.call.aliases[0])
            return old.new_empty_strided(old.shape, old.stride())
        return _unpack([bound.new(spec) for spec in bound.call.results])

    def _in_graph(self, *args: Any) -> Results:
        signature = tuple(map(_key, args))
        plan = self._plans.get(signature)
        if plan is None:
            bound = self.lowered(args)
            if bound.call.is_empty:
                return _unpack(bound.untouched())
            plan = self._new_plan(signature, bound)
        if not self._runs(plan.platform, plan.node.target, at_once=False):
            return self._reference(args)
        node = plan.node
        operands = [args[i] for i in plan.operands]
        if handlers.is_spmd():
            node = self._sharded(plan, signature, args, operands) or node
        results = node.add(operands)
        donors = [t for t in args[len(args) - self.num_donors :] if t is not None]
        if donors:
            ownership.give_away(donors)
        return _unpack(results)

    def _sharded(
        self,
        plan: Plan,
        signature: tuple,
        args: Sequence,
        operands: Sequence[torch.Tensor],
    ) -> Node | None:
        """Returns the node for sharded operands; None where the whole call will do.

        Raises:
            ValueError: XLA would have to gather one whole on every device, and would
                say nothing.
        """
        names = [self.arguments[i] for i in plan.operands]
        wrapped_tensors.check(self.public_name, names, operands)
        given = sharding.given(operands)
        if given.is_manual:
            return None
        if given.says_nothing and not any(sharding.is_unsaid(t, "") for t in operands):
            return None
        key = (signature, given)
        found = self._shardings.get(key)
        if found is None:
            found = self._new_sharded(plan, args, given)
            if len(self._shardings) >= _MAX_PLANS:
                self._shardings.clear()
            self._shardings[key] = found
        node, assumed = found
        for i, error in assumed:
            if sharding.is_unsaid(operands[i], given.specs[i]):
                raise ValueError(error)
        return node

    def _new_sharded(self, plan: Plan, args: Sequence, given: sharding.Given) -> tuple:
        """Returns the node, and of which operands what was assumed."""
        values = dict(zip(self.arguments, args, strict=True))
        rule = self.splits(values) if callable(self.splits) else self.splits
        whole = self.lowered(args)
        call = sharding.Call(
            self.public_name,
            rule,
            {self.arguments[i]: args[i].shape for i in plan.operands},
            [spec.shape for spec in whole.call.results],
            self.labels,
        )
        decision = sharding.decide(call, given)
        if not decision.is_split:
            return None, decision.assumed
        local = values | sharding.stand_ins(values, decision)
        if rule is not None and rule.localize is not None:
            local |= rule.localize(local, values)
        shards = self.lowered(tuple(local.values()))
        return sharded_node_of(whole, shards.call, decision), decision.assumed

    def _new_plan(self, signature: tuple, bound: BoundCall) -> Plan:
        names = zip(bound.call.names, bound.operands, strict=True)
        operands = tuple(
            self.arguments.index(name) for name, t in names if not isinstance(t, Spec)
        )
        plan = Plan(node_of(bound), handlers.xla_platform(), operands)
        if len(self._plans) >= _MAX_PLANS:  # more where threads add at once
            self._plans.clear()
        self._plans[signature] = plan
        return plan

    def _at_once(self, *args: Any) -> Results:
        if not self.has_donor:
            return _unpack(self.compute(args))
        old, *rest = args
        if rest[-1] is None:
            new = old.new_empty_strided(old.shape, old.stride())
            old = new.copy_(old)
        self.update_at_once(old, *rest)
        return old


def num_donors(schema: str) -> int:
    """How many of a schema's last arguments are donors, see `Op.schema`.

    A user's op may have arguments of such names; they are no optional tensors.
    """
    match = _DONORS.search(schema)
    return match[0].count("?") if match else 0


@functools.cache
def library(namespace: str) -> torch.library.Library:
    """Returns the library in which this package defines ops of a namespace."""
    return torch.library.Library(namespace, "FRAGMENT")


def argument_names(schema: str) -> tuple[str, ...]:
    """Returns the names of the arguments in an op's schema."""
    match = _SCHEMA.match(schema)
    if match is None:
        raise ValueError(f"schema must be '(Type name, ...) -> Type', got {schema!r}")
    words = match["arguments"].split(",")
    return tuple(w.partition("=")[0].split()[-1] for w in words if w.strip())


def _key(arg: object) -> object:
    """Returns what a lowering of XLA tensors depends on in an argument.

    The schema fixes the type of every argument, so 1, 1.0 and True never meet. 0.0 and
    -0.0 would, and NaN would not meet itself.
    """
    if isinstance(arg, torch.Tensor):
        return arg.shape, arg.dtype, arg.device
    if isinstance(arg, float):
        return arg.hex()
    return tuple(arg) if isinstance(arg, list) else arg


def _may_write(bound: BoundCall, i: int, t: torch.Tensor) -> bool:
    """Whether result `i` may go straight to `t`'s memory."""
    call = bound.call
    if i in call.aliases or not t.is_contiguous():
        return False
    for name, operand in zip(call.names, bound.operands, strict=True):
        if isinstance(operand, Spec):
            continue
        same = t.data_ptr() == operand.data_ptr() and t.nbytes == operand.nbytes
        if same and call.may_overwrite.get(i) == name:
            continue
        if _share_memory(t, operand):
            return False
    return True


def _share_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two dense tensors may have an element in common."""
    return (
        a.data_ptr() < b.data_ptr() + b.nbytes
        and b.data_ptr() < a.data_ptr() + a.nbytes
    )


def _bits(t: torch.Tensor) -> torch.Tensor:
    """The tensor as integers: NaN equals itself, and torch can compute with fp8."""
    return t.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[t.element_size()])


def elements_of(t: torch.Tensor) -> torch.Tensor:
    """All memory from the first element of `t` to its last, as one dense dimension."""
    extent = 1 + sum(
        (size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)
    )
    return t.as_strided((extent if t.numel() else 0,), (1,))


def _unpack(results: list[torch.Tensor]) -> Results:
    return results[0] if len(results) == 1 else tuple(results)
