"""Keeps a program that overwrites a buffer from taking it away from another tensor.

torch_xla gives several tensors one buffer where it can: after `cache.copy_(template)`,
`cache[:] = template`, `template.to(copy=True)` or load_state_dict both hold the
template's. A program that is to update the cache in place is given that buffer and
leaves none behind, so the template's values would be lost. And a graph that has yet to
read the cache (`m = cache.sum()`, not computed so far) holds the buffer too, and would
fail when it runs.

So every update in place asks first who else holds the buffer: `protect`. A graph that
waits to read it is run before; a tensor that shares it is given a copy of its own. In
the usual case, where nobody else does, this is a look at two counters.

    lazily               the front calls `protect`
    backend "xla_ops"    each call of a program protects the caches that it updates
    backend "openxla"    the graph has a node, torch.ops.xla_ops.owned, that torch_xla
                         runs at each call, since it is none that XLA could take

Tested by tests/core/test_ownership.py.
"""

from __future__ import annotations

import functools
import pathlib
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import cast

import torch

from .. import _runtime
from . import handlers
from .tracing import is_plain, node_of, untraced

NAMESPACE = "xla_ops"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_library.define("owned(Tensor[] caches) -> Tensor[]")

# Held by a call of a program from its look at who holds the buffers until the tensors
# that it updates have their new ones, and by what traces one. Of two calls, one would
# take a buffer that the other is about to read. What a trace leaves is a lazy graph of
# the device, of which whoever computes all that is pending would compute a part.
LOCK = threading.RLock()

# Modules whose threads refresh progress bars and serve notebooks, whose cells run in
# the main thread.
_NEVER_COMPUTE = frozenset(
    {
        "IPython.core.history",
        "ipykernel.control",
        "ipykernel.heartbeat",
        "ipykernel.iostream",
        "ipykernel.parentpoller",
        "tqdm._monitor",
        "zmq.utils.garbage",
    }
)
# Where torch defines the autograd function of a compiled forward.
_AOT_FORWARD = "_functorch/_aot_autograd/runtime_wrappers.py"
# The release whose lazy tensors lazy_tensors.cc knows.
_TORCH = "2.9.0"
# A program that was started holds its results until it has been handed over to the
# device, which takes longer on a busy host; so long the next one could not start
# either. Nothing is to be waited for then but what torch_xla lets go of right after.
_HANDOVER_S = 5e-3
_AFTERWARDS_S = 20e-3


def protect(tensors: Sequence[torch.Tensor], *, finish_reads: bool) -> None:
    """Makes each tensor the only holder of its buffer.

    Args:
        tensors: of an XLA device, as users hold them.
        finish_reads: whether graphs that wait to read a tensor have to run first. A
            lazy graph may hold the update itself too, and orders both.
    """
    held = [value for t in tensors if (value := _value(t)) is not None]
    _give_data(held)
    found = _holders(held)
    waits = finish_reads and any(data == 0 and node for data, node in found)
    if waits and not _is_traced():
        compute(held)
        found = _holders(held)
    if all(_is_free(holders, finish_reads) for holders in found):
        return
    # Before a program is extracted nothing may run, but it must meet no shared buffer.
    is_traced = _is_traced()
    finish_reads = finish_reads and not is_traced
    for tensor in held:
        _protect_one(tensor, finish_reads, num_clones=int(is_traced))


def give_away(tensors: Sequence[torch.Tensor]) -> None:
    """Has the program that is extracted now take the tensors' buffers.

    Not where torch_xla runs a graph's nodes before that, to see what they are: what is
    run of them (an operation that XLA has not, and what it needs) would take them.
    """
    if _is_traced():
        return
    import torch_xla

    for t in tensors:
        torch_xla._XLAC._set_buffer_donation(t, True)


def compute(tensors: Sequence[torch.Tensor]) -> None:
    """Computes what is pending of `tensors`, with all else that is pending.

    The new value of a tensor by itself would be given the old one's buffer, although
    other graphs have yet to read that. Beside other threads it is all the same computed
    by itself, into another buffer.
    """
    import torch_xla

    xlac = torch_xla._XLAC
    with LOCK:
        if may_compute_all():
            xlac._xla_sync_live_tensors(str(tensors[0].device), [], True)
            xlac._xla_wait_device_ops([])
        else:
            give_buffers(tensors)


