"""Sums and gathers between processes that have a device each, inside programs.

On a GPU they are XLA's own collectives, by NCCL, and, where the processes are of one
host, those of few rows a custom call (peers.py). torch_xla's CPU client has none
between processes; there a custom call does the same through memory that the processes
share, so that a model in parts runs on a laptop by the programs it has on GPUs.

    group = processes.join(torch.distributed.group.WORLD)    # of gloo

    @replay
    def step(x, weight):
        with group.in_order():
            return group.all_reduce(x @ weight)

Every process has to call the same programs in the same order.

Tested by tests/programs/test_processes.py.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import tempfile
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from .. import _runtime
from ..core import gradients, handlers, paths
from . import collective, peers

_OP = "host_collective"
_call_host = collective.define(_OP, handlers.HOST, "group", "call")

_SLOT_BYTES = 1 << 20  # what a process hands over at a time
_STATE_BYTES = 64 * 64  # HostGroupBytes, in host_collective.h


class Group:
    """Processes that compute together, and this one's place among them.

    Attributes:
        rank, size: of this process, and how many there are.
    """

    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size

    @contextmanager
    def in_order(self) -> Iterator[None]:
        """Inside a program's function: its collectives run in the order of the text.

        Those that need no other's result might otherwise run in another order on
        another process, and wait for each other for ever.
        """
        yield

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of what the processes give, the same bits for each of them.

        Raises:
            RuntimeError: `x` requires a gradient, which no collective has.
        """
        raise NotImplementedError

    def all_reduce_add_rms_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float = 1e-6,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`fused_add_rms_norm` of `all_reduce(x)`: its norm, and the sum of both.

        One call where few rows go through GPUs' memory, two elsewhere.

        Args:
            x: [..., hidden], what this process adds.
            residual: like `x`, the same for each process.
            weight: [hidden], of the same dtype.
            eps: added to the mean square; positive.

        Raises:
            RuntimeError: `x` requires a gradient, which no collective has.
        """
        norm = torch.ops.xla_ops.fused_add_rms_norm_functional
        out, total = norm(self.all_reduce(x), residual, weight, eps)
        return out, total

    def all_gather(self, x: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """What the processes give, in the order of ranks, one behind the other.

        Raises:
            IndexError: `x` has no dimension `dim`.
            RuntimeError: `x` requires a gradient, which no collective has.
        """
        raise NotImplementedError


def _dimension(x: torch.Tensor, dim: int) -> int:
    """`dim` of `x`, counted from the first."""
    rank = x.dim()
    if not -rank <= dim < rank:
        raise IndexError(
            f"processes: dim must be a dimension of the tensor, which has {rank}, got"
            f" {dim}"
        )
    return dim % rank


def _joined(stacked: torch.Tensor, dim: int) -> torch.Tensor:
    """What [size, *shape] holds, one behind the other in dimension `dim` of shape."""
    return stacked.movedim(0, dim).flatten(dim, dim + 1)


def _refuse_gradient(call: str, x: torch.Tensor) -> None:
    """At the call: XLA's own collectives lose it, and torch warns of ours alone."""
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(gradients.message(f"programs.processes.{call}", "x"))


class XlaGroup(Group):
    """All processes of the client, by XLA's own collectives.

    Args:
        rank, size: of this process, and how many there are.
        store: that all of them have.
    """

    def __init__(self, rank: int, size: int, store: dist.Store):
        super().__init__(rank, size)
        self._store = store
        self._calls: list[str] | None = None  # of the function that is traced
        self._traced: set[str] = set()

    @contextmanager
    def in_order(self) -> Iterator[None]:
        """As in `Group`; XLA orders the calls itself.

        Raises:
            RuntimeError: another process has other collectives in its place, for which
                each would wait until NCCL's timeout.
        """
        if self._calls is not None:
            yield
            return
        calls: list[str] = []
        self._calls = calls
        try:
            yield
        finally:
            self._calls = None
        self._compare(calls)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        import torch_xla.core.xla_model as xm

        self._note("all_reduce", x)
        total = xm.all_reduce(xm.REDUCE_SUM, x)
        assert isinstance(total, torch.Tensor)  # given a list it returns one
        return total

    def all_gather(self, x: torch.Tensor, dim: int = 0) -> torch.Tensor:
        import torch_xla.core.xla_model as xm

        dim = _dimension(x, dim)
        self._note(f"all_gather in dimension {dim}", x)
        # With pinned layouts torch_xla makes of it an all-reduce of the whole result.
        return xm.all_gather(x, dim=dim, pin_layout=False)

    def _note(self, call: str, x: torch.Tensor) -> None:
        _refuse_gradient(call.partition(" ")[0], x)
        if self._calls is not None:
            dtype = str(x.dtype).removeprefix("torch.")
            self._calls.append(f"{call} of {dtype}{list(x.shape)}")

    def _compare(self, calls: list[str]) -> None:
        """With the n-th function of other calls of those that were traced before.

        Whoever comes last finds what differs, and nobody waits: a rank may trace one
        function more than once, or not at all where it has its program already.
        """
        text = json.dumps(calls)
        if not calls or text in self._traced:
            return
        place = f"xla_ops/collectives/{len(self._traced)}/"
        self._traced.add(text)
        self._store.set(f"{place}{self.rank}", text)
        for other in range(self.size):
            key = f"{place}{other}"
            if other == self.rank or not self._store.check([key]):
                continue
            theirs = json.loads(self._store.get(key))
            if theirs != calls:
                pairs = itertools.zip_longest(calls, theirs, fillvalue="none")
                i, (mine, its) = next(
                    (i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1]
                )
                raise RuntimeError(
                    "processes: a program must have the same collectives on every rank,"
                    f" got {mine} on rank {self.rank} and {its} on rank {other}, as"
                    f" number {i}"
                )


