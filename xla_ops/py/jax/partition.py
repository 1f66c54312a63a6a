"""How JAX's partitioner and vmap may take an op's operands apart.

Both follow from what an op declares for torch's sharded tensors (`core/sharding.py`):
which dimensions may be split, dimensions of one name alike.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental.custom_partitioning import (
    ArrayMapping,
    CompoundFactor,
    SdyShardingRule,
)
from jax.sharding import NamedSharding, PartitionSpec

from ..core.layouts import Dim, layout_of
from ..core.sharding import Rule

# Newer versions can be told which factors are not to be split.
_KNOWS_WHOLE = (
    "need_replication_factors" in inspect.signature(SdyShardingRule.__init__).parameters
)

Shape = tuple[int, ...]
Axes = tuple[str, ...]


class Layouts(NamedTuple):
    """A rule for operands and results of known shapes."""

    operands: tuple[tuple[Dim, ...], ...]
    results: tuple[tuple[Dim, ...], ...]

    @staticmethod
    def of(rule: Rule, operands: Mapping[str, Shape], results: Sequence[Shape]) -> Any:
        return Layouts(
            tuple(layout_of(rule.operands.get(n), s) for n, s in operands.items()),
            tuple(layout_of(w, s) for w, s in zip(rule.results, results, strict=True)),
        )


def shardy_rule(layouts: Layouts) -> SdyShardingRule:
    """Says the rule in Shardy's terms: a factor a name, and one a whole dimension."""
    sizes: dict[str, int] = {}
    alone: set[str] = set()  # names that some dimension has without a unit
    whole: list[str] = []

    def mapping(dims: Sequence[Dim]) -> ArrayMapping:
        factors: list[str | CompoundFactor] = []
        for dim in dims:
            if not dim.may_split:
                whole.append(f"whole{len(whole)}")
                factors.append(whole[-1])
            elif dim.unit == 1:
                alone.add(dim.name)
                factors.append(dim.name)
            else:
                unit = f"unit{len(sizes)}"
                sizes.update({dim.name: dim.units, unit: dim.unit})
                factors.append(CompoundFactor(dim.name, unit))
        return ArrayMapping(*factors)

    operands = tuple(map(mapping, layouts.operands))
    results = tuple(map(mapping, layouts.results))
    more: dict[str, Any] = {n: size for n, size in sizes.items() if n not in alone}
    if _KNOWS_WHOLE:
        more["need_replication_factors"] = tuple(whole)
    return SdyShardingRule(operands, results, **more)


class Split(NamedTuple):
    """How operands and results lie on a mesh."""

    operands: tuple[NamedSharding, ...]
    results: tuple[NamedSharding, ...]


def split(layouts: Layouts, mesh: Any, given: Sequence[Any]) -> Split:
    """Decides how a call is split: as the first operand is that says so of a name.

    What may not be split, or not so, JAX gathers, as it does for its own operations.

    Args:
        given: the operands' shardings.
    """
    bound: dict[str, Axes] = {}
    for dims, how in zip(layouts.operands, given, strict=True):
        spec = tuple(getattr(how, "spec", ()))
        for dim, axes in zip(dims, spec, strict=False):
            if axes and dim.may_split and dim.name not in bound:
                axes = axes if isinstance(axes, tuple) else (axes,)
                taken = {axis for other in bound.values() for axis in other}
                if not taken.intersection(axes):
                    bound[dim.name] = axes
    sizes = dict(mesh.shape)
    for dims in (*layouts.operands, *layouts.results):
        for dim in dims:
            pieces = 1
            for axis in bound.get(dim.name, ()):
                pieces *= sizes[axis]
            if dim.may_split and dim.units % pieces:
                del bound[dim.name]

    def sharding(dims: Sequence[Dim]) -> NamedSharding:
        axes = (bound.get(dim.name) if dim.may_split else None for dim in dims)
        return NamedSharding(mesh, PartitionSpec(*axes))

    return Split(
        tuple(map(sharding, layouts.operands)), tuple(map(sharding, layouts.results))
    )


class Batch(NamedTuple):
    """How one call works on a batch.

    Attributes:
        has_rows: for each operand, whether it has rows, to which a batch adds.
        is_leading: whether the batch is a dimension more; else it is merged with the
            first one.
    """

    has_rows: tuple[bool, ...]
    is_leading: bool

    def call(
        self,
        call: Callable,
        size: int,
        is_batched: Sequence[bool],
        values: Sequence[Any],
    ) -> tuple:
        operands = []
        for value, batched, rows in zip(values, is_batched, self.has_rows, strict=True):
            operand = value
            if rows and not batched:
                operand = jnp.broadcast_to(value, (size, *value.shape))
            if rows and not self.is_leading:
                operand = operand.reshape(-1, *operand.shape[2:])
            operands.append(operand)
        results = call(*operands)
        if self.is_leading:
            return results
        return tuple(r.reshape(size, r.shape[0] // size, *r.shape[1:]) for r in results)


def batch(rule: Rule, names: Sequence[str], is_batched: Sequence[bool]) -> Batch | None:
    """Returns how one call takes a batch; None where only calls of their own do.

    Args:
        rule: of the op.
        names: its operands.
        is_batched: which of them have a batch as first dimension.
    """
    if rule.localize is not None:
        return None  # arguments that are no arrays are for these shapes alone
    words = [(rule.operands.get(name) or "!").split() for name in names]
    results = [layout.split() for layout in rule.results]
    for mark, is_leading in (("...", True), ("tokens", False)):
        rows = tuple(word[0] == mark for word in words)
        others = zip(rows, is_batched, strict=True)
        if all(has_rows or not batched for has_rows, batched in others) and all(
            result[0].partition("*")[0] == mark for result in results
        ):
            elsewhere = [w for word in (*words, *results) for w in word[1:]]
            if not any(word.lstrip("!~") == "tokens" for word in elsewhere):
                return Batch(rows, is_leading)
    return None
