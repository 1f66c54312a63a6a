"""Sharded XLA tensors (torch_xla's SPMD): what a device's part of a call is.

XLA's partitioner knows nothing of a custom call, so it would gather every operand whole
on every device. An op therefore declares, by `Rule`, which dimensions of which operand
may be split: dimensions of one name are split alike, in operands and results. A call
whose operands are split so becomes one that each device runs on its own shards
(`hlo.encode_sharded_module`), with the attributes of the local shapes.

How operands are split is taken from those that say it: tensors that xs.mark_sharding
has seen, and results of these ops. What is computed from sharded tensors by other ops
says nothing before XLA compiles the program. It is split as the operands are that do
say; where none does, as `sharding` declares. Where nobody says how, the call raises.
Decision: docs/adr/0012-sharding.md.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

from .hlo import Spec, Split
from .layouts import Dim, layout_of
from .lazy import torch

if TYPE_CHECKING:
    from torch_xla.distributed.spmd import Mesh

# For each device, which piece of a dimension it has.
Pieces = tuple[int, ...]

# The names that `sharding` takes.
NAMES = ("tokens", "heads", "columns")


class Rule(NamedTuple):
    """Which dimensions of an op's operands may be split, and how results follow.

    A layout is a word a dimension, such as "!tokens heads !head_dim". Dimensions of one
    name are split alike. "!" marks one that must be whole, "~" one that must be too,
    but of which that cannot be taken for granted: it has to be said. "heads*64" is a
    dimension of heads of 64 elements each. "..." stands for any number of leading
    dimensions, the first of which is called tokens.

    Attributes:
        operands: argument -> its layout. An argument of one element needs none.
        results: the layout of each result.
        localize: (the op's arguments by name, with stand-ins of one device's shapes for
            tensors; the arguments as they were) -> new values of those that depend on
            shapes, such as a geometry.
    """

    operands: Mapping[str, str]
    results: tuple[str, ...]
    localize: Callable[[Mapping[str, Any], Mapping[str, Any]], Mapping] | None = None


# A rule, or what makes one of the op's arguments by name: layouts depend on shapes.
Rules = Rule | Callable[[Mapping[str, Any]], Rule]


# Rows that are worked on one by one, and operands that all rows share.
ROWS = Rule(
    {"input": "... !hidden", "residual": "... !hidden", "weight": "!hidden"},
    ("... !hidden",),
)
TWO_ROWS = Rule(ROWS.operands, ROWS.results * 2)

# Each element by itself.
ELEMENTS = Rule({"input": "... columns"}, ("... columns",))


def rows_with_scales(num_scales: int, num_rows_after: int = 0) -> Rules:
    """Rows, of which each gets scales: results [..., hidden], [num_rows, 1] and rows.

    Only the first leading dimension may be split: rows are counted through all.
    """

    def rule(args: Mapping[str, Any]) -> Rule:
        *leading, _ = args["input"].shape
        inner = [f"!tokens{i}" for i in range(1, len(leading))]
        first = ["tokens"] if leading else []
        rows = " ".join([*first, *inner, "!hidden"])
        scales = f"tokens*{math.prod(leading[1:])} !one" if leading else "!rows !one"
        return Rule(
            {"input": rows, "residual": rows, "weight": "!hidden"},
            (rows, *[scales] * num_scales, *[rows] * num_rows_after),
        )

    return rule


class _Declared(NamedTuple):
    """What `sharding` declares: name -> pieces, None where whole."""

    pieces: tuple[tuple[str, Pieces | None], ...]


_declared: ContextVar[_Declared | None] = ContextVar("xla_ops.sharding", default=None)

_UNSET: Any = object()


@contextmanager
def sharding(
    mesh: Mesh | None = None,
    *,
    tokens: str | int | tuple | None = _UNSET,
    heads: str | int | tuple | None = _UNSET,
    columns: str | int | tuple | None = _UNSET,
) -> Iterator[None]:
    """Declares how operands are split whose sharding cannot be known, in this thread.

    Such operands are computed from sharded tensors by other ops, matrix products say.
    A name that is not given is not declared: an op that would need it raises. Compiled
    programs keep what was declared as they were compiled.

    Args:
        mesh: of the axes; None: xs.get_global_mesh().
        tokens: the mesh axis (or a tuple of axes) over which rows are split, such as
            the first dimension of what a norm takes; None: rows are whole.
        heads: likewise the heads of queries, keys and values.
        columns: likewise the columns of what an activation takes.

    Raises:
        ValueError: there is no mesh, or an axis is not in it.

    Example:
        >>> with xla_ops.sharding(mesh, tokens=None, heads="tp", columns="tp"):
        ...     logits = model(tokens)
    """
    if mesh is None:
        from torch_xla.distributed import spmd

        mesh = spmd.get_global_mesh()
        if mesh is None:
            raise ValueError(
                "sharding: mesh must be given or set by xs.set_global_mesh, got None"
            )
    given = {"tokens": tokens, "heads": heads, "columns": columns}
    pieces = tuple(
        (name, _pieces_of_axis(mesh, name, axis))
        for name, axis in given.items()
        if axis is not _UNSET
    )
    with declaring(_Declared(pieces)):
        yield


def declared() -> Any:
    """What `sharding` declares now; for `declaring`."""
    return _declared.get()


@contextmanager
def declaring(what: Any) -> Iterator[None]:
    """Declares it again: where a backward runs, on another thread, say."""
    token = _declared.set(what)
    try:
        yield
    finally:
        _declared.reset(token)


def _pieces_of_axis(
    mesh: Mesh, name: str, axis: str | int | tuple | None
) -> Pieces | None:
    """Returns which piece each device has of a dimension split over `axis`."""
    if axis is None:
        return None
    axes = axis if isinstance(axis, tuple) else (axis,)
    indices = []
    for one in axes:
        index = one
        if isinstance(one, str):
            index = (mesh.axis_names or ()).index(one) if _has_axis(mesh, one) else -1
        if not isinstance(index, int) or not 0 <= index < len(mesh.mesh_shape):
            known: tuple = mesh.axis_names or tuple(range(len(mesh.mesh_shape)))
            raise ValueError(f"sharding: {name} must be one of {known}, got {one!r}")
        indices.append(index)
    devices = mesh.get_logical_mesh()
    pieces = [0] * devices.size
    for place, device in zip(_places(devices.shape), devices.flat, strict=True):
        number = 0
        for index in indices:
            number = number * devices.shape[index] + place[index]
        pieces[int(device)] = number
    return _unless_whole(tuple(pieces))


def _has_axis(mesh: Mesh, name: str) -> bool:
    return name in (mesh.axis_names or ())


def _unless_whole(pieces: Pieces) -> Pieces | None:
    return pieces if any(pieces) else None


def _places(shape: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Yields the indices of an array in row-major order."""
    for i in range(math.prod(shape)):
        place = []
        for size in reversed(shape):
            i, rest = divmod(i, size)
            place.append(rest)
        yield tuple(reversed(place))


