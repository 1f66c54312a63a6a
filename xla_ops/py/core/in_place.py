"""In-place semantics for every op that updates a tensor: one front, no copies.

A mutable torch op whose kernel sits on the XLA key either raises or, under
torch.compile, silently loses writes through views. So a mutable op here is a front
(CompositeImplicitAutograd) over a functional op. The functional op's custom call
aliases its result to the buffer it updates, and the front makes the result the tensor's
new value. Where that happens differs:

- lazily, the XLA tensor is a functionalization wrapper whose value is replaced, in
  program order, as aten's own in-place ops do. The step marker then donates the old
  buffer, so nothing is copied.
- under torch.compile the same wrapper is AOTAutograd's. openxla donates an input only
  when it is told to, so the functional op gets the traced input as its `donor` operand
  and flags that buffer when the program is built. Users need not know.
- CPU and CUDA tensors are simply written.
- arrays of another framework (`foreign`) have no memory of their own to write: what
  stands for one takes the new value, which its framework hands to its caller.

A tensor that is a view (kv.unbind(0), a permuted HND cache) is written through the
buffer it is a view of: `locate` finds that buffer and where in it the view lies.
Decision and measurements: docs/adr/0007-in-place.md.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

from . import collected
from .dtypes import dtype_name
from .errors import warn_user
from .foreign import Foreign
from .lazy import ownership, torch, tracing
from .op import NAMESPACE, OPS, Op, elements_of
from .places import Located, dense_strides

if TYPE_CHECKING:
    from torch._subclasses.functional_tensor import FunctionalTensor


def is_value(t: torch.Tensor) -> bool:
    """Returns whether `t` can only be updated by giving it a new value.

    True of XLA tensors and of everything that is being traced or transformed; False of
    plain CPU and CUDA tensors, whose memory is written.
    """
    return (
        isinstance(t, Foreign)
        or not tracing.is_plain(t)
        or t.device.type not in ("cpu", "cuda")
        or torch._is_functional_tensor(t)
        or tracing.is_transformed()
        or tracing.is_recorded()
    )


def may_be_dense(t: torch.Tensor, *, to_write: bool) -> bool:
    """Whether a view whose strides will not do can be taken as a dense value.

    XLA's are; a program on CPU or CUDA tensors would write into the copy.
    """
    return is_value(t) and not (to_write and t.device.type != "xla")


def locate(t: torch.Tensor, *, to_write: bool = False) -> Located:
    """Finds the whole buffer that holds `t`.

    Falls back to `t` itself, as a dense value, where the view cannot be traced to its
    base (such as views made under inference_mode, which torch does not track): still
    right, but the base is then rebuilt around the new value by XLA.

    Args:
        to_write: whether the buffer is for `update`, which takes a strided one too
            where CPU and CUDA tensors are traced, in elements from its first.
    """
    if isinstance(t, Foreign):
        return t.locate()
    if not is_value(t):
        return Located(elements_of(t), 0, t.stride())
    is_strided = to_write and t.device.type != "xla"
    if tracing.has_tangent(t):  # which is a view of what has none
        return Located(t, 0, dense_strides(t.shape))
    place = locate_in_base(t, is_strided)
    if place is not None:
        if _is_untracked_view(place.buffer):
            _tell_of_untracked_views()
        return place
    if is_strided and isinstance(t, tracing.FunctionalTensor):
        strides = _current(t).stride()
        return Located(t, 0, tracing.from_sizes(strides, t.shape))
    if _is_untracked_view(t):
        _tell_of_untracked_views()
    return Located(t, 0, dense_strides(t.shape))


def locate_in_base(t: torch.Tensor, is_strided: bool = False) -> Located | None:
    """Where an XLA or a traced tensor lies in the one that it is a view of.

    None where it is no view, one of another dtype, or one that cannot be traced.

    Args:
        is_strided: whether that tensor may be strided itself.
    """
    base = t._base if t._is_view() else None
    if base is None or base.dtype != t.dtype or not _is_part(t, base):
        return None
    place = _geometry(t, base, is_strided)
    return None if place is None else Located(base, place[0], place[1:])


def _is_part(view: torch.Tensor, base: torch.Tensor) -> bool:
    """Whether what torch calls a view's base still holds an XLA tensor's values.

    Not after `view.data = other`, for which torch goes on naming the old base.
    """
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    if not all(tracing.is_plain(t) and not wrapped(t) for t in (view, base)):
        return True  # of a trace or a transform, which no .data reaches
    return view.untyped_storage()._cdata == base.untyped_storage()._cdata


def _is_untracked_view(t: torch.Tensor) -> bool:
    """Whether `t` is a view of an XLA tensor that torch does not name.

    What detach() gives of a whole tensor is read where that lies.
    """
    return (
        type(t) is torch.Tensor
        and t.device.type == "xla"
        and torch._is_functional_tensor(t)
        and is_functional_view(t)
    )


def is_functional_view(wrapper: torch.Tensor) -> bool:
    """Whether functionalization makes a tensor of its base by more than detach()."""
    return any(name != "detach_ViewMeta" for name in functional_views(wrapper))


def _is_view_of_dtype(t: FunctionalTensor) -> bool:
    """Whether a traced tensor is a view, taken in the graph, of another dtype."""
    return "view_dtype_ViewMeta" in functional_views(t.elem)


def functional_views(wrapper: torch.Tensor) -> list[str]:
    views = torch._C._functionalization.get_view_meta_sequence(wrapper)
    return [type(view).__name__ for view in views]


@functools.cache
def _tell_of_untracked_views() -> None:
    warn_user(
        "xla_ops: a view of an XLA tensor is read and written by way of copies of the"
        " whole tensor, since torch does not track what it is a view of where it was"
        " made under torch.inference_mode(), by detach() of a view, or with another"
        " dtype: use torch.no_grad(), torch.compile, or separate K and V caches"
    )


@functools.cache
def _tell_of_outer_views() -> None:
    warn_user(
        "xla_ops: a compiled function that updates a view, made outside of it, copies"
        " the whole tensor that it is a view of: pass that tensor, and take the view"
        " inside"
    )


def update(
    op: Op, buffer: torch.Tensor, *args: object, views: Sequence[torch.Tensor] = ()
) -> None:
    """Gives `buffer` the value that `op(buffer, *args, donor)` computes, in place.

    Args:
        op: a functional op whose first argument is aliased to its one result.
        buffer: a whole buffer, from `locate`.
        views: what was located there.
    """
    if isinstance(buffer, Foreign):
        buffer.become(op(buffer, *args, None))
        return
    if tracing.is_transformed():
        collected.check(op.public_name, buffer)
        buffer.copy_(op(buffer, *args, None))
        return
    has_empty = any(isinstance(t, torch.Tensor) and t.numel() == 0 for t in args)
    if has_empty and op.lowered((buffer, *args, None)).call.is_empty:
        return  # as a new value, what nobody wrote would be a copy
    if (
        isinstance(buffer, tracing.FunctionalTensor)
        and _compiler_is_inductor()
        # Inductor of torch 2.9.0 reads past the end of views of another dtype.
        and not _is_view_of_dtype(buffer)
    ):
        op.twin(buffer, *args)
        return
    given = donor(buffer)
    if buffer.device.type == "xla":
        if given is not None:
            given = ownership.owned(buffer)
        elif collected.is_collecting():
            collected.collect(op.public_name, buffer)
        elif not isinstance(buffer, tracing.FunctionalTensor):
            ownership.protect([buffer], finish_reads=False)
            assign(buffer, op(buffer, *args, None), views)
            ownership.renew([view for view in views if view is not buffer])
            return
    old = buffer if given is None else given
    assign(buffer, op(old, *args, given))


def prepare(
    op: str, buffers: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    """What a functional op takes that is to update several XLA tensors in one call.

    Returns:
        Their old values, and of each the donor, as `update` has it; `assign` the
        results afterwards. A view has none: its base is made anew around it.
    """
    if tracing.is_transformed():
        for t in buffers:
            collected.check(op, t)
        return list(buffers), [None] * len(buffers)
    old, donors = list(buffers), [donor(t) for t in buffers]
    for i, given in enumerate(donors):
        if given is not None:
            old[i] = donors[i] = ownership.owned(given)
    whole = [t for t in buffers if not t._is_view()]
    if collected.is_collecting():
        for t in whole:
            collected.collect(op, t)
    elif not any(isinstance(t, tracing.FunctionalTensor) for t in buffers):
        ownership.protect(whole, finish_reads=False)
    return old, donors


def overwrite(t: torch.Tensor, value: torch.Tensor) -> None:
    """In a replayed function: t.copy_(value), into the buffer that `t` has.

    For values that no op of this package computes. A copy_ alone would leave the old
    buffer and the new one beside each other.

    Args:
        t: one of the function's arguments or of its state, not a view.
        value: of the same shape and dtype.
    """
    assert collected.is_collecting()
    collected.collect("overwrite", t)
    assign(t, value)


def donor(t: torch.Tensor) -> torch.Tensor | None:
    """Returns `t` if it is, unwritten so far, an input of the graph being traced.

    Only then does the program overwrite the caller's buffer: a clone made inside the
    graph must not donate what it was cloned from. On the CPU and CUDA, where a graph's
    nodes run one after the other, also if all that wrote it were updates in place.
    """
    if isinstance(t, tracing.FunctionalTensor):
        torch._functionalize_sync(t.elem)  # it may have been written through a view
    node = tracing.node_of(t)
    if t.device.type != "xla":
        if not _runs_as_traced():
            return None
        while node is not None and _is_update(node):
            node = cast("torch.fx.Node", node.args[0])
    return t if node is not None and node.op == "placeholder" else None


def _runs_as_traced() -> bool:
    """Whether the nodes of the graph being traced will run one after the other.

    A compiler that has ops decomposed takes graphs apart, and may move a read of an old
    value behind its update.
    """
    table = tracing.proxy_tensor.CURRENT_DECOMPOSITION_TABLE
    return table.keys() <= {torch.ops.aten.sym_numel.default}  # make_fx's own


def _is_update(node: torch.fx.Node) -> bool:
    """Whether a node is a call that wrote its first operand."""
    name = getattr(node.target, "_opname", "")
    op = OPS.get(name) if getattr(node.target, "namespace", "") == NAMESPACE else None
    return op is not None and op.has_donor and node.args[-1] is not None


def _compiler_is_inductor() -> bool:
    """Whether the graph being traced is for Inductor.

    It keeps an op in place whose schema says what it writes, and would copy the result
    of one that computes a new value.
    """
    table = tracing.proxy_tensor.CURRENT_DECOMPOSITION_TABLE
    inductor = sys.modules.get("torch._inductor.decomposition")
    if not table or inductor is None:
        return False
    own = inductor.select_decomp_table()
    return all(table.get(op) is function for op, function in own.items())


def assign(
    t: torch.Tensor, value: torch.Tensor, views: Sequence[torch.Tensor] = ()
) -> None:
    """Makes `value` the value of `t`, of its base and of all views of them.

    Args:
        views: those that the caller knows.
    """
    wrapper = t.elem if isinstance(t, tracing.FunctionalTensor) else t
    if tracing.is_transformed() or not torch._is_functional_tensor(wrapper):
        t.copy_(value)  # a fake tensor too, or functionalization is off
        return
    new = value.elem if isinstance(value, tracing.FunctionalTensor) else value
    old = torch._from_functional_tensor(wrapper)
    torch._functionalize_replace(wrapper, torch._from_functional_tensor(new))
    torch._functionalize_commit_update(wrapper)
    torch._functionalize_sync(wrapper)
    if t.device.type != "xla" or wrapper is not t:
        return
    # Carries the alias id over, by which the step marker donates the old buffer. Not
    # one that another tensor holds, or is going to. And not that of a view: a sync of
    # the view alone, as before a compiled step, would take the buffer away from the
    # graph that has yet to write the view to its base.
    if not is_functional_view(t) and ownership.is_owner(old, (value, *views)):
        torch.ops.aten._propagate_xla_data(old, torch._from_functional_tensor(wrapper))


def adopt(t: torch.Tensor, computed: torch.Tensor) -> None:
    """Gives the XLA tensor `t` the buffer of `computed`, which nobody else may use.

    What t.copy_(computed) means, without a node in the lazy graph. Views of `t` and the
    tensor it is a view of see the new value.
    """
    set_value(t, torch._from_functional_tensor(computed))


def set_value(t: torch.Tensor, value: torch.Tensor) -> None:
    """Puts torch_xla's own tensor `value` below `t`; its views and base follow."""
    torch._functionalize_replace(t, value)
    torch._functionalize_commit_update(t)
    torch._functionalize_sync(t)


