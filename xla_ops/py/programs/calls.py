"""What the ways to call a program share: its hash, and a call by that."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent import futures

import torch
import torch_xla
import torch_xla.debug.metrics as met
from torch_xla._dynamo import dynamo_bridge

from ..core import ownership
from . import kept, small_buffers

_xlac = torch_xla._XLAC

# What torch_xla's _run_cached_graph says of an argument that is not computed yet, and
# of one whose program failed.
_PENDING = "can not be a pending ir"
_FAILED = "handle->HasValue()"


def run_cached(
    program: bytes, inputs: Callable, args: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Runs a compiled program by its hash.

    No argument is asked whether work is pending on it: the program refuses one that is,
    before it runs, and only then is it computed.

    Args:
        program: hash of a program that torch_xla has compiled.
        inputs: makes the program's inputs, in its order, of `args`.
    """
    try:
        return torch_xla._XLAC._run_cached_graph(program, inputs(args))
    except RuntimeError as error:
        if _FAILED in str(error):
            raise _failed(args, inputs) from error
        if _PENDING not in str(error):
            raise
    finish(args)
    return torch_xla._XLAC._run_cached_graph(program, inputs(args))


def _failed(args: Sequence[torch.Tensor], inputs: Callable) -> RuntimeError:
    """Of a program of which an input has no value any more."""
    tensors = [t for t in args if t.device.type == "xla"]
    shapes = _lost(tensors)  # as a program failed that was to compute or update them
    if shapes:
        return RuntimeError(
            "xla_ops: an argument must have a value, got one that was lost in a program"
            f" that failed, of shape {shapes}; make it anew"
        )
    # torch_xla gives the buffer of what torch's own operations update away.
    return RuntimeError(
        "xla_ops: a tensor that a compiled function closes over must stay as it is, got"
        f" one that was updated in place, of shape {_lost(inputs(args))}; give it as an"
        " argument, or name it in replay's `state`"
    )


def _lost(tensors: Sequence[torch.Tensor]) -> str:
    lost = [t for t in tensors if _xlac._is_placecholder(t)]
    return ", ".join(str(list(t.shape)) for t in lost)


def finish(args: Sequence[torch.Tensor]) -> None:
    """Computes the arguments that are pending, and all that waits beside them."""
    tensors = [t for t in args if t.device.type == "xla"]
    if any(torch_xla._XLAC._check_tensor_need_materialization(tensors)):
        ownership.compute(tensors)


# What each program that was compiled here computes, by its hash in torch_xla.
_computes: dict[bytes, str] = {}
# XLA has threads of its own for each program.
_THREADS = 16


class Graph:
    """What a program has to compute, from when it is traced until it is compiled.

    Attributes:
        computed: the results; further ones are added behind them where the graph's hash
            is another's.
        digest: of its HLO, and of the buffers that it overwrites.
        updates: whether some of them are new values of arguments.
        program: its hash, once it is compiled; None of an empty graph.
    """

    def __init__(
        self, computed: list[torch.Tensor], donated: Sequence[int], updates: bool
    ):
        self.computed = computed
        self.updates = updates
        self.program: bytes | None = None
        self.digest = ""
        if computed:
            hlo = _xlac._get_xla_tensors_hlo(computed)
            text = f"{list(donated)}\n{hlo}"
            self.digest = hashlib.sha256(text.encode()).hexdigest()


def compile_graph(graph: Graph) -> None:
    """Compiles a graph, unless it is empty.

    A program that torch_xla has already under the graph's hash is taken only if it is
    known to be of the same HLO. Otherwise the graph gets a further result, of no
    element, until its hash is its own.
    """
    if not graph.computed:
        return
    small_buffers.keep_apart(graph.computed[0].device)
    for attempt in range(1, 10):
        with dynamo_bridge.alias_with_buffer_donor_config():
            program = _xlac._get_graph_hash(graph.computed)
            known = _known(program)
            if known in (None, graph.digest):
                is_new = _compile([graph.computed]) > 0
                if is_new or known == graph.digest:
                    _note(program, graph, is_new)
                    return
        graph.computed.append(
            torch.empty((attempt, 0), device=graph.computed[0].device)
        )
    raise RuntimeError(
        "replay: the graph's hash must be its own, got one of another program ten times"
    )


def compile_beside(graphs: Sequence[Graph]) -> None:
    """Compiles graphs that update nothing, on a thread each."""
    first: dict[bytes, Graph] = {}
    with dynamo_bridge.alias_with_buffer_donor_config():
        for graph in graphs:
            if graph.computed:
                program = _xlac._get_graph_hash(graph.computed)
                if _known(program) is None:
                    first.setdefault(program, graph)
        if len(first) > 1:
            small_buffers.keep_apart(graphs[0].computed[0].device)
            num_compiled = _compile([graph.computed for graph in first.values()])
            # Else torch_xla had one of the hashes, of who knows which program.
            if num_compiled == len(first):
                for program, graph in first.items():
                    _note(program, graph, is_new=True)
    for graph in graphs:
        if graph.program is None:
            compile_graph(graph)


def _known(program: bytes) -> str | None:
    return _computes.get(program) or kept.recall(program)


def _compile(graphs: list[list[torch.Tensor]]) -> int:
    """Has torch_xla compile graphs; returns how many it had not."""
    before = met.counter_value("UncachedCompile") or 0
    if len(graphs) == 1:
        _xlac._xla_warm_up_cache(graphs[0], [])
    else:
        with futures.ThreadPoolExecutor(min(len(graphs), _THREADS)) as pool:
            list(pool.map(lambda graph: _xlac._xla_warm_up_cache(graph, []), graphs))
    return (met.counter_value("UncachedCompile") or 0) - before


def _note(program: bytes, graph: Graph, is_new: bool) -> None:
    graph.program = program
    _computes[program] = graph.digest
    if is_new:
        kept.remember(program, graph.digest)