_TILES = re.compile(
    r"\{devices=\[(?P<tiles>[\d,]+)\]"
    r"(?:<=\[(?P<iota>[\d,]+)\](?:T\((?P<order>[\d,]+)\))?|(?P<list>[\d,]+))"
    r"(?P<last> last_tile_dim_replicate)?\}"
)
_WHOLE = re.compile(r"\{(replicated|unknown|maximal device=\d+)\}")


@functools.lru_cache(maxsize=1024)
def parse(spec: str) -> tuple[Pieces | None, ...]:
    """Returns, for each dimension, which piece each device has of it; None: all.

    Nothing at all where the whole tensor is on each device.

    Args:
        spec: a sharding as XLA prints it, such as "{devices=[4,1]<=[4]}".

    Raises:
        ValueError: XLA says it in words that are not known here.
    """
    if not spec or _WHOLE.fullmatch(spec):
        return ()
    match = _TILES.fullmatch(spec)
    if not match:
        raise ValueError(f"unknown sharding {spec}")
    tiles = _integers(match["tiles"])
    if match["list"]:
        devices = _integers(match["list"])
    else:
        # An iota of that shape, transposed.
        shape = _integers(match["iota"])
        order = _integers(match["order"]) if match["order"] else range(len(shape))
        strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        devices = [
            sum(i * strides[axis] for i, axis in zip(place, order, strict=True))
            for place in _places([shape[axis] for axis in order])
        ]
    rank = len(tiles) - bool(match["last"])
    pieces = [[0] * len(devices) for _ in range(rank)]
    for place, device in zip(_places(tiles), devices, strict=True):
        for dim in range(rank):
            pieces[dim][device] = place[dim]
    return tuple(_unless_whole(tuple(p)) for p in pieces)


def _integers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def num_devices() -> int:
    import torch_xla.runtime as xr

    return xr.global_runtime_device_count()


def split(dims: Sequence[Pieces | None]) -> Split | None:
    """Returns how an array with these pieces lies; None if they are no tiles.

    Two dimensions that are split over the same devices, for one, leave holes.
    """
    tiles = tuple(1 if pieces is None else max(pieces) + 1 for pieces in dims)
    cells: dict[int, list[int]] = {}
    for device in range(num_devices()):
        cell = 0
        for size, pieces in zip(tiles, dims, strict=True):
            cell = cell * size + (0 if pieces is None else pieces[device])
        cells.setdefault(cell, []).append(device)
    if len(cells) != math.prod(tiles) or len({len(c) for c in cells.values()}) != 1:
        return None
    return Split(tiles, tuple(d for _, cell in sorted(cells.items()) for d in cell))