class PeerGroup(XlaGroup):
    """As XlaGroup; within `in_order`, collectives of few rows are calls of peers.py.

    Args:
        rank, size, store: as XlaGroup's.
        peers: the number of the open group.
    """

    def __init__(self, rank: int, size: int, store: dist.Store, peers: int):
        super().__init__(rank, size, store)
        self._peers = peers
        self._last: torch.Tensor | None = None  # of the collectives that are traced

    @contextmanager
    def in_order(self) -> Iterator[None]:
        is_outermost = self._calls is None
        try:
            with super().in_order():
                yield
        finally:
            if is_outermost:
                self._last = None

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        if not self._orders(x):
            return super().all_reduce(x)
        if peers.can_sum(x, self.size):
            self._note("all_reduce", x)
            self._last = peers.all_reduce(x, self._last, self._peers, self.size)
        else:
            self._last = super().all_reduce(self._behind_last(x))
        return self._last

    def all_reduce_add_rms_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float = 1e-6,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        fits = peers.can_norm(x, residual, weight, self.size)
        if not fits or not self._orders(x):
            return super().all_reduce_add_rms_norm(x, residual, weight, eps)
        self._note("all_reduce", x)
        self._last, total = peers.add_rms_norm(
            x, residual, weight, eps, self._last, self._peers
        )
        return self._last, total

    def all_gather(self, x: torch.Tensor, dim: int = 0) -> torch.Tensor:
        if not self._orders(x):
            return super().all_gather(x, dim)
        dim = _dimension(x, dim)
        if not peers.can_gather(x, self.size):
            self._last = super().all_gather(self._behind_last(x), dim)
            return self._last
        self._note(f"all_gather in dimension {dim}", x)
        self._last = peers.all_gather(x, self._last, self._peers, self.size)
        return _joined(self._last, dim)

    def _orders(self, x: torch.Tensor) -> bool:
        """Whether a collective of `x` has a place in the order.

        XLA takes what has no element out of a program, and an order with it.
        """
        return self._calls is not None and x.numel() > 0

    def _behind_last(self, x: torch.Tensor) -> torch.Tensor:
        """`x`, for a collective of XLA's, which is to follow a call of ours.

        Where another rank has the two in the other order, both would wait for ever.
        """
        if self._last is None:
            return x
        import torch_xla

        # They take their new values in place.
        pair = [x.clone(), self._last.clone()]
        torch_xla._XLAC._xla_optimization_barrier_(pair)
        return pair[0]


