"""What torch's autograd does with ops: `gradients` says what an op declares.

Through an op without a `Gradient` a forward works as ever, with parameters that require
a gradient too, and a backward raises. Under torch.compile a backward is traced with its
forward, whether or not it is ever run, so what raises is an op of the graph,
`no_gradient`.

An op that writes into its arguments has no backward that could raise later; `refuse`
raises at the call. Forward mode (torch.func.jvp) raises at the call for every op.

Inference pays nothing for that: `is_untracked` tells when a call may go past torch's
autograd keys, and so past a kernel in Python.

Tested by tests/core/test_gradients.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.autograd.function import _SingleLevelFunction

from . import in_place, sharded_gradients, sharding, tracing
from .gradients import Backward, Gradient, message
from .tracing import FunctionalTensor, is_plain

if TYPE_CHECKING:
    from .op import Op

NAMESPACE = "xla_ops"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_library.define(
    "no_gradient(Tensor grad, str message, SymInt[] shape, ScalarType dtype) -> Tensor"
)

_below_autograd = torch._C._AutoDispatchBelowAutograd
_any_requires_grad = torch._C._any_requires_grad
_is_grad_enabled = torch._C.is_grad_enabled
_num_modes = torch._C._len_torch_dispatch_stack
_transforms = torch._C._functorch.peek_interpreter_stack
# None while a graph is traced.
_saving_hooks = torch._C._autograd._top_saved_tensors_default_hooks


def is_untracked(args: Sequence) -> bool:
    """Whether a call may go past torch's autograd keys, as far as can be told at once.

    Not while anything traces or transforms: that may want to see the call first.
    """
    return not (
        (_is_grad_enabled() and _any_requires_grad(*args))
        or forward_ad._current_level >= 0
        or _num_modes()
        or _transforms() is not None
    )


def asks(arguments: Iterable[tuple[str, object]], names: Collection[str]) -> bool:
    """Whether one of the arguments that `names` names requires a gradient."""
    return _is_grad_enabled() and any(
        t.requires_grad for name, t in tensors(arguments) if name in names
    )


def refuse(op: str, arguments: Iterable[tuple[str, object]]) -> None:
    """Raises RuntimeError where an argument asks for a derivative.

    Args:
        op: the op's name, one that writes into its arguments.
        arguments: names and values; sequences are searched for tensors.
    """
    reverse, forward = _is_grad_enabled(), forward_ad._current_level >= 0
    if not reverse and not forward:
        return
    for name, t in tensors(arguments):
        if reverse and t.requires_grad:
            raise RuntimeError(message(op, name))
        if tracing.has_tangent(t):
            raise RuntimeError(message(op, name, TANGENT))


def tell_written(values: Iterable[object]) -> None:
    """Tells torch that tensors were written, as its own in-place ops do.

    A backward that keeps one then raises, one that is traced with its forward too: that
    would otherwise be traced with the new value.

    Args:
        values: tensors, lists of them, and None.
    """
    found = [
        t
        for _, t in tensors(("", value) for value in values)
        if (is_plain(t) or isinstance(t, FunctionalTensor)) and not t.is_inference()
    ]
    if found:
        torch.autograd.graph.increment_version(found)


TANGENT = "has a tangent (forward mode)"


def tensors(
    arguments: Iterable[tuple[str, object]],
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors among arguments, and in their lists, by names such as caches[1]."""
    for name, value in arguments:
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, (list, tuple)):
            yield from tensors((f"{name}[{i}]", v) for i, v in enumerate(value))


def kernel(op: Op) -> Callable:
    """Returns the op's kernel for torch's autograd keys."""
    overload = op.overload

    def call(*args: Any) -> Any:
        if tracing.is_recorded():
            given = tensors(zip(op.arguments, args, strict=True))
            in_place.check_graph_inputs(op.public_name, given, ())
        if forward_ad._current_level >= 0:
            for name, t in tensors(zip(op.arguments, args, strict=True)):
                if tracing.has_tangent(t):
                    name = op.gradient_label(name)
                    raise RuntimeError(message(op.public_name, name, TANGENT))
        if _is_grad_enabled() and _any_requires_grad(*args):
            with enable_single_level_autograd_function():
                return _Tracked.apply(op, *args)  # type: ignore[attr-defined]
        with _below_autograd():
            return overload(*args)

    return call