def op_sharding(split: Split) -> Any:
    """Returns torch_xla's object for it."""
    import torch_xla
    from torch_xla.distributed.spmd import ShardingType

    make = torch_xla._XLAC.OpSharding
    if split.is_whole:
        return make([], [], [], int(ShardingType.REPLICATED))
    num_cells = math.prod(split.tiles)
    copies = len(split.devices) // num_cells
    if copies == 1:
        tiles = _nested(split.tiles, split.devices)
        return make(tiles, [], [], int(ShardingType.TILED))
    groups = [
        list(split.devices[i : i + copies])
        for i in range(0, len(split.devices), copies)
    ]
    assignment = _nested(split.tiles, range(num_cells))
    tiles = _nested((*split.tiles, copies), split.devices)
    return make(tiles, assignment, groups, int(ShardingType.PARTIAL))


def _nested(shape: Sequence[int], values: Sequence[int]) -> list:
    nested: list = list(values)
    for size in reversed(shape[1:]):
        nested = [nested[i : i + size] for i in range(0, len(nested), size)]
    return nested


class Given(NamedTuple):
    """What is known of a call's operands before anything is decided; a key.

    Attributes:
        specs: of each operand: its sharding as XLA prints it, or "".
        declared: what `sharding` declares.
    """

    specs: tuple[str, ...]
    declared: _Declared | None

    @property
    def is_manual(self) -> bool:
        """Whether the user has entered manual mode, where all operands are shards."""
        return any("manual" in spec for spec in self.specs)

    @property
    def says_nothing(self) -> bool:
        return self.declared is None and not any(map(parse, self.specs))


def given(tensors: Sequence[torch.Tensor]) -> Given:
    import torch_xla

    specs = torch_xla._XLAC._get_xla_sharding_specs(list(tensors))
    said = tuple("" if spec == "{unknown}" else spec for spec in specs)
    return Given(said, _declared.get())


def signature(tensors: Sequence[torch.Tensor]) -> tuple:
    """Returns what a program of these tensors depends on that shapes do not say."""
    specs, declared = given(tensors)
    return tuple(map(parse, specs)), declared


def is_unsaid(t: torch.Tensor, spec: str) -> bool:
    """Whether a tensor is computed from sharded ones, and says no sharding."""
    import torch_xla

    xlac = torch_xla._XLAC
    if spec or not xlac._check_tensor_need_materialization([t])[0]:
        return False
    # Not asked of the tensors that it is computed from: of each torch_xla would make
    # another here, whose number its buffer then has, and a program knows its inputs,
    # and which buffers it may take, by those numbers.
    key = xlac._get_graph_hash([t])
    found = _from_sharded.get(key)
    if found is None:
        # Of inputs, and of what xs.mark_sharding or `sharding` split on the way.
        specs = _TILES.finditer(xlac._get_xla_tensors_hlo([t]))
        if len(_from_sharded) >= _MAX_GRAPHS:
            _from_sharded.clear()
        found = _from_sharded[key] = any(any(parse(spec[0])) for spec in specs)
    return found


# Whether a lazy graph, by its hash, has sharded tensors.
_from_sharded: dict[bytes, bool] = {}
_MAX_GRAPHS = 4096


class Decision(NamedTuple):
    """How a call is split.

    Attributes:
        is_split: whether at all.
        operands: argument -> how it lies.
        results: how each result lies.
        assumed: operands that were taken as whole in some dimension, by index, and the
            error where one of them is computed from sharded tensors and says nothing.
    """

    is_split: bool
    operands: Mapping[str, Split]
    results: tuple[Split, ...]
    assumed: tuple[tuple[int, str], ...]