def check_graph_inputs(
    op: str, tensors: Iterable[tuple[str, torch.Tensor]], written: Collection[str]
) -> None:
    """Raises ValueError where a graph for XLA has inputs that are parts of one tensor.

    AOTAutograd cannot handle that for XLA tensors, whose views carry no offset, and
    fails on an assertion, or reads elsewhere; this says what to do instead. So it does
    for an update of a view of another dtype, which torch_xla cannot compile.

    Args:
        op: the op's name.
        tensors: its arguments, by name.
        written: the names of those that it updates.
    """
    traced = [
        (name, t)
        for name, t in tensors
        if isinstance(t, tracing.FunctionalTensor) and t.device.type == "xla"
    ]
    if not traced:
        return
    seen: dict[int, str] = {}
    for name, t in traced:
        if name.partition("[")[0] not in written:
            continue
        if _is_view_of_dtype(t):
            raise ValueError(
                f"{op}: {name} must not be a view of another dtype, made inside the"
                f" compiled function, got {dtype_name(t.dtype)}; make it outside, or"
                " pass an fp8 cache as the uint8 that it is"
            )
        inner = torch._from_functional_tensor(t.elem)
        if t._is_view() or not inner._is_view():
            continue
        storage = inner.untyped_storage()._cdata
        if storage in seen:
            raise ValueError(
                f"{op}: {name} must not be a view, made outside the compiled function, "
                f"of the tensor that {seen[storage]} is a view of, got both as graph "
                "inputs; pass the stacked cache and take its views inside"
            )
        seen[storage] = name
    remade = tracing.remade_inputs()
    if remade:
        named = [name for name, t in traced if tracing.node_of(t) in remade]
        named.sort(key=lambda name: name.partition("[")[0] in written)
        raise remade_error(op, *named[:1])
    if seen:
        _tell_of_outer_views()


