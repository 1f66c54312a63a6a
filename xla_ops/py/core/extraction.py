"""Which inputs of a program that torch_xla extracts from a graph are its arguments.

torch_xla runs the graph on the arguments of the first call, and then has the program
read the buffers that the graph came to read. It knows an argument's by the number of
the tensor that was read last while it held the buffer. Where two tensors hold one, as
after `snapshot.copy_(cache)`, or as a cache and what a backward keeps of it do, that
number can be none of an argument: torch_xla takes the buffer for a constant of the
program, and every later call reads the values of the first. Or it is another
argument's, whose values are read then. Nothing tells.

Here an argument is known by its buffer, and no two have the same one:

    backend "xla_ops"    takes `extract_graph` in the place of torch_xla's own function
    backend "openxla"    so does torch_xla itself, from the first custom call on that
                         was traced in the process: `install`

Tested by tests/core/test_extraction.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
import torch_xla
from torch_xla._dynamo import dynamo_bridge

from . import ownership


def with_globals(function: Any, **replaced: object) -> Any:
    """A function of torch_xla's that finds `replaced` where it looks for globals.

    The module itself stays as it is.
    """
    assert isinstance(function, FunctionType)
    return FunctionType(
        function.__code__,
        {**function.__globals__, **replaced},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )


class _Deduper(dynamo_bridge.Deduper):
    """Knows which results are one as the program does: those that are one tensor.

    torch_xla's own takes a tensor and its clone for one, of which the program returns
    both, so that every later result comes out in the place of another.
    """

    def dedup(self, origlist: list[torch.Tensor]) -> list[torch.Tensor]:
        ids = [torch_xla._XLAC._xla_get_tensor_id(t) for t in origlist]
        unique = dict.fromkeys(ids)
        places = {tensor_id: i for i, tensor_id in enumerate(unique)}
        self.permute_for_orig = [places[tensor_id] for tensor_id in ids]
        return [origlist[ids.index(tensor_id)] for tensor_id in unique]


class ReturnHandler(dynamo_bridge.SpecialReturnHandler):
    """Returns the aliases of arguments beside what the program computes.

    Attributes:
        aliases: where among all that is returned, in order, and of which argument.
    """

    __init__ = with_globals(
        dynamo_bridge.SpecialReturnHandler.__init__, Deduper=_Deduper
    )
    aliases: Sequence[tuple[int, int]] = ()

    def addDumbReturn(self, args: Sequence, results: list) -> list:  # noqa: N802
        results = super().addDumbReturn(args, results)
        for place, argument in self.aliases:
            # An update of the argument, which comes after this, must not reach it.
            results.insert(place, _of_its_own(args[argument]))
        return results


class InputMatcher(dynamo_bridge.GraphInputMatcher):
    """Knows which of a program's inputs are arguments by their buffers."""

    def __init__(self, places: dict, ids: list, values: list, argument_ids: set):
        super().__init__(places, ids, values, argument_ids)
        self._values = values

    def match(self, arguments: Mapping[int, int]) -> None:
        """Works it out; to be called once.

        Args:
            arguments: which argument is in which buffer, by `ownership.buffer_of`.
        """
        for i, value in enumerate(self._values):
            if buffer := ownership.buffer_of(value):
                argument = arguments.get(buffer)
                self.arg_idxs[i] = argument
                self.graph_input_xla_values[i] = value if argument is None else None
        self._values = []


_extract = with_globals(
    dynamo_bridge.extract_graph_helper,
    GraphInputMatcher=InputMatcher,
    SpecialReturnHandler=ReturnHandler,
)


