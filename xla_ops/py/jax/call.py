"""Calls an op on JAX arrays: what `Op` is to torch, for one declaration of the op.

A call is a JAX function of the op's arrays, made once a signature of its other
arguments. From the inside out:

    the handler      jax.ffi.ffi_call, results aliased to the operands they update
    partitioning     jax.experimental.custom_partitioning, where the op has `splits`
    vmap             a batch becomes rows, where the op has rows; else one call after
                     the other
    derivatives      jax.custom_vjp, by the op's `gradient`; without one backward raises
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero
from jax.experimental.custom_partitioning import custom_partitioning

from ..core.custom_call import CustomCall
from ..core.gradients import Backward, Gradient
from ..core.hlo import AttributeValue
from ..core.op import Op
from ..core.sharding import Rule
from . import partition, registration
from .arrays import Array, Device, jax_dtype, platform, torch_dtype

# As for torch: shapes may change with every call.
_MAX_FUNCTIONS = 1024

_functions: dict[tuple, tuple[Callable, Callable]] = {}
_lock = threading.Lock()


class Signature(NamedTuple):
    """What a call depends on, but for shapes and dtypes.

    Attributes:
        op: what is called.
        names: the arguments that are arrays.
        dtypes: of the operands that these become, where not their own.
        others: the other arguments.
        kind: "cpu" or "cuda".
    """

    op: Op
    names: tuple[str, ...]
    dtypes: tuple[Any, ...]
    others: Mapping[str, Any]
    kind: str

    @property
    def key(self) -> tuple:
        others = tuple((n, type(v), repr(v)) for n, v in self.others.items())
        dtypes = tuple(map(str, self.dtypes))
        return self.op.name, self.names, dtypes, others, self.kind

    def arguments(self, values: Sequence[Any]) -> dict[str, Any]:
        """The op's arguments by name, as its lowering takes them."""
        arrays = dict(
            zip(self.names, map(self._wrap, values, self.dtypes), strict=True)
        )
        names = self.op.arguments[: len(self.op.arguments) - self.op.num_donors]
        return {n: arrays.get(n, self.others.get(n)) for n in names}

    def _wrap(self, value: Any, dtype: Any) -> Array:
        array = Array(value, dtype)
        array.device = Device(self.kind)
        return array

    def lower(self, arguments: Mapping[str, Any]) -> CustomCall:
        return self.op.lower(*arguments.values())

    def rule(self, arguments: Mapping[str, Any]) -> Rule | None:
        splits = self.op.splits
        return splits(arguments) if callable(splits) else splits

    def layouts(self, arguments: Mapping[str, Any]) -> tuple[Rule, partition.Layouts]:
        """The op's rule, which it has, for these arguments."""
        rule = self.rule(arguments)
        assert rule is not None
        shapes = {name: arguments[name].shape for name in self.names}
        results = [spec.shape for spec in self.lower(arguments).results]
        return rule, partition.Layouts.of(rule, shapes, results)


def call(op: Op, args: Sequence[object]) -> Any:
    """Calls `op` on arguments of which some are `Array`s; results are `Array`s."""
    values = op.given(args)
    arrays = {n: a for n, a in values.items() if isinstance(a, Array)}
    values_of = {n: a.value for n, a in arrays.items()}
    signature = Signature(
        op,
        tuple(arrays),
        tuple(a.dtype for a in arrays.values()),
        {n: v for n, v in values.items() if n not in arrays},
        platform(),
    )
    # Checks, where the user can see who called.
    signature.lower(signature.arguments(tuple(values_of.values())))
    results = _evaluated(signature, tuple(values_of.values()))
    if len(results) == 1:
        return Array(results[0])
    return tuple(map(Array, results))


def _evaluated(signature: Signature, values: tuple) -> tuple:
    plain, differentiable = functions(signature)
    try:
        return differentiable(*values)
    except NotImplementedError:
        # JAX has no symbolic zeros in shard_map that runs at once, without jit. What
        # asks for derivatives goes first there, so nobody has.
        return plain(*values)