def remade_error(op: str, name: str = "an input") -> ValueError:
    """Of an input that AOTAutograd made anew, see `tracing.remade_in`."""
    return ValueError(
        f"{op}: {name} must not be a view, made outside the compiled function, of an"
        " input that it updates, got both as graph inputs; take the view inside"
    )


def check_writable(op: str, places: Mapping[str, tuple[torch.Tensor, Located]]) -> None:
    """Raises ValueError where an update would write one element twice.

    In an expanded tensor, or in two that share memory, the last writer would win, and
    which that is nobody says.

    Args:
        places: the tensors that are to be written, by name, and where they lie.
    """
    seen: list[tuple[str, torch.Tensor, _Span]] = []
    for name, (t, place) in places.items():
        if got := _repeats(t, place):
            raise ValueError(
                f"{op}: {name} must be dense in its last dimension and free of"
                f" overlaps, got {got}"
            )
        if len(places) == 1 or not t.numel():
            continue
        span = _span(t, place)
        for other_name, other, other_span in seen:
            if _meet(span, other_span):
                raise ValueError(
                    f"{op}: {name} must not share memory with {other_name},"
                    f" got shapes {list(t.shape)} and {list(other.shape)} of one tensor"
                )
        seen.append((name, t, span))


def _repeats(t: torch.Tensor, place: Located) -> str:
    """How `t` holds an element twice, as far as that can be told, or ""."""
    # Dynamo's fake tensors have the strides that XLA tensors lack.
    if isinstance(t, Foreign):
        return ""
    strides = t.stride() if isinstance(t, tracing.FakeTensor) else place.strides
    repeats = any(n > 1 and s == 0 for n, s in zip(t.shape, strides, strict=True))
    if repeats and t.numel():
        return f"strides {list(strides)}"
    if isinstance(t, tracing.FunctionalTensor):
        # An input of the graph: XLA tensors report dense strides.
        inner = torch._from_functional_tensor(t.elem)
        base = inner._base
        if base is not None and inner.numel() > base.numel():
            return f"{inner.numel()} elements of {base.numel()}"
    return ""