class HostGroup(Group):
    """Processes of one host, whose devices are XLA:CPU's.

    Sums are of float32, float16 and bfloat16, and gathers of any type but complex ones:
    others raise ValueError.

    Args:
        rank, size: of this process, and how many there are.
        path: of a file that `make_file` has made, the same for all.
        timeout_ms: how long to wait for another process.

    Raises:
        ValueError: the file or the place is not as it has to be.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        path: str,
        timeout_ms: int = collective.TIMEOUT_MS,
    ):
        super().__init__(rank, size)
        library = paths.op_library(_OP, "cpu")
        # Never closed: the lock on it shows that this process lives.
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        (self._group,) = _runtime.plan(
            library,
            "xla_ops_host_group_join",
            (fd, rank, size, _SLOT_BYTES, timeout_ms),
            1,
        )
        # Within in_order alone: what a program's trace has left would be computed again
        # by the next graph.
        self._is_ordered = False
        self._last: torch.Tensor | None = None
        self._calls = 0

    @staticmethod
    def make_file(size: int) -> str:
        """Makes the file of a group of `size` processes, in memory where it can be.

        Raises:
            OSError: no folder has room for it.
        """
        try:
            return _file_of_zeros("/dev/shm", size)
        except OSError:
            return _file_of_zeros(None, size)

    @contextmanager
    def in_order(self) -> Iterator[None]:
        if self._is_ordered:
            yield
            return
        self._is_ordered = True
        try:
            yield
        finally:
            self._is_ordered, self._last, self._calls = False, None, 0

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return self._call(x, gathers=False)

    def all_gather(self, x: torch.Tensor, dim: int = 0) -> torch.Tensor:
        dim = _dimension(x, dim)
        return _joined(self._call(x, gathers=True), dim)

    def _call(self, x: torch.Tensor, *, gathers: bool) -> torch.Tensor:
        call = "all_gather" if gathers else "all_reduce"
        _refuse_gradient(call, x)
        if x.is_complex() if gathers else x.dtype not in collective.SUMMED:
            rule = "not be complex" if gathers else "be float32, float16 or bfloat16"
            raise ValueError(f"programs.processes.{call}: x must {rule}, got {x.dtype}")
        place = self._group, self._calls
        out = _call_host(x, self._last, self.size, gathers, *place)
        if self._is_ordered:
            self._last = out
            self._calls += 1
        return out


def _file_of_zeros(folder: str | None, size: int) -> str:
    fd, path = tempfile.mkstemp(prefix="xla_ops_group_", dir=folder)
    try:
        # Taken now: where the folder is full, a process that writes would be ended.
        os.posix_fallocate(fd, 0, _STATE_BYTES + size * _SLOT_BYTES)
    except OSError as error:
        os.unlink(path)
        error.filename = path
        raise
    finally:
        os.close(fd)
    return path


def set_ranks(
    cpu_group: dist.ProcessGroup,
    local_rank: int,
    local_size: int,
    environ: MutableMapping[str, str] = os.environ,
) -> None:
    """Tells a GPU client that is yet to start which process of how many this is.

    For processes that torchrun did not start. They agree on a port of the first one's
    host, at which their clients find each other.

    Args:
        cpu_group: all processes, in the order of ranks; of gloo.
        local_rank, local_size: of this process on its host, and how many are there.
    """
    rank, size = dist.get_rank(cpu_group), dist.get_world_size(cpu_group)
    place = None
    if rank == 0:
        with socket.socket() as free:
            free.bind(("", 0))
            place = environ.get("MASTER_ADDR", "127.0.0.1"), free.getsockname()[1]
    address, port = _of_first(cpu_group, place)
    environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_RANK=str(local_rank),
        LOCAL_WORLD_SIZE=str(local_size),
        MASTER_ADDR=address,
        XLA_COORDINATOR_PORT=str(port),
    )


def _of_first(cpu_group: dist.ProcessGroup, value: Any) -> Any:
    """What the first process gives; all have to call this."""
    values = [value]
    dist.broadcast_object_list(values, group=cpu_group, group_src=0)
    return values[0]


def join(cpu_group: dist.ProcessGroup) -> Group:
    """Joins the group of the processes of `cpu_group`, which all have to call this.

    Args:
        cpu_group: of gloo. On a GPU all processes of the client, which has been told of
            them by torchrun, xmp.spawn or `set_ranks`.

    Raises:
        ValueError: on a GPU, where the client knows of another number of processes.
    """
    rank, size = dist.get_rank(cpu_group), dist.get_world_size(cpu_group)
    if handlers.xla_platform() != handlers.HOST:
        return _join_client(cpu_group, rank, size)
    path = _of_first(cpu_group, HostGroup.make_file(size) if rank == 0 else None)
    try:
        group = HostGroup(rank, size, path)
        dist.barrier(cpu_group)  # all have it open: it needs no name now
    finally:
        if rank == 0:
            os.unlink(path)
    return group


def _join_client(cpu_group: dist.ProcessGroup, rank: int, size: int) -> XlaGroup:
    import torch_xla.runtime as xr
    from torch_xla._internal import pjrt

    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    pjrt.initialize_multiprocess(local_rank, local_size)
    xr._init_world_size_ordinal()
    if xr.world_size() != size or xr.global_ordinal() != rank:
        raise ValueError(
            f"processes: rank must be the client's, {xr.global_ordinal()} of"
            f" {xr.world_size()}, got {rank} of {size}"
        )
    store = _make_store(cpu_group, rank, size)
    if peers.can_be(size, local_size):
        from ..gpu import options

        (device,) = options.client_options(os.environ)["visible_devices"]
        opened = peers.open_group(cpu_group, device)
        if opened is not None:
            return PeerGroup(rank, size, store, opened)
    return XlaGroup(rank, size, store)


def _make_store(cpu_group: dist.ProcessGroup, rank: int, size: int) -> dist.Store:
    """A store of the group's own, at the first one's host."""
    store, place = None, None
    if rank == 0:
        address = os.environ.get("MASTER_ADDR", "127.0.0.1")
        store = dist.TCPStore(address, 0, size, is_master=True, wait_for_workers=False)
        place = address, store.port
    address, port = _of_first(cpu_group, place)
    return store or dist.TCPStore(address, port, size, wait_for_workers=False)