def may_compute_all() -> bool:
    """Whether no other thread can be at work on a tensor of the device.

    torch_xla makes a tensor that comes from the host as zeros which then take their
    values. Whoever computes all that is pending in between leaves zeros, silently.
    """
    return all(map(_never_computes, threading.enumerate()))


def _never_computes(thread: threading.Thread) -> bool:
    """Whether a thread is this one, or one that leaves tensors alone."""
    if thread.ident == threading.get_ident():
        return True
    if _is_of_autograd(thread):
        return True
    # A Thread of the standard library runs a function, which it forgets at its end.
    target = getattr(thread, "_target", None)
    owner = getattr(target, "__module__", None) or type(thread).__module__
    return owner in _NEVER_COMPUTE


def _is_of_autograd(thread: threading.Thread) -> bool:
    """Whether torch runs backwards in it, as the threads that wait for them ask it to.

    Python knows it, for the rest of the process, from a backward on in which Python
    asked what thread it is in, as torch.compile does.
    """
    try:
        name = pathlib.Path(f"/proc/self/task/{thread.native_id}/comm").read_bytes()
    except OSError:
        return False
    return name.startswith(b"pt_autograd_")


def give_buffers(tensors: Sequence[torch.Tensor]) -> None:
    """Has each tensor, pending or not used so far, in a buffer, and takes none away."""
    import torch_xla

    torch_xla._XLAC._xla_sync_multi(
        list(tensors), devices=[], wait=True, sync_xla_data=False
    )


def is_owner(value: torch.Tensor, readers: Sequence[torch.Tensor]) -> bool:
    """Whether a lazy graph that updates a value of torch_xla's may take its buffer.

    Not from a copy that the same graph has yet to make, as of a clone: whoever reads
    the copy before that graph runs has it take the very buffer that is given away.

    Args:
        readers: tensors that are known to wait to read the value; they save a look at
            all tensors that are alive.
    """
    _give_data([value])
    (holders,) = _holders([value])
    if not _is_free(holders, finish_reads=False):
        return False
    data, node = holders
    if data == 0 or node <= 1:
        return True
    below = [
        torch._from_functional_tensor(t) if torch._is_functional_tensor(t) else t
        for t in readers
    ]
    return not _runtime.is_copied(value._cdata, [t._cdata for t in below])


def _protect_one(tensor: torch.Tensor, finish_reads: bool, num_clones: int) -> None:
    if _is_free_soon(tensor, finish_reads, num_clones):
        return
    import torch_xla

    xlac = torch_xla._XLAC
    (pending,) = xlac._check_tensor_need_materialization([tensor])
    if pending:
        return  # its value will have a buffer of its own
    if finish_reads:
        compute([tensor])
        if _is_free(_holders([tensor])[0], finish_reads):
            return
    separate(tensor)


def separate(value: torch.Tensor) -> None:
    """Gives torch_xla's own tensor, whose buffer others hold, a copy of it."""
    import torch_xla

    xlac = torch_xla._XLAC
    own = torch.clone(value)  # torch_xla gives a clone a buffer of its own
    xlac._xla_sync_multi([own], devices=[], wait=True, sync_xla_data=True)
    xlac._replace_xla_tensor(value, own)


def separate_all(values: Sequence[torch.Tensor]) -> dict[int, int]:
    """Gives each tensor of torch_xla's that has the buffer of one before it a copy.

    Returns:
        Buffer -> which tensor has it; no empty ones.
    """
    found: dict[int, int] = {}
    for i, value in enumerate(values):
        buffer = buffer_of(value)
        if buffer in found:
            if values[found[buffer]] is value:
                continue  # one tensor, given twice
            separate(value)
            buffer = buffer_of(value)
        if buffer:
            found[buffer] = i
    return found


def buffer_of(tensor: torch.Tensor) -> int:
    """What tells the buffer of a tensor that has been computed from all others.

    0 of an empty one.
    """
    import torch_xla

    if not tensor.numel():
        return 0
    if handlers.is_spmd():  # a buffer on each device
        return torch_xla._XLAC._get_tensors_handle([tensor])[0]
    return torch_xla._XLAC._unsafe_buffer_pointer(tensor)


