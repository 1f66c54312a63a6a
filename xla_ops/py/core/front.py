"""Defines fronts: torch ops that are made of other ops, and run before any of them.

A front is a CompositeImplicitAutograd kernel, so torch runs it lazily, while it traces
and on plain tensors alike, with the tensors that the user passed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from . import in_place, lazy, op, wrapped_tensors
from .autocast import Rule
from .autocast import register as register_autocast
from .checks import Checker, not_dense
from .lazy import autograd, torch, tracing


class Written(NamedTuple):
    """What a front writes: which of its arguments, and whether it returns a result."""

    arguments: tuple[str, ...]
    has_result: bool


# By a front's name.
WRITTEN: dict[str, Written] = {}
_WRITTEN = re.compile(r"\(\w+!\)\S* (\w+)")


class Differentiable(NamedTuple):
    """How a front that writes its arguments is differentiated.

    Attributes:
        kernel: what runs where one of the arguments requires a gradient: torch's own
            in-place operations, and ops that have a gradient.
        arguments: those that the gradients of these ops serve, by name.
    """

    kernel: Callable
    arguments: tuple[str, ...]


def define(
    namespace: str,
    schema: str,
    kernel: Callable,
    *,
    autocast: Rule,
    differentiable: Differentiable | None = None,
    public_name: str = "",
) -> None:
    """Defines torch.ops.<namespace>.<name>, once there is torch.

    One that writes into its arguments refuses those that ask for a derivative: torch
    would record a value that is overwritten, or nothing. And it tells torch what it
    wrote, for the backwards of other ops that keep such a tensor.

    Args:
        schema: name, arguments and results in torch's schema language.
        kernel: (*args) -> results. Torch leaves out trailing arguments that equal their
            defaults, so it must repeat the schema's defaults.
        autocast: what torch.autocast means for it.
        differentiable: what runs instead of refusing, if the front has that.
        public_name: how errors name it; default: by the schema's name.
    """
    arguments = tuple(_WRITTEN.findall(schema))
    has_result = not schema.endswith("-> ()")
    WRITTEN[schema[: schema.index("(")]] = Written(arguments, has_result)
    lazy.when_torch(
        lambda: _define(
            namespace, schema, kernel, autocast, differentiable, public_name
        )
    )


def _refuse_sparse(name: str, given: Iterable[tuple[str, object]]) -> None:
    for argument, value in given:
        if isinstance(value, torch.Tensor) and not_dense(value):
            Checker(name).tensor(argument, value)


def _is_unlike_its_memory(t: torch.Tensor) -> bool:
    """Whether a tensor's values are not what lies at its address.

    Torch's dispatcher makes them so for an op, but a front comes before that.
    """
    return t.is_neg() or t._is_zerotensor()


def _check_written(name: str, written: Iterable[tuple[str, object]]) -> None:
    for called, t in autograd.tensors(written):
        if _is_unlike_its_memory(t):
            got = "a negated view" if t.is_neg() else "zeros without memory"
            rule = "hold its values in memory"
            Checker(name).require(False, called, rule, f"{got}; pass a clone()")


def _in_memory(value: Any) -> Any:
    """An argument whose tensors have their values in memory."""
    if isinstance(value, (list, tuple)):
        return [_in_memory(v) for v in value]
    if isinstance(value, torch.Tensor) and _is_unlike_its_memory(value):
        return value.clone() if value._is_zerotensor() else value.resolve_neg()
    return value


def _define(
    namespace: str,
    schema: str,
    kernel: Callable,
    autocast: Rule,
    differentiable: Differentiable | None,
    public_name: str,
) -> None:
    parsed = torch._C.parse_schema(schema)
    name = public_name or parsed.name
    names = tuple(argument.name for argument in parsed.arguments)
    written = frozenset(
        a.name for a in parsed.arguments if a.alias_info and a.alias_info.is_write
    )

    def reading(*args: Any, **kwargs: Any) -> Any:
        if tracing.is_recorded():
            given = (*zip(names, args, strict=False), *kwargs.items())
            in_place.check_graph_inputs(name, autograd.tensors(given), ())
        return kernel(*args, **kwargs)

    def refusing(*args: Any, **kwargs: Any) -> Any:
        given = (*zip(names, args, strict=False), *kwargs.items())
        wrapped_tensors.refuse(name, given)
        _refuse_sparse(name, given)
        # Also where nothing is recorded: AOTAutograd looks at what is written first.
        in_place.check_graph_inputs(name, autograd.tensors(given), written)
        if differentiable and autograd.asks(given, differentiable.arguments):
            others = (pair for pair in given if pair[0] not in differentiable.arguments)
            autograd.refuse(name, others)
            return differentiable.kernel(*args, **kwargs)
        autograd.refuse(name, given)
        if any(_is_unlike_its_memory(t) for _, t in autograd.tensors(given)):
            _check_written(name, (pair for pair in given if pair[0] in written))
            args = tuple(map(_in_memory, args))
            kwargs = {argument: _in_memory(value) for argument, value in kwargs.items()}
        results = kernel(*args, **kwargs)
        autograd.tell_written(value for name, value in given if name in written)
        return results

    library = op.library(namespace)
    library.define(schema)
    full_name = schema[: schema.index("(")]
    front = tracing.untraced(refusing if written else reading)
    library.impl(full_name, front, "CompositeImplicitAutograd")
    packet = getattr(getattr(torch.ops, namespace), parsed.name)
    overload = getattr(packet, parsed.overload_name or "default")
    register_autocast(library, overload, autocast)