def functions(signature: Signature) -> tuple[Callable, Callable]:
    """Returns the function of the arrays without and with derivatives.

    They are the same ones for one signature.
    """
    key = signature.key
    with _lock:
        found = _functions.get(key)
        if found is None:
            if len(_functions) >= _MAX_FUNCTIONS:
                _functions.clear()
            made = jax.jit(_batched(signature, _split(signature)), inline=True)
            found = _functions[key] = made, _differentiable(signature, made)
    return found


def _run(signature: Signature, arguments: Mapping[str, Any]) -> tuple:
    """Calls the handler."""
    call = signature.lower(arguments)
    if call.is_empty:
        return tuple(
            arguments[call.aliases[i]].value
            if i in call.aliases
            else jnp.zeros(spec.shape, jax_dtype(spec.dtype))
            for i, spec in enumerate(call.results)
        )
    registration.require(signature.kind, call.target)
    operands = []
    for operand in call.operands:
        name = operand if isinstance(operand, str) else operand.name
        array = arguments[name]
        if array is None and not isinstance(operand, str):
            operands.append(jnp.zeros((0,), jax_dtype(operand.dtype)))
        else:
            operands.append(_widened(array))
    results = (*call.results, *call.scratch)
    index = {name: i for i, name in enumerate(call.names)}
    ffi = jax.ffi.ffi_call(
        call.target,
        tuple(jax.ShapeDtypeStruct(s.shape, jax_dtype(s.dtype)) for s in results),
        input_output_aliases={index[name]: i for i, name in call.aliases.items()},
    )
    attributes = {n: _attribute(value) for n, value in call.attributes.items()}
    return tuple(ffi(*operands, **attributes))[: len(call.results)]


def _widened(array: Array) -> Any:
    dtype = jax_dtype(array.dtype)
    if array.value.dtype == dtype:
        return array.value
    with _enable_x64():
        return jax.lax.convert_element_type(array.value, dtype)


def _enable_x64() -> Any:
    """Lets JAX make an int64 array, which it otherwise makes an int32 one of."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    from jax.experimental import enable_x64

    return enable_x64()


def _attribute(value: AttributeValue) -> Any:
    """Gives an attribute the type that handlers take."""
    if isinstance(value, bool | str):
        return value
    return np.int64(value) if isinstance(value, int) else np.float32(value)


def _split(signature: Signature) -> Callable:
    """Lets each device run the handler on its shards, as the op's rule allows."""

    def whole(*values: Any) -> tuple:
        return _run(signature, signature.arguments(values))

    if signature.op.splits is None:
        return whole

    def call(*values: Any) -> tuple:
        arguments = signature.arguments(values)
        rule, layouts = signature.layouts(arguments)

        def decide(mesh: Any, given: Sequence[Any]) -> partition.Split:
            return partition.split(layouts, mesh, [array.sharding for array in given])

        def infer(mesh: Any, given: Sequence[Any], results: Any) -> tuple:
            return decide(mesh, given).results

        def part(mesh: Any, given: Sequence[Any], results: Any) -> tuple:
            def local(*shards: Any) -> tuple:
                parts = signature.arguments(shards)
                pairs = zip(shards, values, strict=True)
                is_split = any(shard.shape != value.shape for shard, value in pairs)
                if is_split and rule.localize is not None:
                    parts |= rule.localize(parts, arguments)
                return _run(signature, parts)

            how = decide(mesh, given)
            return mesh, local, how.results, how.operands

        split = custom_partitioning(whole)
        split.def_partition(
            partition=part,
            infer_sharding_from_operands=infer,
            sharding_rule=partition.shardy_rule(layouts),
        )
        return split(*values)

    return call


def _batched(signature: Signature, function: Callable) -> Callable:
    """Lets vmap make one call of many, where a batch is more rows."""
    call = custom_vmap(function)

    @call.def_vmap
    def batched(size: int, is_batched: Sequence[bool], *values: Any) -> tuple:
        if size == 0:
            return _of_none(call, is_batched, values)
        one = [v[0] if b else v for v, b in zip(values, is_batched, strict=True)]
        way = None
        if signature.op.splits is not None:
            rule = signature.rule(signature.arguments(one))
            assert rule is not None
            way = partition.batch(rule, signature.names, is_batched)
        if way is None:
            results = _one_by_one(call, is_batched, values)
        else:
            results = way.call(call, size, is_batched, values)
        return results, (True,) * len(results)

    return call


