"""Defines fronts: torch ops that are made of other ops, and run before any of them.

A front is a CompositeImplicitAutograd kernel, so torch runs it lazily, while it traces
and on plain tensors alike, with the tensors that the user passed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import gradients, sharding
from .autocast import Rule
from .autocast import register as register_autocast


def define(
    library: torch.library.Library,
    schema: str,
    kernel: Callable,
    *,
    autocast: Rule,
) -> None:
    """Defines an op in `library`'s namespace.

    One that writes into its arguments refuses those that ask for a derivative: torch
    would record a value that is overwritten, or nothing. And it tells torch what it
    wrote, for the backwards of other ops that keep such a tensor.

    Args:
        schema: name, arguments and results in torch's schema language.
        kernel: (*args) -> results. Torch leaves out trailing arguments that equal their
            defaults, so it must repeat the schema's defaults.
        autocast: what torch.autocast means for it.
    """
    parsed = torch._C.parse_schema(schema)
    op = parsed.name
    names = tuple(argument.name for argument in parsed.arguments)
    written = frozenset(
        a.name for a in parsed.arguments if a.alias_info and a.alias_info.is_write
    )

    def refusing(*args: Any, **kwargs: Any) -> Any:
        given = (*zip(names, args, strict=False), *kwargs.items())
        sharding.refuse_wrapped(op, given)
        gradients.refuse(op, given)
        results = kernel(*args, **kwargs)
        gradients.tell_written(value for name, value in given if name in written)
        return results

    library.define(schema)
    name = schema[: schema.index("(")]
    library.impl(name, refusing if written else kernel, "CompositeImplicitAutograd")
    packet = getattr(getattr(torch.ops, library.ns), op)
    overload = getattr(packet, parsed.overload_name or "default")
    register_autocast(library, overload, autocast)