def extract_graph(module: torch.fx.GraphModule, known: dict) -> tuple:
    """Does what dynamo_bridge.extract_graph_helper does, and knows the arguments.

    Nothing of the first call is kept.
    """
    torch_xla.sync(reset_scope=False)
    args = vars(module)["xla_args"]
    vars(module)["xla_args"] = ()
    values = _values(args)
    torch_xla._XLAC._xla_wait_device_ops([])
    arguments = ownership.separate_all(
        [_below(t) for t in values if isinstance(t, torch.Tensor)]
    )
    outputs, aliases = _aliases(module.graph)
    copied: dict[int, int] = {}
    num_results = sum(isinstance(output, torch.fx.Node) for output in outputs)
    if aliases and len(aliases) == num_results:
        copied = dict([aliases.popitem()])  # a program has a result
    found = _extract(_without(module, values, aliases, copied), known)
    donated = {
        place: i
        for place, i in aliases.items()
        if torch_xla._XLAC._get_buffer_donation(values[i])
    }
    if donated:  # known only now: the program takes the arguments' buffers
        copied |= donated
        aliases = {place: i for place, i in aliases.items() if place not in donated}
        found = _extract(_without(module, values, aliases, copied), known)
    (
        shardings,
        results,  # asked for their number alone, and so are the updated arguments
        program,
        updates,
        nones,
        matcher,
        returns,
        updated,
    ) = found
    matcher.match(arguments)
    returns.trace_inputs = returns.trace_outputs = returns.deduped_trace_outputs = None
    nones.none_poslist = [i for i, output in enumerate(outputs) if output is None]
    returns.aliases = [
        (
            len(updated) + place - outputs[:place].count(None),
            sum(isinstance(t, torch.Tensor) for t in args[:i]),
        )
        for place, i in aliases.items()
    ]
    kept = (
        shardings,
        (None,) * (len(results) + len(aliases)),
        program,
        updates,
        nones,
        matcher,
        returns,
        (None,) * len(updated),
    )
    for sizes, extracted in known.items():
        if extracted is found:
            known[sizes] = kept
    return kept


def install() -> None:
    """Has torch_xla's backend "openxla" extract graphs so too."""
    dynamo_bridge.extract_graph_helper = extract_graph  # type: ignore[assignment]


def _of_its_own(t: torch.Tensor) -> torch.Tensor:
    """The value of `t` as a tensor that is no view and has none.

    Of a view torch reads the base, which may be no argument at all: in the graph after
    `detach()`, or whenever the base was updated since.
    """
    if not torch._is_functional_tensor(t):
        return t
    torch._functionalize_sync(t)
    return torch._to_functional_tensor(torch._from_functional_tensor(t))


def _below(t: torch.Tensor) -> torch.Tensor:
    return torch._from_functional_tensor(t) if torch._is_functional_tensor(t) else t


# What gives the buffer of its argument.
_SAME_BUFFER = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


def _aliases(graph: torch.fx.Graph) -> tuple[list, dict[int, int]]:
    """Finds results that are aliases of inputs, as weight.detach() is.

    A backward may keep such a one. It is an input's buffer and so no result of any
    program, but torch_xla, which knows an input by its identity alone, waits for one.

    Returns:
        All results, and place among them -> which input is there.
    """
    inputs = {node: i for i, node in enumerate(graph.find_nodes(op="placeholder"))}
    (outputs,) = graph.output_node().args
    if not isinstance(outputs, (list, tuple)):
        outputs = (outputs,)
    aliases = {}
    for place, source in enumerate(outputs):
        while isinstance(source, torch.fx.Node) and source.target in _SAME_BUFFER:
            source = source.args[0]
        if source is not outputs[place] and source in inputs:
            aliases[place] = inputs[source]
    return list(outputs), aliases


def _without(
    module: torch.fx.GraphModule,
    args: tuple,
    aliases: Mapping[int, int],
    copied: Mapping[int, int],
) -> torch.fx.GraphModule:
    """The graph for `args` without the results that are aliases, and with copies."""
    graph = torch.fx.Graph()
    nodes: dict[torch.fx.Node, torch.fx.Node] = {}
    outputs = graph.graph_copy(module.graph, nodes)
    if aliases or copied:
        inputs = graph.find_nodes(op="placeholder")
        outputs = list(outputs if isinstance(outputs, (list, tuple)) else [outputs])
        for place, i in copied.items():
            outputs[place] = graph.call_function(
                torch.ops.aten.clone.default, (inputs[i],)
            )
        outputs = [o for place, o in enumerate(outputs) if place not in aliases]
    graph.output(tuple(outputs) if isinstance(outputs, list) else outputs)
    for node in reversed(graph.nodes):
        if node.target in _SAME_BUFFER and not node.users:
            graph.erase_node(node)
    result = torch.fx.GraphModule(module, graph)
    vars(result)["xla_args"] = args
    return result


def _values(args: Sequence[object]) -> tuple:
    """The arguments, each tensor of its own; what is given twice is one tensor still.

    As a cache is that a graph reads beside updating it. Nor does Dynamo take other
    tensors then, but where both are one again.
    """
    found: dict[int, torch.Tensor] = {}
    values = []
    for t in args:
        if isinstance(t, torch.Tensor):
            own = _of_its_own(t)
            t = found.setdefault(id(_below(own)), own)
        values.append(t)
    return tuple(values)
