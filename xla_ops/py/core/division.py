"""Compiled functions that torch_xla divides, where an operation has to run on the host.

Each part is a program of its own. The one that updates a cache takes its buffer, so the
cache's old value must have been read by then. torch_xla puts operations together by
what they need, not by the order that the function has them in.

Tested by tests/core/test_division.py.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import cast

import torch

from .op import NAMESPACE, OPS


def check(graph: torch.fx.Graph) -> None:
    """Raises ValueError where a program would read a cache that one before it takes.

    Args:
        graph: of calls of programs, in order, and of what runs on the host.
    """
    taken: dict[object, str] = {}
    on_host: list[str] = []
    for node in graph.nodes:
        if node.op == "output" or node.target is torch.ops.aten.copy_.default:
            continue  # it gives the cache its new value
        if node.op == "call_function" and node.target in _OURS:
            continue
        if node.op == "call_function":
            on_host.append(str(node.target))
        for cache in map(_cache_of, node.all_input_nodes):
            if cache in taken:
                raise ValueError(
                    f"{taken[cache]}: a cache must not be read, as it was before the"
                    " update, where torch_xla divides the compiled function, got"
                    f" {', '.join(dict.fromkeys(on_host))} on the host; read the cache"
                    " in a function of its own, called before"
                )
        if node.op == "call_module":
            taken |= _taken_by(node)


_OWNED = torch.ops.xla_ops.owned.default
_OURS = (operator.getitem, _OWNED)  # what protects caches, and takes them out of it


def _cache_of(node: torch.fx.Node) -> torch.fx.Node:
    """The input of the graph that a node protects; any other node itself."""
    call = node.args[0] if node.target is operator.getitem else None
    if isinstance(call, torch.fx.Node) and call.target is _OWNED:
        caches = cast("list[torch.fx.Node]", call.args[0])
        return caches[cast("int", node.args[1]) - 1]
    return node


def _taken_by(call: torch.fx.Node) -> dict[object, str]:
    """The arguments whose buffers a program takes, each with the op that does."""
    module = call.graph.owning_module
    assert module is not None
    program = cast("torch.fx.GraphModule", module.get_submodule(str(call.target)))
    inputs = program.graph.find_nodes(op="placeholder")
    places = {node: i for i, node in enumerate(inputs)}
    return {
        _cache_of(cast("torch.fx.Node", call.args[places[given]])): name
        for given, name in _donors(program.graph)
        if given in places
    }


def _donors(graph: torch.fx.Graph) -> Iterator[tuple[torch.fx.Node, str]]:
    for node in graph.nodes:
        if getattr(node.target, "namespace", "") != NAMESPACE:
            continue
        op = OPS.get(getattr(node.target, "_opname", ""))
        if op is not None and op.num_donors:
            for given in node.args[-op.num_donors :]:
                if isinstance(given, torch.fx.Node):
                    yield given, op.public_name