def stand_ins(args: Mapping[str, Any], decision: Decision) -> dict[str, torch.Tensor]:
    """Returns fake tensors of one device's shapes for the operands that are split."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    fakes = {}
    with FakeTensorMode():
        for name, how in decision.operands.items():
            t = args[name]
            shape = how.shard(Spec.of(t)).shape
            fakes[name] = torch.empty(shape, dtype=t.dtype, device=t.device)
    return fakes


class Call(NamedTuple):
    """A call to decide about.

    Attributes:
        op: its name in error texts.
        rule: of the op; None: it cannot be split.
        operands: argument -> shape, of what the call takes.
        results: the shape of each result.
        labels: argument -> its name in error texts.
    """

    op: str
    rule: Rule | None
    operands: Mapping[str, torch.Size]
    results: Sequence[Sequence[int]]
    labels: Mapping[str, str]

    def fail(self, argument: str, rule: str, got: object) -> ValueError:
        label = self.labels.get(argument, argument)
        return ValueError(f"{self.op}: {label} must {rule}, got {got}")


def decide(call: Call, given: Given) -> Decision:
    """Decides how a call is split.

    Raises:
        ValueError: an operand is split as the op's rule does not allow.
    """
    declared = dict(given.declared.pieces) if given.declared else {}
    rule = call.rule or Rule({}, ())
    layouts = {
        name: layout_of(rule.operands.get(name), shape)
        for name, shape in call.operands.items()
    }
    bound = _bind(call, layouts, given.specs, declared)
    assumed = _assumed(call, layouts, {*bound, *declared})
    # What is declared is so of all that has a dimension of that name.
    for name, layout in layouts.items():
        for i, dim in enumerate(layout):
            pieces = declared.get(dim.name)
            if pieces is None or dim.units <= 1:
                continue
            if not dim.may_split:
                got = f"{dim.name} split by xla_ops.sharding"
                raise call.fail(name, f"be whole in dimension {i}{dim.called}", got)
            bound.setdefault(dim.name, pieces)
    if not bound:
        return Decision(False, {}, (), assumed)
    operands = {
        name: _split(call, name, layout, call.operands[name], bound)
        for name, layout in layouts.items()
    }
    results = tuple(
        _split(call, "result", layout_of(words, tuple(shape)), shape, bound)
        for words, shape in zip(rule.results, call.results, strict=True)
    )
    return Decision(True, operands, results, assumed)


def _assumed(
    call: Call, layouts: Mapping[str, tuple[Dim, ...]], known: set[str]
) -> tuple[tuple[int, str], ...]:
    """Returns operands of which it is not known whether they are split, see there."""
    found = []
    for i, (name, layout) in enumerate(layouts.items()):
        free = [
            dim.name
            for dim in layout
            if dim.must_be_said and dim.name not in known and dim.units > 1
        ]
        if call.rule is None and call.operands[name].numel() > 1:
            remedy = "be known to be whole: xs.mark_sharding it as replicated"
        elif free:
            names = ", ".join(f"{n}=..." for n in NAMES if n in free)
            remedy = "say how it is split: " + (
                f"call the op in `with xla_ops.sharding(mesh, {names})`, or"
                " xs.mark_sharding it"
                if names
                else "xs.mark_sharding it"
            )
        else:
            continue
        error = call.fail(name, remedy, "a value computed from sharded tensors")
        found.append((i, str(error)))
    return tuple(found)


def _bind(
    call: Call,
    layouts: Mapping[str, tuple[Dim, ...]],
    specs: Sequence[str],
    declared: Mapping[str, Pieces | None],
) -> dict[str, Pieces]:
    """Returns name -> pieces, as the operands say that know how they are split."""
    bound: dict[str, Pieces] = {}
    said_by: dict[str, str] = {}
    for (name, layout), spec in zip(layouts.items(), specs, strict=True):
        for i, pieces in enumerate(parse(spec)):
            if pieces is None:
                continue
            dim = layout[i]
            if not dim.may_split:
                others = [d.name for d in layout if d.may_split]
                remedy = (
                    f"split it in {' or '.join(others)}"
                    if others
                    else "xs.clear_sharding it, or call the op between"
                    " xs.enable_manual_sharding and xs.disable_manual_sharding"
                )
                raise call.fail(
                    name, f"be whole in dimension {i}{dim.called}; {remedy}", spec
                )
            if dim.name in declared and declared[dim.name] != pieces:
                raise call.fail(
                    name, f"be split in {dim.name} as sharding() declares", spec
                )
            other = bound.setdefault(dim.name, pieces)
            first = said_by.setdefault(dim.name, name)
            if other != pieces:
                label = call.labels.get(first, first)
                raise call.fail(name, f"be split in {dim.name} as {label} is", spec)
    return bound


def _split(
    call: Call,
    name: str,
    layout: Sequence[Dim],
    shape: Sequence[int],
    bound: Mapping[str, Pieces],
) -> Split:
    """Returns how one operand or result lies."""
    dims = [bound.get(dim.name) if dim.may_split else None for dim in layout]
    for i, (dim, pieces) in enumerate(zip(layout, dims, strict=True)):
        if pieces is not None and dim.units % (max(pieces) + 1):
            count = max(pieces) + 1
            raise call.fail(
                name,
                f"have in dimension {i} a number of {dim.name} that {count} divides",
                dim.units,
            )
    found = split(dims)
    if found is None:
        names = [d.name for d, p in zip(layout, dims, strict=True) if p is not None]
        raise call.fail(
            name,
            "be split over another mesh axis in each dimension",
            " and ".join(names),
        )
    return found