class _Tracked(_SingleLevelFunction):
    """A call of an op on arguments of which some require a gradient.

    Of one level, since a kernel for the autograd keys is called once for each level of
    torch.func.grad: torch.autograd.Function would go through all of them by itself.
    """

    @staticmethod
    def forward(op: Op, *args: Any) -> Any:
        if _transforms() is None:
            with _below_autograd():
                return op.overload(*args)
        # Torch turns derivatives off in here; levels further out want theirs.
        with torch.enable_grad(), _set_fwd_grad_enabled(True), _below_autograd():
            return op.overload(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        op, *args = inputs
        gradient = op.gradient or Gradient(lambda _: {})
        results = output if isinstance(output, tuple) else (output,)
        named = dict(zip(op.arguments, args, strict=True))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            *(_kept(named[name]) for name in gradient.keeps),
            *(results[i] for i in gradient.keeps_results),
        )
        ctx.op, ctx.gradient = op, gradient
        # A backward may run after the forward's `with`, and on another thread.
        ctx.declared = sharding.declared()
        ctx.splits = sharded_gradients.specs_of(results)
        ctx.args = {
            name: value
            for name, value in named.items()
            if not isinstance(value, torch.Tensor)
        }
        ctx.specs = {
            name: (t.shape, t.dtype)
            for name, t in named.items()
            if isinstance(t, torch.Tensor)
        }

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple:
        op, gradient = ctx.op, ctx.gradient
        needs = zip(op.arguments, ctx.needs_input_grad[1:], strict=True)
        wanted = tuple(name for name, is_needed in needs if is_needed)
        given = next((grad for grad in grads if grad is not None), None)
        if given is None:
            return (None,) * (1 + len(op.arguments))
        if any(ctx.splits):
            sharded_gradients.split_alike(grads, ctx.splits)
        raises = torch.ops.xla_ops.no_gradient.default
        try:
            saved = ctx.saved_tensors
        except RuntimeError as error:  # one was written since
            if not isinstance(given, FunctionalTensor):
                raise
            text = f"xla_ops.{op.public_name}: {error}"
            late = {name: raises(given, text, *ctx.specs[name]) for name in wanted}
            return None, *(late.get(name) for name in op.arguments)
        num_args = len(gradient.keeps)
        given_back = Backward(
            {**ctx.args, **dict(zip(gradient.keeps, saved, strict=False))},
            dict(zip(gradient.keeps_results, saved[num_args:], strict=True)),
            grads,
            wanted,
            ctx.specs,
        )
        with sharding.declaring(ctx.declared):
            found = gradient.compute(given_back)
        missing = {
            name: raises(
                given,
                message(op.public_name, op.gradient_label(name)),
                *ctx.specs[name],
            )
            for name in wanted
            if found.get(name) is None
        }
        return None, *(
            found.get(name, missing.get(name)) if name in wanted else None
            for name in op.arguments
        )


def _kept(t: torch.Tensor | None) -> torch.Tensor | None:
    """An argument, as it is saved for the backward.

    Where hooks take what is saved, as under activation checkpointing, no leaf of the
    graph: torch (2.9.0) makes another tensor of it for the backward, which takes the
    leaf's own hooks away when Python drops it.
    """
    if t is None or not (t.is_leaf and t.requires_grad) or not _saving_hooks(False):
        return t
    with torch.enable_grad():
        return t.view_as(t)


def _no_gradient(
    grad: torch.Tensor, message: str, shape: list[int], dtype: torch.dtype
) -> torch.Tensor:
    raise RuntimeError(message)


_library.impl(
    "no_gradient", tracing.untraced(_no_gradient), "CompositeExplicitAutograd"
)
for _function in (_Tracked.forward, _Tracked.setup_context, _Tracked.backward):
    tracing.untraced(_function)
torch.library.register_fake(
    f"{NAMESPACE}::no_gradient",
    lambda grad, message, shape, dtype: grad.new_empty(shape, dtype=dtype),
    lib=_library,
)