class _Span(NamedTuple):
    """Where the bytes of a tensor are."""

    of: int | str  # what bytes are counted in: a tensor, by its id, or a device
    first: int
    last: int
    dims: list[tuple[int, int]]  # stride and size, of a byte of an element at the end


def _span(t: torch.Tensor, place: Located) -> _Span:
    size = 1 if isinstance(t, Foreign) else t.element_size()
    if is_value(t):
        of: int | str = id(place.buffer)
        first, strides = place.offset * size, place.strides
    else:
        of, first, strides = str(t.device), t.data_ptr(), t.stride()
    dims = [(stride * size, n) for stride, n in zip(strides, t.shape, strict=True)]
    dims.append((1, size))
    last = first + sum(stride * (n - 1) for stride, n in dims)
    return _Span(of, first, last, dims)


def _meet(a: _Span, b: _Span) -> bool:
    """Whether two tensors that are not empty have a byte in common."""
    if a.of != b.of:
        return False
    if a.first == b.first:
        return True
    numbers = (a.first, b.first, *(n for dim in (*a.dims, *b.dims) for n in dim))
    if a.dims != b.dims and not all(isinstance(n, int) for n in numbers):
        return False  # of symbols, alike is all that can be told
    if a.last < b.first or b.last < a.first:
        return False
    # a's bytes are at a.first + i * stride and b's at b.last - j * stride, for all i
    # and j below a size: they meet where a sum of such multiples is b.last - a.first.
    counts: dict[int, int] = {}
    for stride, size in (*a.dims, *b.dims):
        counts[stride] = counts.get(stride, 0) + size - 1
    return _reaches(b.last - a.first, counts)


