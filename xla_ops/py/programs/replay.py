"""Programs that are traced once and then called by their hash, without torch.compile.

    from xla_ops.programs.replay import replay

    @replay
    def step(tokens, cache): ...

    step(tokens, cache)

The first call of a signature runs the function on lazy tensors, which computes nothing,
and compiles the graph that it leaves. Every further call looks the program up and runs
it: none of the function's Python, no guards, no lazy graph. For a decoder of 32 layers
that is half of the time that backend "xla_ops" takes on the host, and the first call
takes a quarter, since nothing but XLA has to compile.

Since nothing stands guard over a program but its key, the key holds all that may change
it: shapes, dtypes and the identity of tensors that are given twice, every other
argument by value, autocast, default dtype and the precision of products. And because
torch_xla's own key, a hash, takes graphs for one that differ in which input an
operation takes (pytorch/xla#8353), a program is held to the HLO it was compiled from.

Several threads may call programs, and trace them: `ownership.LOCK` has them take turns.
The rest of what other threads may do to a trace is found out, and it begins again.

Tested by test_replay.py, test_replay_threads.py and test_compile_calls.py of
tests/programs.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import (
    Callable,
    Generator,
    Hashable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from operator import itemgetter
from typing import Any

import torch
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.runtime as xr
from torch.utils import _pytree as pytree
from torch_xla.experimental.eager import eager_mode_context

from ..core import autograd, collected, in_place, interrupts, ownership, sharding
from . import arguments, compile_options
from .calls import Graph, compile_beside, compile_graph, run_cached
from .reads import Reads
from .traces import Traced

_xlac = torch_xla._XLAC
State = Iterable[torch.Tensor | torch.nn.Module]
_Options = Mapping[str, compile_options.Value]
Options = _Options | Callable[..., _Options] | None


class Replay:
    """A function of XLA tensors, replayed as a program. Made by `replay`."""

    def __init__(
        self, function: Callable, state: State = (), compile_options: Options = None
    ):
        functools.update_wrapper(self, function)
        self._options = compile_options
        self._function = function
        self._state = tuple(state) if isinstance(state, Iterator) else state
        self._programs: dict[Hashable, _Program] = {}
        self._shares: _Shares | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy, of a model that has one say, is traced with its own tensors."""
        return {**vars(self), "_programs": {}, "_shares": None}

    @property
    def num_programs(self) -> int:
        """How many signatures have been traced."""
        return len(self._programs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling() or collected.is_collecting():
            return self._function(*args, **kwargs)  # a part of another program
        leaves, form = arguments.flatten(args, kwargs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        arguments.refuse_transforms(tensors)
        with ownership.LOCK:
            key = self._key(leaves, tensors, form)
            try:
                program = self._programs.get(key)
            except TypeError as error:
                raise arguments.unhashable(leaves) or error from None
            if program is None:
                program = self._plan(leaves, tensors, form)
                for graph in program.build(tensors):
                    compile_graph(graph)
                self._add(key, program)
            return program(tensors)

    def _key(self, leaves: list, tensors: list[torch.Tensor], form: object) -> Hashable:
        """All that may change the program of a call."""
        if self._shares is None:
            self._shares = _Shares(_tensors_of(self._state))
        shares = self._shares.of(tensors)
        key: Hashable = (
            *(form, arguments.signature(leaves), shares),
            arguments.surroundings(),
        )
        if xr.is_spmd():
            key = (key, sharding.signature(tensors))
        return key

    def _plan(
        self, leaves: list, tensors: list[torch.Tensor], form: object
    ) -> _Program:
        arguments.check(leaves)
        # The function is kept, for a program that torch_xla drops; the tensors of this
        # call are not.
        places = [isinstance(leaf, torch.Tensor) for leaf in leaves]
        values = [
            None if is_tensor else leaf
            for leaf, is_tensor in zip(leaves, places, strict=True)
        ]

        def call(*given: torch.Tensor) -> Any:
            rest = iter(given)
            args, kwargs = arguments.unflatten(
                [
                    next(rest) if is_tensor else value
                    for value, is_tensor in zip(values, places, strict=True)
                ],
                form,
            )
            return self._function(*args, **kwargs)

        options = self._options
        if callable(options):
            args, kwargs = arguments.unflatten(leaves, form)
            options = options(*args, **kwargs)
        encoded = compile_options.encode(options or {})
        return _Program(call, tensors, _tensors_of(self._state), encoded)

    def _add(self, key: Hashable, program: _Program) -> None:
        self._programs[key] = program
        self._shares = None  # the state may have grown


def replay(
    function: Callable | None = None,
    *,
    state: State = (),
    compile_options: Options = None,
) -> Any:
    """Makes a function of XLA tensors one that is traced once and then replayed.

    The function must be pure, but for updates in place of its arguments and of `state`:
    its Python runs once a signature, beside other threads up to eight times. What it
    computes must depend on nothing but its arguments, `state`, and what the module's
    text names; a tensor that it closes over is taken as the constant that it is at the
    first call. Results have no gradient.

    Args:
        function: takes any tree (tuples, lists, dicts, what torch's pytree knows) of
            XLA tensors and of values that can be hashed, and returns a tree of tensors
            and values. A tensor that it updates by an op of this package, such as a KV
            cache, keeps its buffer.
        state: tensors and modules that the function uses or updates without being
            given them, such as a model and its caches. They may get new values between
            calls; a module's parameters must stay the same objects, and what is split
            over devices stay split as it was.
        compile_options: XLA's own for the function's programs, by their names in
            XLA_FLAGS without dashes, such as {"xla_gpu_enable_triton_gemm": False}; or
            what returns them, of the arguments of the call that is compiled. The CPU
            client takes none.

    Returns:
        A callable; as a decorator without arguments too.

    Raises:
        ValueError: at a call, where an argument is on another device or requires a
            gradient, or an op of this package would update a tensor that is no argument
            and not in `state`. (Torch's own operations do so once, at the first call.)
        TypeError: where an argument that is no tensor cannot be hashed, is hashed by
            its identity, as an object of a plain class is, or holds tensors; or an
            option has a value of another type.
        RuntimeError: XLA knows no option of a name.

    Example:
        >>> @replay
        ... def scaled(x, factor):
        ...     return x * factor
        >>> scaled(torch.ones(2, device="xla"), 3).cpu()
        tensor([3., 3.])
    """
    if function is None:
        return functools.partial(replay, state=state, compile_options=compile_options)
    return Replay(function, state, compile_options)


def compile_calls(
    calls: Iterable[tuple[Replay, Sequence]],
    on_compiled: Callable[[], object] | None = None,
) -> None:
    """Makes the programs of several calls, and runs none.

    They are compiled beside each other, where they update the same tensors in place or
    none, which for small programs takes as long as one of them where there are cores
    enough.

    Args:
        calls: replayed functions, and the positional arguments of a call of each.
        on_compiled: called whenever one is compiled, as for a progress bar.

    Raises:
        what the calls would raise.

    Example:
        >>> double, halve = replay(lambda x: x * 2), replay(lambda x: x / 2)
        >>> x = torch.ones(2, device="xla")
        >>> compile_calls([(double, (x,)), (halve, (x,))])
        >>> double(x).cpu()
        tensor([2., 2.])
    """
    with ownership.LOCK, eager_mode_context(False), contextlib.ExitStack() as stack:
        if ownership.may_compute_all():
            torch_xla.sync(reset_scope=False)
        graphs: list[Graph] = []
        unfinished: dict[tuple, tuple[Iterator[Graph], _Program]] = {}
        for function, args in list(calls):
            leaves, form = arguments.flatten(tuple(args), {})
            tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
            arguments.refuse_transforms(tensors)
            key = function._key(leaves, tensors, form)
            try:
                if key in function._programs or (function, key) in unfinished:
                    continue
            except TypeError as error:
                raise arguments.unhashable(leaves) or error from None
            program = function._plan(leaves, tensors, form)
            building = program.build(tensors, beside=True)
            stack.enter_context(contextlib.closing(building))
            graphs.append(next(building))
            unfinished[function, key] = building, program
        compile_beside(graphs, on_compiled)
        for (function, key), (rest, program) in unfinished.items():
            for graph in rest:  # of a trace that others have disturbed
                compile_graph(graph)
            function._add(key, program)


# How often a function is traced that other threads may have disturbed.
_MAX_TRACES = 8


class _Shares:
    """Tells which arguments are one tensor, or share memory as views do.

    A program knows its inputs apart, whatever they share, so one that was traced for
    tensors apart is not for a tensor and a view of it.
    """

    def __init__(self, state: Sequence[torch.Tensor]):
        self._state = tuple(state)  # kept, so that ids and storages stay theirs
        self._ids = {id(t): i for i, t in enumerate(state)}
        self._storages = {collected.storage_of(t): i for i, t in enumerate(state)}

    def of(self, tensors: Sequence[torch.Tensor]) -> tuple | None:
        """Returns what a program depends on of that; None where nothing is shared."""
        storages = [collected.storage_of(t) for t in tensors]
        apart = len(set(storages)) == len(storages)
        if apart and self._storages.keys().isdisjoint(storages):
            return None
        ids = [id(t) for t in tensors]
        return tuple(
            (ids.index(i), storages.index(s), self._ids.get(i), self._storages.get(s))
            for i, s in zip(ids, storages, strict=True)
        )


def _tensors_of(state: State) -> list[torch.Tensor]:
    found: dict[int, torch.Tensor] = {}
    for item in state:
        tensors: Iterable[torch.Tensor] = (item,)  # type: ignore[assignment]
        if isinstance(item, torch.nn.Module):
            tensors = (*item.parameters(), *item.buffers())
        found.update((id(t), t) for t in tensors if t.device.type == "xla")
    return list(found.values())


class _Program:
    """One program: the arguments' values go in, results come out."""

    def __init__(
        self,
        function: Callable,
        tensors: Sequence[torch.Tensor],
        state: Sequence[torch.Tensor],
        options: bytes,
    ):
        given = {id(t) for t in tensors}
        self._options = options
        self._function = function
        self._state = tuple(t for t in state if id(t) not in given)

    def build(
        self, tensors: Sequence[torch.Tensor], *, beside: bool = False
    ) -> Generator[Graph, None, None]:
        """Yields each graph that it needs compiled, until it can be called.

        Args:
            tensors: a call's.
            beside: whether graphs of other programs wait to be compiled.
        """
        with eager_mode_context(False):
            args = (*tensors, *self._state)
            traced = yield from self._compiled(args, beside)
        self._updates = list(traced.updates.items())
        self._donated = traced.donated
        self._outputs = traced.outputs
        self._form = traced.form

    def _compiled(
        self, args: tuple[torch.Tensor, ...], beside: bool
    ) -> Generator[Graph, None, Traced]:
        """Traces and has it compiled, until no other thread has had a part in it."""
        reads = Reads()
        given = len(args) - len(self._state)
        for _ in range(_MAX_TRACES):
            is_alone = ownership.may_compute_all() and not beside
            traced = Traced(self._function, args, given, reads, is_alone)
            try:
                if traced.has_run or reads.are_clear:
                    if not traced.has_run:
                        if beside:
                            traced.set_apart()
                        yield (
                            graph := Graph(
                                traced.computed,
                                args,
                                traced.donated,
                                bool(traced.updates),
                                self._options,
                            )
                        )
                        self._hash = graph.program
                        self._inputs = _inputs(traced, args)
                        if traced.is_whole():
                            return traced
                    if is_alone:
                        raise RuntimeError(
                            "replay: the function must not run lazy graphs, by"
                            " torch_xla.sync() or a compilation, got one that does"
                        )
            finally:
                traced.restore()
            del traced  # what is left of its graph is no part of the next one
        if not reads.are_clear:
            raise reads.error()
        raise RuntimeError(
            "replay: a function must be traced while no other thread runs lazy graphs,"
            f" by torch_xla.sync() or a compilation, got {_MAX_TRACES} traces of which"
            " one has run parts"
        )

    def __call__(self, tensors: Sequence[torch.Tensor]) -> Any:
        args = (*tensors, *self._state)
        if self._donated:
            ownership.protect([args[i] for i in self._donated], finish_reads=True)
        with interrupts.Uninterrupted():
            results = self._run(tensors, args)
            for argument, result in self._updates:
                in_place.adopt(args[argument], results[result])
        autograd.tell_written([args[argument] for argument, _ in self._updates])
        outputs = [output.take(results, args) for output in self._outputs]
        if self._form is None:
            return outputs[0]
        return pytree.tree_unflatten(outputs, self._form)

    def _run(
        self, tensors: Sequence[torch.Tensor], args: tuple[torch.Tensor, ...]
    ) -> list[torch.Tensor]:
        if self._hash is None:
            return []
        try:
            return run_cached(self._hash, self._inputs, args)
        except RuntimeError as error:
            if "Failed to get computation by hash" not in str(error):
                raise
        # torch_xla keeps so many programs, and no more.
        for graph in self.build(tensors):
            compile_graph(graph)
        return run_cached(self._hash, self._inputs, args)


def _inputs(traced: Traced, args: Sequence[torch.Tensor]) -> Callable:
    """Returns args -> the program's inputs, in its order."""
    ids, values = _xlac._get_tensors_xla_device_data_node(traced.computed)
    # A buffer has the number of the tensor that was read last while it held it. That
    # may be another argument by now, so only what has no buffer is known by number.
    places = {where: i for i, where in enumerate(traced.pointers) if where}
    empty = {traced.ids[i]: i for i, where in enumerate(traced.pointers) if not where}
    device = str(args[0].device if args else torch_xla.device())
    seed = _xlac._get_seed_info_id()
    picks: list[int | None] = []
    constants: list[torch.Tensor] = []
    for tensor_id, value in zip(ids, values, strict=True):
        where = ownership.buffer_of(value)
        i = places.get(where) if where else empty.get(tensor_id)
        # torch_xla takes every buffer that no tensor was given for the seed.
        if i is None and tensor_id == seed and _is_seed(value, device):
            picks.append(None)
        elif i is None:
            picks.append(len(args) + len(constants))
            constants.append(value)
        else:
            picks.append(i)
    fixed = tuple(constants)
    if None in picks:
        return lambda args: _with_seed((*args, *fixed), picks, device)
    if len(picks) == 1:
        (only,) = picks
        assert only is not None
        return lambda args: ((*args, *fixed)[only],)
    if not picks:
        return lambda args: ()
    pick = itemgetter(*picks)
    return (lambda args: pick((*args, *fixed))) if fixed else pick


def _is_seed(value: torch.Tensor, device: str) -> bool:
    seed = _xlac._get_base_seed_as_tensor(device)
    alike = (value.shape, value.dtype) == (seed.shape, seed.dtype)
    return alike and bool(value.cpu() == seed.cpu())


def _with_seed(values: tuple, picks: list[int | None], device: str) -> list:
    """The inputs of a program that draws random numbers, and a new seed for the next.

    As torch_xla.sync() advances it.
    """
    seed = _xlac._get_base_seed_as_tensor(device)
    state = 1012031 + _xlac._xla_get_rng_seed() * 7012063
    xm.set_rng_state(state % 2**64, device)
    return [seed if i is None else values[i] for i in picks]
