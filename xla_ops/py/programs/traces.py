"""What a function leaves behind when it runs on lazy tensors: the graph of a program.

Tested by tests/programs/test_replay.py and tests/programs/test_replay_threads.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch_xla
import torch_xla.core.xla_model as xm
from torch.utils import _pytree as pytree

from ..core import collected, in_place, ownership
from . import reachable
from .calls import finish
from .reads import Reads

_xlac = torch_xla._XLAC


class _Result(NamedTuple):
    place: int

    def take(self, results: Sequence, args: Sequence) -> torch.Tensor:
        return results[self.place]


class _Argument(NamedTuple):
    place: int

    def take(self, results: Sequence, args: Sequence) -> torch.Tensor:
        return args[self.place]


class _CloneOfArgument(NamedTuple):
    place: int

    def take(self, results: Sequence, args: Sequence) -> torch.Tensor:
        return args[self.place].clone()


class _Constant(NamedTuple):
    value: object

    def take(self, results: Sequence, args: Sequence) -> object:
        return self.value


class Traced:
    """What a function leaves behind when it runs on lazy tensors.

    Attributes:
        computed: what the program has to compute: new values of arguments, then the
            results.
        updates: arguments that get a new value, and which of `computed` that is.
        donated: arguments whose buffer the program overwrites.
        outputs: how each leaf of the function's result is made.
        form: of the function's result; None of a lone tensor.
        has_run: whether somebody has computed what was traced, so that nothing of it is
            known.
        values: the tensor below each argument.
        ids, pointers: torch_xla's number and the buffer of each, before the trace.
    """

    def __init__(
        self,
        function: Callable,
        args: tuple[torch.Tensor, ...],
        num_given: int,
        reads: Reads,
        is_alone: bool,
    ):
        # Whatever is pending would become a part of the program.
        if is_alone:
            torch_xla.sync(reset_scope=False)
        else:
            ownership.give_buffers(reachable.tensors(function))
        xm.wait_device_ops()
        for t in args:
            torch._functionalize_sync(t)
        finish(args)
        ownership.give_buffers(args)
        # Arguments that share a buffer would be one to the trace.
        ownership.separate_all([torch._from_functional_tensor(t) for t in args])
        self._args = args
        self._num_given = num_given
        self.values = [torch._from_functional_tensor(t) for t in args]
        self.ids = [_xlac._xla_get_tensor_id(t) for t in self.values]
        self.pointers = [ownership.buffer_of(t) for t in self.values]
        # aten.copy_ overwrites the tensor below an argument: it alone does.
        self._saved = [torch.clone(t) for t in self.values]
        # Computed by whoever computes all that is pending.
        self._witness = torch.ones(1, device=torch_xla.device()) * 2
        self.updates: dict[int, int] = {}
        self.computed: list[torch.Tensor] = []
        self._new: list[torch.Tensor] = []
        places = {id(t): i for i, t in enumerate(args)}
        try:
            with (
                collected.collecting(args, self._witness) as updated,
                torch.inference_mode(False),
                torch.no_grad(),
                # What is compiled in there is a part of this program.
                torch.compiler.set_stance("force_eager"),
                reads.watching(),
            ):
                result = function(*args[:num_given])
            self.donated = sorted({places[id(t)] for t in updated})
            self.has_run = not collected.is_pending(self._witness)
            if not self.has_run:
                self._collect(result)
        except BaseException:
            self.restore()
            raise

    def _collect(self, result: object) -> None:
        for t in self._args:
            torch._functionalize_sync(t)  # updates through views
        self._new = now = [torch._from_functional_tensor(t) for t in self._args]
        pending = _xlac._check_tensor_need_materialization(now)
        self._arguments: dict[int, int] = {}
        for i, (value, is_pending) in enumerate(zip(now, pending, strict=True)):
            key = _xlac._xla_get_tensor_id(value)
            if key in self._arguments:
                continue  # one tensor, given twice
            self._arguments[key] = i
            if is_pending or ownership.buffer_of(value) != self.pointers[i]:
                self.updates[i] = len(self.computed)
                self.computed.append(value if is_pending else _copied(value))
        self._check_shares()
        self._results: dict[int, int] = {}
        if isinstance(result, torch.Tensor):
            leaves, self.form = [result], None
        else:
            leaves, self.form = pytree.tree_flatten(result)
        self.outputs = [self._output(leaf) for leaf in leaves]

    def _check_shares(self) -> None:
        """Raises ValueError where an update would show in another argument."""
        first: dict[int, int] = {}
        for i, t in enumerate(self._args):
            j = first.setdefault(collected.storage_of(t), i)
            if self._args[j] is not t and not self.updates.keys().isdisjoint((i, j)):
                raise ValueError(
                    f"replay: {self._name(i)} must not share memory with"
                    f" {self._name(j)}, which the function updates, got a view of it"
                    " or a detach(); make that inside the function"
                )

    def _name(self, i: int) -> str:
        if i < self._num_given:
            return f"tensor argument {i}"
        return f"tensor {i - self._num_given} of the state"

    def _output(self, leaf: object) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return _Constant(leaf)
        if leaf.device.type != "xla":
            raise ValueError(
                "replay: a result must be on an XLA device, got a tensor on"
                f" {leaf.device}"
            )
        for i, t in enumerate(self._args):
            if leaf is t:
                return _Argument(i)
        torch._functionalize_sync(leaf)
        value = torch._from_functional_tensor(leaf)
        key = _xlac._xla_get_tensor_id(value)
        if key in self._arguments:
            return _CloneOfArgument(self._arguments[key])
        if not collected.is_pending(value):
            where = ownership.buffer_of(value)
            if where and where in self.pointers:
                # A copy of what the argument was before any update.
                i = self.pointers.index(where)
                if i not in self.updates:
                    return _CloneOfArgument(i)
                value = _copied(value)
                key = _xlac._xla_get_tensor_id(value)
            else:
                return _Constant(leaf)
        if key not in self._results:
            self._results[key] = len(self.computed)
            self.computed.append(value)
        return _Result(self._results[key])

    def is_whole(self) -> bool:
        """Whether nothing of the graph was computed before it was compiled.

        What was would be a constant of the program.
        """
        needed = [self._witness, *self.computed]
        return all(_xlac._check_tensor_need_materialization(needed))

    def set_apart(self) -> None:
        """Keeps the graph in tensors of its own, so that others can be traced.

        Arguments get the values back that they had, which are still saved too: another
        thread that computes the graph takes their buffers.
        """
        self.computed = [torch.clone(t) for t in self.computed]  # of the same node
        self._restore_arguments()

    def restore(self) -> None:
        """Gives every argument the value back that it had, and the graph up."""
        self._restore_arguments()
        self._saved.clear()
        self.computed.clear()

    def _restore_arguments(self) -> None:
        for t, value, saved in zip(self._args, self.values, self._saved, strict=True):
            if collected.is_pending(value) or not _have_one_buffer(value, saved):
                _xlac._replace_xla_tensor(value, saved)
            if torch._from_functional_tensor(t) is not value:
                in_place.set_value(t, value)
            _xlac._set_buffer_donation(t, False)
        # The next sync would give an argument's buffer to its new value, if that is
        # still alive, as in a traceback.
        for value, new in zip(self.values, self._new, strict=False):
            if new is not value:
                _xlac._replace_xla_tensor(new, value)
        # Collectives of a lazy graph run in order, each after a token that the one
        # before it has left. The next graph would compute the traced ones again.
        for device in {str(t.device) for t in self._args} or {str(torch_xla.device())}:
            _xlac._set_all_reduce_token(device, None)


def _have_one_buffer(a: torch.Tensor, b: torch.Tensor) -> bool:
    try:
        return ownership.buffer_of(a) == ownership.buffer_of(b)
    except RuntimeError:  # a program has taken the buffer
        return False


def _copied(value: torch.Tensor) -> torch.Tensor:
    """A computation of what `value`, which is an argument's, is; a clone is none."""
    always = torch.ones((), dtype=torch.bool, device=value.device)
    return torch.where(always, value, value)
