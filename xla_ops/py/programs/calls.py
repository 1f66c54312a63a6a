"""What the ways to call a program share: its hash, and a call by that."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures

import torch
import torch_xla
import torch_xla.debug.metrics as met
from torch_xla._dynamo import dynamo_bridge

from ..core import ownership
from . import compile_options, kept, small_buffers

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


def is_lost(tensor: torch.Tensor) -> bool:
    """Whether the program that was to compute a tensor could not be started."""
    if not _xlac._is_placecholder(tensor):
        return False
    ownership.await_handover(tensor)
    lost: bool = _xlac._is_placecholder(tensor)
    return lost


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
# For those that update arguments, such as a model's steps: each takes memory on the
# host, and on a GPU for the operands of the kernels among which XLA chooses.
_THREADS_OF_UPDATES = 4


class Graph:
    """What a program has to compute, from when it is traced until it is compiled.

    Attributes:
        computed: the results; further ones are added behind them where the graph's hash
            is another's.
        digest: of its HLO, the buffers that it overwrites, and its options.
        options: XLA's for it, as compile_options.encode has them.
        donors: the arguments whose buffers it overwrites.
        updates: whether some results are new values of arguments.
        program: its hash, once it is compiled; None of an empty graph.
    """

    def __init__(
        self,
        computed: list[torch.Tensor],
        args: Sequence[torch.Tensor],
        donated: Sequence[int],
        updates: bool,
        options: bytes = b"",
    ):
        self.computed = computed
        self.options = options
        self.donors = [args[i] for i in donated]
        self.updates = updates
        self.program: bytes | None = None
        self.digest = ""
        if computed:
            hlo = _xlac._get_xla_tensors_hlo(computed)
            text = f"{list(donated)}\n{options.hex()}\n{hlo}"
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
        with _donating(graph.donors):
            program = _xlac._get_graph_hash(graph.computed)
            known = _known(program)
            if known in (None, graph.digest):
                is_new = _compile([graph]) > 0
                if is_new or known == graph.digest:
                    _note(program, graph, is_new)
                    return
        graph.computed.append(
            torch.empty((attempt, 0), device=graph.computed[0].device)
        )
    raise RuntimeError(
        "replay: the graph's hash must be its own, got one of another program ten times"
    )


def compile_beside(
    graphs: Sequence[Graph], on_compiled: Callable[[], object] | None = None
) -> None:
    """Compiles graphs, on a thread each where they overwrite the same buffers.

    Args:
        on_compiled: called for each, on this thread.
    """
    groups: dict[tuple, list[Graph]] = {}
    for graph in graphs:
        donors = tuple(sorted(ownership.buffer_of(t) for t in graph.donors))
        groups.setdefault((donors, graph.updates), []).append(graph)
    tell = on_compiled or (lambda: None)
    for group in groups.values():
        _compile_group(group, tell)
    for graph in graphs:
        if graph.program is None:
            compile_graph(graph)
            tell()


def _compile_group(graphs: Sequence[Graph], tell: Callable[[], object]) -> None:
    """Of one set of buffers that they overwrite; may leave some to be compiled."""
    first: dict[bytes, Graph] = {}
    with _donating(graphs[0].donors):
        for graph in graphs:
            if graph.computed:
                program = _xlac._get_graph_hash(graph.computed)
                if _known(program) is None:
                    first.setdefault(program, graph)
        if len(first) > 1:
            small_buffers.keep_apart(graphs[0].computed[0].device)
            num_compiled = _compile(list(first.values()), tell)
            # Else torch_xla had one of the hashes, of who knows which program.
            if num_compiled == len(first):
                for program, graph in first.items():
                    _note(program, graph, is_new=True)


@contextlib.contextmanager
def _donating(tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """Has torch_xla take graphs for such as overwrite these tensors' buffers."""
    for t in tensors:
        _xlac._set_buffer_donation(t, True)
    try:
        with dynamo_bridge.alias_with_buffer_donor_config():
            yield
    finally:
        for t in tensors:
            _xlac._set_buffer_donation(t, False)


def _known(program: bytes) -> str | None:
    return _computes.get(program) or kept.recall(program)


def _compile(graphs: Sequence[Graph], tell: Callable[[], object] = lambda: None) -> int:
    """Has torch_xla compile graphs; returns how many it had not."""
    before = met.counter_value("UncachedCompile") or 0
    if len(graphs) == 1:
        _compile_one(graphs[0])
    else:
        most = _THREADS_OF_UPDATES if graphs[0].updates else _THREADS
        with futures.ThreadPoolExecutor(min(len(graphs), most)) as pool:
            compiling = [pool.submit(_compile_one, graph) for graph in graphs]
            for done in futures.as_completed(compiling):
                done.result()
                tell()
    return (met.counter_value("UncachedCompile") or 0) - before


def _compile_one(graph: Graph) -> None:
    with compile_options.given(graph.options):
        _xlac._xla_warm_up_cache(graph.computed, [])


def _note(program: bytes, graph: Graph, is_new: bool) -> None:
    graph.program = program
    _computes[program] = graph.digest
    if is_new:
        kept.remember(program, graph.digest)