def _give_data(tensors: list[torch.Tensor]) -> None:
    """Has tensors that have a buffer by way of a node alone hold it themselves.

    A copy_ leaves such a node, which it shares, and with it the id by which the next
    lazy graph would give the template's buffer away.
    """
    import torch_xla

    xlac = torch_xla._XLAC
    found = zip(tensors, _holders(tensors), strict=True)
    nodes = [t for t, (data, node) in found if data == 0 and node]
    pending = xlac._check_tensor_need_materialization(nodes) if nodes else []
    ready = [t for t, is_pending in zip(nodes, pending, strict=True) if not is_pending]
    if ready:
        xlac._xla_sync_multi(ready, devices=[], wait=False, sync_xla_data=False)


def _is_free(holders: tuple[int, int], finish_reads: bool, num_clones: int = 0) -> bool:
    """Whether the tensor with these `BufferHolders` is its buffer's only holder.

    But for as many clones, which torch_xla holds while it runs a graph's nodes.
    """
    data, node = holders
    if data == 0:
        # Not computed yet.
        return node <= 1 or not finish_reads
    others = data - 1 - (node > 0)
    return 0 <= others <= num_clones and (node <= 1 or not finish_reads)


def renew(views: Sequence[torch.Tensor]) -> None:
    """Has views that were not computed yet wait for what was written since.

    The next sync computes all views that are alive, and a graph that needs a cache both
    as it was and as it is holds it twice. A view that was computed is made anew when it
    is read.
    """
    views = [view for view in views if torch._is_functional_tensor(view)]
    if not views:
        return
    import torch_xla

    values = [torch._from_functional_tensor(view) for view in views]
    pending = torch_xla._XLAC._check_tensor_need_materialization(values)
    for view, waits in zip(views, pending, strict=True):
        if waits:
            torch._functionalize_sync(view)


def _is_free_soon(tensor: torch.Tensor, finish_reads: bool, num_clones: int) -> bool:
    """Whether it is once the program that was started last is on its way."""
    for limit in (_HANDOVER_S, _AFTERWARDS_S):
        end = time.monotonic() + limit
        while time.monotonic() < end:
            (holders,) = _holders([tensor])
            if _is_free(holders, finish_reads, num_clones):
                return True
            data, node = holders
            must_wait = data >= 2 and (node <= 1 or not finish_reads)
            if not must_wait:
                return False
            time.sleep(20e-6)
        if limit == _HANDOVER_S:
            await_handover(tensor)
    return False


def await_handover(value: torch.Tensor) -> None:
    """Waits until the program that was started last is handed over to the device.

    Not for its end: the next one is to be started beside it. Raises what it raised
    where it could not be started.

    Args:
        value: any tensor of torch_xla's that has a buffer, or is to have one by then:
            of those it computes nothing, and waits for its turn to start a program.
    """
    import torch_xla

    torch_xla._XLAC._xla_sync_multi(
        [value], devices=[], wait=False, sync_xla_data=False
    )


def _value(t: torch.Tensor) -> torch.Tensor | None:
    """torch_xla's own tensor below `t`; None of a fake one, which has no buffer."""
    if not is_plain(t):
        return None
    if torch._is_functional_tensor(t):
        torch._functionalize_sync(t)
        t = torch._from_functional_tensor(t)
    return t if is_plain(t) and t.device.type == "xla" else None