def _of_none(
    call: Callable, is_batched: Sequence[bool], values: Sequence[Any]
) -> tuple:
    """The results of a batch that has no element."""
    pairs = zip(values, is_batched, strict=True)
    one = [jax.ShapeDtypeStruct(v.shape[b:], v.dtype) for v, b in pairs]
    results = jax.eval_shape(call, *one)
    arrays = tuple(jnp.zeros((0, *r.shape), r.dtype) for r in results)
    return arrays, (True,) * len(arrays)


def _one_by_one(
    call: Callable, is_batched: Sequence[bool], values: Sequence[Any]
) -> tuple:
    def step(batch: Sequence[Any]) -> tuple:
        rest = iter(batch)
        pairs = zip(values, is_batched, strict=True)
        return call(*(next(rest) if b else v for v, b in pairs))

    pairs = zip(values, is_batched, strict=True)
    return jax.lax.map(step, [v for v, b in pairs if b])


def _differentiable(signature: Signature, function: Callable) -> Callable:
    """Lets JAX differentiate by what the op declares; else backward raises."""
    op, names = signature.op, signature.names
    gradient = op.gradient or Gradient(lambda _: {})

    def forward(*primals: Any) -> tuple:
        values = [primal.value for primal in primals]
        wanted = _said([primal.perturbed for primal in primals])
        results = function(*values)
        given = dict(zip(names, values, strict=True))
        kept = {name: given[name] for name in gradient.keeps if name in given}
        kept_results = {i: results[i] for i in gradient.keeps_results}
        specs = {n: (v.shape, torch_dtype(v.dtype)) for n, v in given.items()}
        return results, (kept, kept_results, wanted, _Specs(specs))

    def backward(saved: tuple, grads: Sequence[Any]) -> tuple:
        kept, kept_results, said, specs = saved
        asked = zip(names, _heard(said, len(names)), strict=True)
        wanted = tuple(name for name, is_wanted in asked if is_wanted)
        # Arrays in tensors' places.
        results: Any = {i: Array(v) for i, v in kept_results.items()}
        given: Any = tuple(
            None if isinstance(grad, SymbolicZero) else Array(grad) for grad in grads
        )
        args = {**signature.others, **{n: Array(v) for n, v in kept.items()}}
        found: Any = gradient.compute(
            Backward(args, results, given, wanted, specs.by_name)
        )
        for name in wanted:
            if found.get(name) is None:
                raise RuntimeError(_no_gradient(op, name))
        return tuple(found[name].value if name in wanted else None for name in names)

    call = jax.custom_vjp(function)
    call.defvjp(forward, backward, symbolic_zeros=True)
    return call


def _no_gradient(op: Op, argument: str) -> str:
    argument = op.gradient_label(argument)
    return (
        f"xla_ops.{op.public_name}: has no gradient: {argument} requires one;"
        f" pass jax.lax.stop_gradient({argument})"
    )


@jax.tree_util.register_static
class _Specs:
    """Shapes and dtypes of the arguments, kept for a backward beside arrays."""

    def __init__(self, by_name: dict[str, tuple]):
        self.by_name = by_name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Specs) and self.by_name == other.by_name

    def __hash__(self) -> int:
        return hash(tuple(self.by_name))


# What a backward keeps must have one structure, whichever derivatives are asked for:
# under jit, JAX remembers that of one forward. So flags go by a shape.
def _said(flags: Sequence[bool]) -> Any:
    """Returns an array of no element that holds flags."""
    number = sum(flag << i for i, flag in enumerate(flags))
    return jnp.zeros((0, number), jnp.bool_)


def _heard(said: Any, count: int) -> list[bool]:
    return [bool(said.shape[1] >> i & 1) for i in range(count)]
