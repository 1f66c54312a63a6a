"""What a program is kept by: what its function was given, and what else changes it.

Tested by tests/programs/test_replay_arguments.py.
"""

from __future__ import annotations

import dataclasses
import functools
import numbers
from collections.abc import Sequence
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import torch
import torch_xla
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from ..core import tracing
from . import reachable

# A call without keywords, of leaves alone: most are.
_FLAT = "flat"
# Values of which those that are equal are the same.
_PLAIN = frozenset({bool, int, str, bytes, type(None), torch.dtype, torch.device})
# What is known by its identity, and is not changed.
_FIXED = (
    *(type, FunctionType, BuiltinFunctionType, ModuleType, functools.partial),
    *(torch.dtype, torch.layout, torch.memory_format),
)


def flatten(args: tuple, kwargs: dict) -> tuple[list, object]:
    """The leaves of a call, and its form, by which `unflatten` puts them together."""
    if not kwargs and all(
        isinstance(a, torch.Tensor) or type(a) in _PLAIN or pytree.tree_is_leaf(a)
        for a in args
    ):
        return list(args), _FLAT
    return pytree.tree_flatten((args, kwargs))


def unflatten(leaves: list, form: object) -> tuple[Sequence, dict]:
    if form is _FLAT:
        return leaves, {}
    return pytree.tree_unflatten(leaves, form)  # type: ignore[arg-type]


def signature(leaves: Sequence) -> tuple:
    """What of the leaves changes a program: of tensors their form, of others all."""
    return tuple(
        (leaf.shape, leaf.dtype, leaf.device, leaf.requires_grad)
        if isinstance(leaf, torch.Tensor)
        else _value(leaf)
        for leaf in leaves
    )


def _value(leaf: Any) -> tuple:
    """Tells a value from all that a function could tell from it."""
    kind = type(leaf)
    if kind in _PLAIN:
        return kind, leaf
    # 0.0 equals -0.0, 1 equals 1.0, and NaN not itself, in what holds them too.
    if isinstance(leaf, numbers.Number):
        return kind, repr(leaf)
    if isinstance(leaf, tuple):
        return kind, tuple(map(_value, leaf))
    if isinstance(leaf, frozenset):
        return kind, frozenset(map(_value, leaf))
    if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
        names = [field.name for field in dataclasses.fields(leaf) if field.compare]
        return kind, tuple(_value(getattr(leaf, name)) for name in names)
    return kind, leaf


def unhashable(leaves: Sequence) -> TypeError | None:
    """The error of the first leaf that cannot be hashed; None where all can."""
    for leaf in leaves:
        try:
            hash(leaf)
        except TypeError:
            return TypeError(
                "replay: an argument must be a tensor, a value that can be hashed or a"
                f" tree of them, got {type(leaf).__name__}"
            )
    return None


def surroundings() -> tuple:
    """What else changes a program."""
    autocast = torch.is_autocast_enabled("xla")
    return (
        torch.get_autocast_dtype("xla") if autocast else None,
        torch.get_default_dtype(),
        torch_xla._XLAC._xla_get_mat_mul_precision(),
        torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(),
    )


def check(leaves: Sequence) -> None:
    """Raises by name where no program can be traced, or be kept by a leaf."""
    if torch._C._len_torch_dispatch_stack():
        raise RuntimeError(
            "replay: a function must not be traced under a TorchDispatchMode, got a"
            " first call that is; call it once before"
        )
    error = unhashable(leaves)
    if error is not None:
        raise error
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor):
            _check_tensor(i, leaf)
        else:
            _check_value(leaf)


def refuse_transforms(tensors: Sequence[torch.Tensor]) -> None:
    """Raises RuntimeError under what would have to look at a program's operations."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise RuntimeError(
            "replay: a function must not be called under a transform of torch.func, got"
            " a call that is; transform what is replayed, as in"
            " replay(torch.func.grad(f))"
        )
    for i, t in enumerate(tensors if forward_ad._current_level >= 0 else ()):
        if tracing.has_tangent(t):
            raise RuntimeError(
                f"replay: tensor argument {i} must not have a tangent (forward mode),"
                " got one that does: results have none"
            )


def _check_tensor(i: int, leaf: torch.Tensor) -> None:
    if leaf.device.type != "xla":
        raise ValueError(
            f"replay: tensor argument {i} must be on an XLA device, got {leaf.device}"
        )
    if not torch._is_functional_tensor(leaf):
        raise RuntimeError(
            f"replay: tensor argument {i} must be functionalized, got one that is"
            " not; unset XLA_DISABLE_FUNCTIONALIZATION"
        )
    if leaf.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"replay: tensor argument {i} must not require a gradient, got one that"
            " does: results have none; use torch.no_grad()"
        )


def _check_value(leaf: object) -> None:
    """A value that changes later, or a tensor in it, would stay what it was."""
    if isinstance(leaf, _FIXED):
        return
    name = type(leaf).__name__
    if isinstance(leaf, torch.nn.Module) or reachable.tensors(leaf):
        raise TypeError(
            "replay: an argument must be a tensor, a value or a tree of them, got"
            f" {name}, which holds tensors; give its tensors, or close over it and name"
            " it in `state`"
        )
    if type(leaf).__hash__ is object.__hash__ and _has_attributes(leaf):
        raise TypeError(
            "replay: an argument must be a tensor, a value or a tree of them, got"
            f" {name}, which is hashed by its identity, whatever it holds; give what"
            " the function reads of it"
        )


def _has_attributes(leaf: object) -> bool:
    slots = any(vars(kind).get("__slots__") for kind in type(leaf).__mro__)
    return bool(getattr(leaf, "__dict__", slots))
