"""Functions of JAX arrays, made of the functions of tensors."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from ..core.lazy import torch
from .arrays import Array, as_int64, check_fits, unwrap, wrap

# JAX has int32 arrays where torch's users have int64.
_INT64 = ("slot_mapping", "block_mapping")


def has_result(function: Callable) -> bool:
    """Whether a function of ours returns anything, by its annotation."""
    return inspect.signature(function).return_annotation not in ("None", None)


def adapted(function: Callable, written: tuple[str, ...] = ()) -> Callable:
    """Makes a function of JAX arrays.

    Args:
        function: it looks at shapes, dtypes and devices of tensors, and hands them to
            ops.
        written: the arguments that it writes. The new function returns their new
            values, in this order, behind what `function` returns. Of key_cache and
            value_cache the latter may be None: the former is then both, stacked in its
            first dimension, and returned so.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        given = bound.arguments
        for name, value in given.items():
            if isinstance(value, torch.Tensor):
                rule = f"{function.__name__}: {name} must be an array of JAX's"
                raise TypeError(f"{rule}, got {type(value).__name__}")
            check_fits(f"{function.__name__}: {name}", value)
            given[name] = _wrapped(name, value)
        returned: Any = tuple(given.get(name) for name in written)
        if "value_cache" in written and given.get("value_cache", ...) is None:
            returned = tuple(given[name] for name in written if name != "value_cache")
            given["key_cache"], given["value_cache"] = _unstacked(
                function.__name__, given["key_cache"]
            )
        results = function(*bound.args, **bound.kwargs)
        if not written:
            return unwrap(results)
        if results is not None:
            returned = (results, *returned)
        return unwrap(returned[0] if len(returned) == 1 else returned)

    call.__doc__ = _documented(function, written)
    return call


def _wrapped(name: str, value: Any) -> Any:
    if name == "num_seqs" and isinstance(value, int):
        value = jnp.full((1,), value, jnp.int32)
    value = wrap(value)
    return as_int64(value) if name in _INT64 and isinstance(value, Array) else value


def _unstacked(op: str, cache: Any) -> tuple[Any, Any]:
    """The keys and values of what is given as key_cache where value_cache is None."""
    is_array = isinstance(cache, Array)
    if is_array and cache.shape[:1] == (2,):
        return cache[0], cache[1]
    got = list(cache.shape) if is_array else type(cache).__name__
    raise ValueError(
        f"{op}: key_cache must be an array of shape [2, ...], keys and values, where"
        f" value_cache is None, got {got}"
    )


def _documented(function: Callable, written: tuple[str, ...]) -> str:
    text = inspect.getdoc(function) or ""
    first, _, rest = text.partition("\n")
    if written:
        new = [f"the new {name}" for name in written]
        if has_result(function):
            new.insert(0, "the result")
        *start, last = new
        returned = f"{', '.join(start)} and {last}" if start else last
        note = f"Returns {returned}, and writes no argument."
        return f"{first}\n\n{note} As it is of tensors:\n{rest}"
    return text


def functional(function: Callable) -> Callable:
    """Makes a function of JAX arrays of a functional op."""

    def call(*args: Any) -> Any:
        return unwrap(function(*map(wrap, args)))

    return call