def _holders(tensors: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
    if not tensors:
        return []
    _load()
    return _runtime.buffer_holders([t._cdata for t in tensors])


@functools.cache
def _load() -> None:
    """Raises RuntimeError where torch's lazy tensors are not those that are known."""
    if torch.__version__.split("+")[0] != _TORCH:
        raise RuntimeError(
            f"xla_ops: torch must be {_TORCH} for XLA tensors to be updated in place,"
            f" got {torch.__version__}"
        )
    import _XLAC
    import torch_xla

    library = pathlib.Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    probe = _value(torch.zeros(1, device=torch_xla.device()))
    assert probe is not None
    _runtime.load_lazy_tensors(str(library), _XLAC.__file__, probe._cdata)
    known = torch_xla._XLAC._xla_get_tensor_id(probe)
    if _runtime.lazy_tensor_id(probe._cdata) != known:
        raise RuntimeError("xla_ops: torch_xla must be 2.9.0, got another layout")


def _is_traced() -> bool:
    """Whether torch_xla runs a graph's nodes only to see what they are.

    It does before it extracts a program, on the real tensors, of each of which it holds
    a clone then. Looked at where a tensor is held by others alone.
    """
    return _interpreter() is not None


def _interpreter() -> tuple[torch.fx.Interpreter, tuple] | None:
    """What of torch_xla's runs a graph's nodes, further up in this thread, and on what.

    None where nothing does.
    """
    bridge = sys.modules.get("torch_xla._dynamo.dynamo_bridge")
    if bridge is None:
        return None
    theirs = (bridge.UnsupportedNodesCollector, bridge.InputCollector)
    run = torch.fx.Interpreter.run.__code__
    for frame in _callers():
        # To look at a frame's variables keeps what they are, while the frame lasts.
        if frame.f_code is run and isinstance(frame.f_locals["self"], theirs):
            return frame.f_locals["self"], frame.f_locals["args"]
    return None


def _callers() -> Iterator[FrameType]:
    """The frames above the function that asks, in this thread, innermost first."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back


def owned(cache: torch.Tensor) -> torch.Tensor:
    """In a graph that is traced: `cache`, protected each time the graph runs.

    A graph has one node for all its caches, since a call costs as much as many caches.
    """
    result = torch.ops.xla_ops.owned.default([cache])[1]
    node = node_of(result)
    if node is not None:
        _join(node)
    return result


def _join(result: torch.fx.Node) -> None:
    """Moves the cache of `result`'s call over to the first such call of the graph."""
    call = cast("torch.fx.Node", result.args[0])
    first, *_ = result.graph.find_nodes(op="call_function", target=call.target)
    if first is call:
        return
    first.args = ([*first.args[0], *cast("list[torch.fx.Node]", call.args[0])],)
    first.meta["val"] = [*first.meta["val"], *call.meta["val"][1:]]
    for other in list(call.users):
        if other is not result:
            result.graph.erase_node(other)
    result.args = (first, len(first.args[0]))
    result.graph.erase_node(call)


# A result on the CPU: by this torch_xla takes the node for one that XLA cannot run, and
# calls it at each step, before the program that needs its other results.
_NOTHING = torch.empty(0)


def _owned(caches: list[torch.Tensor]) -> list[torch.Tensor]:
    traced = _interpreter()
    if traced is not None:
        from . import division

        interpreter, inputs = traced
        division.check(cast("torch.fx.Graph", interpreter.module.graph))
        tensors = [t for t in inputs if isinstance(t, torch.Tensor)]
        _require_updatable(tensors, caches)
    protect(caches, finish_reads=True)
    return [_NOTHING, *caches]


def _require_updatable(
    inputs: Sequence[torch.Tensor], caches: Sequence[torch.Tensor]
) -> None:
    """Raises ValueError where torch gives up after the program has run.

    By then the program has taken the buffers of all caches, of which none has its new
    one: torch updates no tensor of inference mode outside it, and keeps none for a
    backward. Asked once for each graph, since Dynamo makes another one for tensors of
    the other kind, and in the other mode.

    Args:
        inputs: the graph's, as users hold them.
        caches: those that it updates, as torch_xla has them.
    """
    if torch.is_inference_mode_enabled():
        return
    for t in inputs:
        if not t.is_inference():
            continue
        value = _value(t)
        if any(value is cache for cache in caches):
            raise ValueError(
                "xla_ops: a cache made under torch.inference_mode() must be updated"
                " under it by a function that is compiled for openxla, got one of shape"
                f" {list(t.shape)} outside; call the function under it, make the cache"
                " under torch.no_grad(), or take the backend xla_ops"
            )
        if _is_differentiated():
            raise ValueError(
                "xla_ops: an argument of a differentiated function that is compiled for"
                " openxla and updates a cache must not be made under"
                f" torch.inference_mode(), got one of shape {list(t.shape)}; make it"
                " under torch.no_grad(), clone it outside, or take the backend xla_ops"
            )


def _is_differentiated() -> bool:
    """Whether the graph is a forward that AOTAutograd runs to keep what it returns."""
    for frame in _callers():
        code = frame.f_code
        if code.co_name == "forward" and code.co_filename.endswith(_AOT_FORWARD):
            return True
    return False


_library.impl("owned", untraced(_owned), "XLA")
torch.library.register_fake(
    f"{NAMESPACE}::owned",
    lambda caches: [torch.empty(0), *(torch.empty_like(cache) for cache in caches)],
    lib=_library,
)
