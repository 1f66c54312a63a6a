"""vLLM-style mutable fronts: ops that write into tensors they are given.

vLLM's ops take their results as arguments, `rms_norm(result!, input, weight, eps)`, or
replace their inputs, `fused_add_rms_norm(input!, residual!, weight, eps)`. Ours compute
new tensors. A front joins the two: it plans a call of the functional op and says which
tensor each result is written to.

    mutable.define(
        "silu_and_mul(Tensor(a!) out, Tensor input) -> ()",
        lambda out, input: mutable.Update(_op, (input,), {"out": out}),
        autocast=unchanged,
    )

Plain CPU and CUDA tensors are written by the kernel itself. XLA tensors and everything
that is being traced get the result as their new value, views included (`in_place`); no
buffer is donated, because activations are temporary. Ops that update a KV cache have
fronts of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from . import collected, front, in_place
from .autocast import Rule
from .checks import Checker
from .lazy import torch, tracing
from .op import NAMESPACE, Op
from .places import Located, dense_strides


class Update(NamedTuple):
    """One call of a mutable front.

    Attributes:
        op: the functional op that computes the new values.
        args: its arguments.
        targets: for each result of the op, in order, the tensor that takes it, by its
            argument's name in error texts. A target has its result's dtype and number
            of elements; dimensions of size one may differ ([tokens] and [tokens, 1]).
            None drops the result.
    """

    op: Op
    args: tuple
    targets: Mapping[str, torch.Tensor | None]


def define(schema: str, plan: Callable[..., Update], *, autocast: Rule) -> None:
    """Defines a mutable op as torch.ops.xla_ops.<name>.

    Args:
        schema: name, arguments and "-> ()" in torch's schema language, with every
            target marked as written: "name(Tensor(a!) out, Tensor input) -> ()".
        plan: (*args) -> Update. Torch leaves out trailing arguments that equal their
            defaults, so it must repeat the schema's defaults.
        autocast: what torch.autocast means for it.
    """
    name = schema[: schema.index("(")].partition(".")[0]

    def kernel(*args: Any, **kwargs: Any) -> None:
        apply(name, plan(*args, **kwargs))

    front.define(NAMESPACE, schema, kernel, autocast=autocast)


def apply(name: str, update: Update) -> list[torch.Tensor]:
    """Runs an update and returns the op's results, a target in place of its own.

    Args:
        name: the op's name in error texts.
        update: what to run, and what to write.
    """
    op, args, targets = update
    bound = op.lowered(args)
    check = Checker(name)
    for (argument, target), spec in zip(
        targets.items(), bound.call.results, strict=True
    ):
        if target is None:
            continue
        check.dtype(argument, target, [spec.dtype])
        if _squeezed(target.shape) != _squeezed(spec.shape):
            check.shape(argument, target, spec.shape)
        check.same_device("input", bound.tensors[0], **{argument: target})
        collected.check(name, target)
    check_writable(name, targets)
    given = [t for t in targets.values() if t is not None]
    if any(in_place.is_value(t) for t in (*given, *bound.tensors)):
        results = op(*args)
        results = list(results) if isinstance(results, tuple) else [results]
        for i, target in enumerate(targets.values()):
            if target is not None and target.numel():
                in_place.assign(target, results[i].reshape(target.shape))
        return _with_targets(results, targets)
    into = {i: t for i, t in enumerate(targets.values()) if t is not None}
    results = op.compute(args, into)
    for i, target in into.items():
        if results[i] is not target and target.numel():
            target.copy_(results[i].reshape(target.shape))
    return _with_targets(results, targets)


def check_writable(name: str, targets: Mapping[str, torch.Tensor | None]) -> None:
    """Raises ValueError where an element would be written twice."""
    given = {argument: t for argument, t in targets.items() if t is not None}
    num_tensors = len({id(t) for t in given.values()})
    if num_tensors == len(given) and all(map(_is_whole, given.values())):
        return
    places = {
        argument: (
            t,
            in_place.locate(t)
            if t._is_view() or not in_place.is_value(t)
            else Located(t, 0, dense_strides(t.shape)),
        )
        for argument, t in given.items()
    }
    in_place.check_writable(name, places)


def _is_whole(t: torch.Tensor) -> bool:
    """Whether a tensor is known to be no part of another one, at once."""
    return tracing.is_plain(t) and not t._is_view() and t.is_contiguous()


def _with_targets(
    results: list[torch.Tensor], targets: Mapping[str, torch.Tensor | None]
) -> list[torch.Tensor]:
    pairs = zip(results, targets.values(), strict=True)
    return [result if target is None else target for result, target in pairs]


def _squeezed(shape: Sequence[int]) -> list[int]:
    return [size for size in shape if size != 1]