def _reaches(total: int, counts: Mapping[int, int]) -> bool:
    """Whether a sum of multiples of each stride, up to its count, is `total`."""
    rest = sum(stride * count for stride, count in counts.items())
    totals = {total}
    for stride, count in sorted(counts.items(), reverse=True):
        if stride == 0 or count == 0:
            continue
        rest -= stride * count
        totals = {
            total - n * stride
            for total in totals
            for n in range(
                max(-((rest - total) // stride), 0), min(total // stride, count) + 1
            )
        }
    return 0 in totals


def _geometry(
    t: torch.Tensor, base: torch.Tensor, is_strided: bool
) -> tuple[int, ...] | None:
    """Returns offset and strides of `t` in its base, from the base's first element.

    None where they are not known, or the base is not dense and that matters.
    """
    if isinstance(t, tracing.FunctionalTensor):
        if not (is_strided or base.is_contiguous()):
            return None
        assert isinstance(base, tracing.FunctionalTensor)
        view, whole = _current(t), _current(base)
        offset = view.storage_offset() - whole.storage_offset()
        # May be symbolic, as shapes and strides may, which torch types as int.
        return tracing.from_sizes((cast(int, offset), *view.stride()), base.shape)
    if t.device.type != "xla" or not torch._is_functional_tensor(t):
        return None
    # XLA tensors report no offset: replay the chain of views on a meta tensor.
    try:
        view = t._view_func_unsafe(
            torch.empty(base.shape, dtype=base.dtype, device="meta")
        )
    except RuntimeError:  # a view that has no replay function
        return None
    if view.shape != t.shape:
        return None
    return (view.storage_offset(), *view.stride())


def _current(t: FunctionalTensor) -> torch.Tensor:
    """The traced tensor below `t`, made anew if its base was written since."""
    torch._functionalize_sync(t.elem)
    return torch._from_functional_tensor(t.elem)
