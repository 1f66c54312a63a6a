"""The Dynamo backend "xla_ops": openxla's programs, called with less work on the host.

    step = torch.compile(decode, backend="xla_ops")

It takes what torch_xla's backend "openxla" extracts from a graph, the same program and
the same donations, and replaces what runs around it on every call:

- A tensor that the graph updated, such as a KV cache, takes its new buffer by a
  replacement of its value. Otherwise AOTAutograd does it by `Tensor.copy_`, which adds
  a node to the lazy graph and costs several times as much; a decoder has two caches a
  layer.
- Where the arguments go is worked out once, not looked up argument by argument.
- No argument is asked whether work is pending on it: the program refuses one that is,
  before it runs, and only then is it synchronised, as openxla does.

Which of a program's inputs and results are arguments: core/extraction.py. Symbolic
sizes and SPMD meshes are left to openxla's own way of calling. Measurements:
docs/in_place.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import cast

import torch
import torch_xla
import torch_xla.runtime as xr
from torch._dynamo.backends.common import aot_autograd
from torch_xla._dynamo import dynamo_bridge

from ..core import division, extraction, in_place, ownership, tracing
from ..core.interrupts import Uninterrupted
from . import small_buffers
from .calls import run_cached


def _compile(module: torch.fx.GraphModule, _: object) -> Callable[[list], object]:
    """Extracts the program at the first call, which has the real tensors."""
    if tracing.remade_in(module.graph):
        raise in_place.remade_error("xla_ops")
    _clone_copies(module.graph)
    donated = _donated(module.graph)
    updated = _return_updates(module.graph)
    module.recompile()
    modules = [module]  # until its program is known
    program: Callable | None = None
    if all(node.op in ("placeholder", "output") for node in module.graph.nodes):
        program = module  # which returns what it is given
    updates: list[tuple[int, int, Callable]] = []

    def forward(args: list) -> object:
        nonlocal program
        with ownership.LOCK:
            if donated:
                ownership.protect([args[i] for i in donated], finish_reads=True)
            if program is None:
                program = _extract_whole(modules[0], args, donated)
                modules.clear()
            with Uninterrupted():
                results = program(*args)
                if isinstance(results, torch.Tensor):  # openxla's way of calling
                    results = (results,)
                if updated and not updates:
                    updates.extend(
                        (i, argument, _update(args, argument, results, i))
                        for i, argument in enumerate(updated)
                    )
                for i, argument, update in updates:
                    update(args[argument], results[i])
        return results[len(updated) :]

    # AOTAutograd: takes one list.
    forward._boxed_call = True  # type: ignore[attr-defined]
    return forward


def _extract_whole(
    module: torch.fx.GraphModule, args: Sequence, donated: Sequence[int]
) -> Callable:
    """Extracts the program, and leaves module and arguments as they are.

    A caller may go on after a compilation, or a first run, that failed or was
    interrupted. Flags that were left would have the next program, whatever it does,
    take the caches' buffers away.
    """
    for device in {t.device for t in args if isinstance(t, torch.Tensor)}:
        small_buffers.keep_apart(device)
    graph = torch.fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    try:
        # torch_xla runs the graph's nodes, and under inference mode takes no view of a
        # tensor that was made outside.
        with torch.inference_mode(False), torch.no_grad():
            return _extract_program(torch.fx.GraphModule(module, graph), tuple(args))
    finally:
        for i in donated:
            torch_xla._XLAC._set_buffer_donation(args[i], False)


def _clone_copies(graph: torch.fx.Graph) -> None:
    """Turns each copy(target, source) that changes nothing into clone(source).

    The copy of an input would be the input's own buffer, which is no result of any
    program.
    """
    for node in graph.find_nodes(
        op="call_function", target=torch.ops.aten.copy.default
    ):
        target, source = (n.meta["val"] for n in node.args[:2])
        if target.device.type == "xla" and all(
            getattr(target, name) == getattr(source, name)
            for name in ("shape", "dtype", "device")
        ):
            node.target = torch.ops.aten.clone.default
            node.args = node.args[1:2]


def _donated(graph: torch.fx.Graph) -> list[int]:
    """Takes the nodes out that protect inputs which the program overwrites.

    Returns:
        The inputs' indices.
    """
    inputs = {node: i for i, node in enumerate(graph.find_nodes(op="placeholder"))}
    donated = set()
    for node in graph.find_nodes(
        op="call_function", target=torch.ops.xla_ops.owned.default
    ):
        caches = node.args[0]
        for result in list(node.users):
            cache = caches[result.args[1] - 1]
            donated.add(inputs[cache])
            result.replace_all_uses_with(cache)
            graph.erase_node(result)
        graph.erase_node(node)
    return sorted(donated)


def _return_updates(graph: torch.fx.Graph) -> list[int]:
    """Turns the updates of inputs, which end the graph, into its first results.

    The bridge's partitioner knows nothing of mutation: it would move an update before
    a read of the old value.

    Returns:
        The inputs' indices.
    """
    inputs = {node: i for i, node in enumerate(graph.find_nodes(op="placeholder"))}
    output = graph.output_node()
    updated, values = [], []
    for node in graph.find_nodes(
        op="call_function", target=torch.ops.aten.copy_.default
    ):
        target, value, *_ = node.args
        if target in inputs:
            updated.append(inputs[target])
            values.append(value)
            node.replace_all_uses_with(value)
            graph.erase_node(node)
    results = cast("tuple[torch.fx.Node, ...]", output.args[0])
    output.args = ((*values, *results),)
    return updated


def _update(
    args: list, argument: int, results: Sequence[torch.Tensor], i: int
) -> Callable:
    """Chooses how an argument takes its new value; it is the same for every call."""
    tensor, value = args[argument], results[i]
    is_shared = sum(r is value for r in results) > 1 or any(a is value for a in args)
    are_xla = tensor.device.type == value.device.type == "xla"
    can_adopt = are_xla and torch._is_functional_tensor(tensor)
    if can_adopt and not is_shared:
        return in_place.adopt
    if can_adopt and tensor.is_inference():  # of which torch refuses the copy, outside
        return lambda t, value: in_place.adopt(t, value.clone())
    return torch.Tensor.copy_


class _InputCollector(dynamo_bridge.InputCollector):
    """Looks at a graph that was divided before it runs it."""

    def __init__(self, module: torch.fx.GraphModule):
        division.check(module.graph)
        super().__init__(module)


def _extract(module: torch.fx.GraphModule) -> Callable:
    """Does what dynamo_bridge.extract_internal does, and returns a faster call."""
    args: Sequence = vars(module)["xla_args"]
    if xr.is_spmd() or not all(isinstance(a, torch.Tensor) for a in args):
        return _extract_internal(module)
    (
        _sharding,
        _results,
        program,
        updates,  # of tensors that belong to the module: argument -> result
        nones,
        matcher,
        returns,
        updated,
    ) = extraction.extract_graph(module, {})
    inputs = _input_getter(matcher)
    num_updated = len(updated)

    def run(*args: torch.Tensor) -> object:
        results = run_cached(program, inputs, args)
        results = returns.addDumbReturn(args, results)
        for argument, result in updates.items():
            args[argument].copy_(results[result])
        outputs = nones.add_nones(results[num_updated:])
        return outputs[0] if len(outputs) == 1 else outputs

    return run


def _input_getter(matcher: dynamo_bridge.GraphInputMatcher) -> Callable:
    """Returns args -> the program's inputs, in its order."""
    if matcher.seed_info_id in matcher.graph_input_tensor_ids:
        return matcher  # random numbers: a new seed for each call
    constants = [t for t in matcher.graph_input_xla_values if t is not None]
    where, num_constants = [], 0
    for argument in matcher.arg_idxs:
        if argument is None:
            where.append(num_constants)
            num_constants += 1
        else:
            where.append(len(constants) + argument)
    if len(where) < 2:  # itemgetter would give a tensor, or refuse
        return matcher
    pick = itemgetter(*where)
    return lambda args: pick((*constants, *args))


_extract_internal = extraction.with_globals(
    dynamo_bridge.extract_internal, extract_graph_helper=extraction.extract_graph
)
_extract_program = extraction.with_globals(
    dynamo_bridge.extract_compiled_graph,
    extract_compiled_graph_helper=extraction.with_globals(
        dynamo_bridge.extract_compiled_graph_helper,
        extract_internal=_extract,
        partition_fx_graph_for_cpu_fallback=extraction.with_globals(
            dynamo_bridge.partition_fx_graph_for_cpu_fallback,
            extract_internal=_extract,
            InputCollector=_InputCollector,
        ),
    ),
)


def backend(
    module: torch.fx.GraphModule, inputs: list, **options: object
) -> Callable[..., object]:
    """The entry point of the group torch_dynamo_backends."""
    # Made anew for each graph: torch's wraps its compiler of backwards once more at
    # each use, and the 500th backward of a process would be too deep a recursion. With
    # the updates of its inputs in the graph, `_compile` makes them; AOTAutograd would
    # make them by copy_.
    compiler = aot_autograd(fw_compiler=_compile, keep_inference_input_mutations=True)
    return compiler(module, inputs, **options)
