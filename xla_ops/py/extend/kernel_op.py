"""Ops whose kernel a user brings: what `cuda_kernel` and `triton_kernel` share.

A `Kernel` says, for one call, what is launched; this module makes an op of it, with
checks, shapes, in place semantics and a fallback, as the ops of this package have.

A declaration's functions (grid, results, parameters) see no tensors: they are given a
`Given` for each, which has a shape and a dtype. They run once a signature.

Tested by tests/extend/test_launch.py and tests/extend/test_cuda_kernel.py.
"""

from __future__ import annotations

import functools
import inspect
import keyword
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ..core import (
    autocast,
    debug,
    front,
    gradients,
    handlers,
    in_place,
    mutable,
    scalars,
)
from ..core.checks import Checker
from ..core.custom_call import CustomCall
from ..core.dtypes import dtype_name, primitive_type
from ..core.errors import Problem, warn_user
from ..core.hlo import Spec
from ..core.op import NAMESPACE, Op, Results
from ..core.sharding import Rule, Rules
from . import launch
from .launch import TARGET, Given, Launch, Machine


@dataclass(frozen=True)
class Kernel:
    """A kernel that a user brings, as its subclasses have it.

    Attributes:
        check: of the op's name.
        results: (*arguments) -> what is computed, see `cuda_kernel`.
    """

    check: Checker
    results: Callable[..., Any] | None

    def check_call(self, args: Sequence[Any], results: Sequence[Given]) -> None:
        """Checks what can be checked on any machine; no size is a symbol."""
        raise NotImplementedError

    def launch(
        self,
        args: Sequence[Any],
        results: Sequence[Given],
        num_values: int,
        machine: Machine,
    ) -> Launch:
        """Compiles the kernel for a call that was checked.

        Args:
            num_values: how many tensors the call gives: the new values of those that it
                writes, and then `results`.
        """
        raise NotImplementedError


class Argument(NamedTuple):
    """An argument of a schema."""

    name: str
    kind: str  # "Tensor", "int", "float" or "bool"
    is_written: bool
    default: str  # its text, or ""


_KINDS = ("Tensor", "int", "float", "bool")


class Signature(NamedTuple):
    """A schema in torch's language: "(Tensor(a!) x, float a) -> Tensor"."""

    arguments: tuple[Argument, ...]
    num_results: int

    @property
    def names(self) -> list[str]:
        """Of the arguments."""
        return [a.name for a in self.arguments]

    @property
    def result_names(self) -> list[str]:
        return [f"result{i}" for i in range(self.num_results)]

    @property
    def written(self) -> tuple[Argument, ...]:
        return tuple(a for a in self.arguments if a.is_written)


def parse(op: str, schema: str) -> Signature:
    """Reads a schema.

    Raises:
        ValueError: it is none, or has what a kernel cannot take.
    """
    if not _is_name(op):
        raise ValueError(
            f"xla_ops.extend: name must be one of Python's, of ASCII, got {op!r}"
        )
    check = Checker(op)
    is_text = isinstance(schema, str)
    check.require(is_text, "schema", "be a str", type(schema).__name__)
    try:
        parsed = torch._C.parse_schema(op + schema)
    except (RuntimeError, IndexError) as error:  # the second of a number too large
        text = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{op}: schema must be one of torch's, as '(Tensor x, float a) -> Tensor',"
            f" got {schema!r}: {text}"
        ) from None
    arguments = []
    for a in parsed.arguments:
        kind = str(a.type)
        rule = "be of Tensors, ints, floats and bools"
        check.require(kind in _KINDS, "schema", rule, f"{kind} {a.name}")
        is_written = a.alias_info is not None and a.alias_info.is_write
        default = repr(a.default_value) if a.has_default_value() else ""
        arguments.append(Argument(a.name, kind, is_written, default))
    names = [a.name for a in arguments]
    for name in names:
        rule = "name its arguments as Python could"
        check.require(_is_name(name), "schema", rule, name)
        check.require(names.count(name) == 1, "schema", "name none twice", name)
    kinds = [str(r.type) for r in parsed.returns]
    is_new = all(r.alias_info is None for r in parsed.returns)
    fits = is_new and all(kind == "Tensor" for kind in kinds)
    check.require(fits, "schema", "return new Tensors", schema)
    is_some = any(a.kind == "Tensor" for a in arguments)
    check.require(is_some, "schema", "take a Tensor", schema)
    signature = Signature(tuple(arguments), len(kinds))
    computes = bool(kinds or signature.written)
    check.require(computes, "schema", "return or write a Tensor", schema)
    return signature


def _is_name(text: object) -> bool:
    if not isinstance(text, str) or keyword.iskeyword(text):
        return False
    return text.isascii() and text.isidentifier()


def check_takes(
    check: Checker, argument: str, value: Any, names: Sequence[str]
) -> None:
    """Checks, where `value` is a function, that it takes arguments of these names."""
    if not callable(value):
        ok = value is None or argument not in ("parameters", "reference", "results")
        check.require(ok, argument, "be a function or None", repr(value))
        return
    try:
        signature = inspect.signature(value)
    except ValueError:
        return  # a function of C that does not say
    try:
        signature.bind(*names)
    except TypeError:
        rule = f"take {len(names)} arguments ({', '.join(names)})"
        check.require(False, argument, rule, f"a function of {signature}")


class _ShapesOnly(threading.local):
    on = False


_shapes_only = _ShapesOnly()


@contextmanager
def _only_shapes() -> Iterator[None]:
    before, _shapes_only.on = _shapes_only.on, True
    try:
        yield
    finally:
        _shapes_only.on = before


@dataclass(frozen=True)
class KernelOp(Op):
    """An op whose handler is the launcher, on a GPU alone."""

    # The mode that the plans are of: calls of the other are other calls.
    _modes: set[bool] = field(default_factory=set, init=False, compare=False)

    def _in_graph(self, *args: Any) -> Results:
        mode = debug.enabled()
        if mode not in self._modes:
            self._plans.clear()
            self._modes.clear()
            self._modes.add(mode)
        return super()._in_graph(*args)

    def _runs(self, platform: str, target: str, *, at_once: bool) -> bool:
        if platform == handlers.CUDA:
            return super()._runs(platform, target, at_once=at_once)
        _tell_of_reference(self.public_name, platform)
        return False

    def _fake(self, *args: Any) -> Results:
        with _only_shapes():
            return super()._fake(*args)

    def _check(self, *args: Any) -> None:
        with _only_shapes():
            super()._check(*args)


@functools.cache
def _tell_of_reference(op: str, platform: str) -> None:
    where = "the CPU" if platform == handlers.HOST else platform
    warn_user(f"{op}: its reference function runs, because the device is {where}")


def define(
    name: str,
    signature: Signature,
    kernel: Kernel,
    *,
    reference: Callable[..., Results] | None,
    gradient: gradients.Gradient | None,
    splits: Rules | None,
    rule: autocast.Rule,
    doc: str,
) -> Callable[..., Any]:
    """Makes a function of a kernel, and an op below it.

    Args:
        name: of both; where it is taken, the op's has a number behind it.
        reference: (*arguments) -> the new values of what is written, then the results.
        rule: what torch.autocast means for it.
        The others are as in `cuda_kernel`.
    """
    written = signature.written
    ok = gradient is None or isinstance(gradient, gradients.Gradient)
    kernel.check.require(ok, "gradient", "be a Gradient or None", repr(gradient))
    ok = splits is None or callable(splits) or isinstance(splits, Rule)
    kernel.check.require(ok, "splits", "be a Rule, a function or None", repr(splits))
    kernel.check.require(callable(rule), "rule", "be a function", repr(rule))
    if written and gradient is not None:
        raise ValueError(
            f"{name}: gradient must be absent where an argument is written, got one"
        )
    # What is written comes first: that is where an op's donor stands.
    order = [*written, *(a for a in signature.arguments if not a.is_written)]
    has_donor = len(written) == 1 and signature.num_results == 0
    if has_donor and "donor" in signature.names:
        raise ValueError(f"{name}: schema must name its arguments otherwise, got donor")
    own = _free_name(name)
    declaration = _Declaration(name, signature, order, kernel, reference)
    op = KernelOp(
        f"{own}_functional" if written else own,
        _functional_schema(order, declaration.num_values, has_donor),
        declaration.lower,
        declaration.run_reference,
        autocast=rule,
        splits=splits,
        gradient=gradient,
        public_name=name,
    )
    call: Callable[..., Any] = op
    if written:
        update = _update_one if has_donor else _update_several
        front.define(
            NAMESPACE,
            own + _schema_text(signature),
            functools.partial(update, op, declaration),
            autocast=rule,
        )
        call = getattr(torch.ops.xla_ops, own).default
    function = _function(name, signature, call)
    function.__doc__ = doc
    return function


def _free_name(name: str) -> str:
    """`name`, or with a number behind it: a notebook's cell is run again."""
    taken = lambda n: any(  # noqa: E731
        hasattr(torch.ops.xla_ops, n + end) for end in ("", "_functional")
    )
    if not taken(name):
        return name
    number = 2
    while taken(f"{name}_{number}"):
        number += 1
    return f"{name}_{number}"


def _functional_schema(
    order: Sequence[Argument], num_results: int, has_donor: bool
) -> str:
    parts = [f"{a.kind} {a.name}" for a in order]
    if has_donor:
        parts.append("Tensor? donor")
    results = ", ".join(["Tensor"] * num_results)
    if num_results != 1:
        results = f"({results})"
    return f"({', '.join(parts)}) -> {results}"


def _schema_text(signature: Signature) -> str:
    parts, letters = [], iter("abcdefghijklmnopqrstuvwxyz")
    for a in signature.arguments:
        kind = f"Tensor({next(letters)}!)" if a.is_written else a.kind
        default = f"={a.default}" if a.default else ""
        parts.append(f"{kind} {a.name}{default}")
    results = ", ".join(["Tensor"] * signature.num_results)
    if signature.num_results != 1:
        results = f"({results})"
    return f"({', '.join(parts)}) -> {results}"


def _function(
    name: str, signature: Signature, call: Callable[..., Any]
) -> Callable[..., Any]:
    """Writes the function that users call, with the schema's names and defaults.

    As text, so that it has a signature of its own and Dynamo can trace it.
    """
    converters = {"int": "integer", "float": "number", "bool": "flag"}
    head = ", ".join(
        a.name + (f"={a.default}" if a.default else "") for a in signature.arguments
    )
    # Beside these names stand the user's, of the function and its arguments.
    own: tuple[str, ...] = ("check_", "scalars_", "call_")
    while {name, *signature.names} & set(own):
        own = tuple(f"{word}_" for word in own)
    check, convert, target = own
    lines = [f"def make({', '.join(own)}):", f"    def {name}({head}):"]
    for a in signature.arguments:
        if a.kind == "Tensor":
            lines.append(f"        {check}.tensor({a.name!r}, {a.name})")
        else:
            how = f"{convert}.{converters[a.kind]}({name!r}, {a.name!r}, {a.name})"
            lines.append(f"        {a.name} = {how}")
    names = ", ".join(a.name for a in signature.arguments)
    lines += [f"        return {target}({names})", f"    return {name}"]
    scope: dict[str, Any] = {}
    exec("\n".join(lines), scope)
    function = scope["make"](Checker(name), scalars, call)
    function.__qualname__ = name
    return function


class _Declaration(NamedTuple):
    """Joins a kernel with its signature."""

    name: str
    signature: Signature
    order: Sequence[Argument]  # the functional op's
    kernel: Kernel
    reference: Callable[..., Results] | None

    @property
    def num_values(self) -> int:
        """How many tensors the functional op returns."""
        return len(self.signature.written) + self.signature.num_results

    def lower(self, *args: Any) -> CustomCall:
        check = self.kernel.check
        values = dict(zip((a.name for a in self.order), args, strict=True))
        tensors = {a.name: values[a.name] for a in self.order if a.kind == "Tensor"}
        for argument, t in tensors.items():
            check.require(
                _is_carried(t.dtype),
                argument,
                "be of a dtype that XLA's calls carry",
                dtype_name(t.dtype),
            )
        (first, first_tensor), *_ = tensors.items()
        check.same_device(first, first_tensor, **tensors)
        operands = {
            argument: Given(tuple(t.shape), t.dtype, i)
            for i, (argument, t) in enumerate(tensors.items())
        }
        given = [operands.get(a.name, values[a.name]) for a in self.signature.arguments]
        new = self._results(given)
        updated = [operands[a.name] for a in self.signature.written]
        specs = tuple(Spec(g.shape, g.dtype) for g in (*updated, *new))
        results = [
            Given(g.shape, g.dtype, len(updated) + i, is_result=True)
            for i, g in enumerate(new)
        ]
        aliases = {i: a.name for i, a in enumerate(self.signature.written)}
        call = CustomCall(TARGET, tuple(tensors), specs, aliases=aliases)
        platform = handlers.platform_of(first_tensor.device)
        if platform == handlers.HOST and self.reference is None:
            raise self._no_reference()
        sizes = [n for spec in (*tensors.values(), *specs) for n in spec.shape]
        if any(isinstance(n, torch.SymInt) for n in sizes) or call.is_empty:
            return call
        self.kernel.check_call(given, results)
        if _shapes_only.on or platform != handlers.CUDA:
            return call
        launched = self.kernel.launch(given, results, self.num_values, launch.machine())
        launch.add_code(launched.code)
        attributes, scratch = launch.encode(check, launched), launched.scratch
        if debug.enabled():
            more, attributes["guarded"] = launch.guards(launched, results)
            scratch += more
        return CustomCall(
            TARGET,
            tuple(tensors),
            specs,
            attributes,
            aliases=aliases,
            scratch=scratch,
        )

    def _no_reference(self) -> Problem:
        return Problem(
            f"{self.name}: reference must be given where no GPU runs the kernel, got"
            " None",
            "pass reference=, a function of the same arguments in plain torch, or run"
            " with PJRT_DEVICE=CUDA",
        )

    def _results(self, given: Sequence[Any]) -> list[Given]:
        count = self.signature.num_results
        if count == 0:
            return []
        if self.kernel.results is None:
            first = next(g for g in given if isinstance(g, Given))
            return [first] * count
        found = self.kernel.results(*given)
        if isinstance(found, Given | Spec | torch.Tensor):
            found = (found,)
        fits = isinstance(found, Sequence) and all(
            isinstance(g, Given | Spec | torch.Tensor) for g in found
        )
        rule = f"give {count} of a shape and a dtype, as the arguments are"
        self.kernel.check.require(
            fits and len(found) == count, "results", rule, _described(found)
        )
        for g in found:
            sizes = tuple(g.shape)
            ok = all(
                isinstance(n, torch.SymInt) or (isinstance(n, int) and n >= 0)
                for n in sizes
            )
            rule = "have shapes of ints from 0 on"
            self.kernel.check.require(ok, "results", rule, sizes)
            is_dtype = isinstance(g.dtype, torch.dtype)
            self.kernel.check.require(is_dtype, "results", "have dtypes", g.dtype)
        return [Given(tuple(g.shape), g.dtype) for g in found]

    def run_reference(self, *args: Any) -> Results:
        if self.reference is None:
            raise self._no_reference()
        values = dict(zip((a.name for a in self.order), args, strict=True))
        found = self.reference(*(values[a.name] for a in self.signature.arguments))
        results = found if isinstance(found, tuple) else (found,)
        with _only_shapes():
            specs = self.lower(*args).results
        device = next(a.device for a in args if isinstance(a, torch.Tensor))
        got = [_told(t, device) for t in results]
        wanted = [f"{dtype_name(s.dtype)} {list(s.shape)}" for s in specs]
        rule = f"give {', '.join(wanted)}"
        self.kernel.check.require(got == wanted, "reference", rule, ", ".join(got))
        # An op returns no tensor twice. Those that it was given are copies already.
        own: list[torch.Tensor] = []
        for t in results:
            is_shared = any(_share(t, other) for other in own)
            own.append(t.clone() if is_shared else t)
        return tuple(own) if self.num_values > 1 else own[0]


def _told(result: object, device: torch.device) -> str:
    if not isinstance(result, torch.Tensor):
        return type(result).__name__
    where = "" if result.device == device else f" on {result.device}"
    return f"{dtype_name(result.dtype)} {list(result.shape)}{where}"


def _share(t: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether writing one of them would show in the other."""
    if t is other:
        return True
    if "xla" in (t.device.type, other.device.type):
        return False  # what torch_xla computes has memory of its own
    return t.untyped_storage()._cdata == other.untyped_storage()._cdata


def _described(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"{len(value)}: {list(value)}"
    return repr(value)


def _is_carried(dtype: torch.dtype) -> bool:
    try:
        primitive_type(dtype)
    except KeyError:
        return False
    return True


def _bound(declaration: _Declaration, args: Sequence, kwargs: Mapping) -> dict:
    """The arguments by name; torch leaves out those that equal their defaults."""
    arguments = declaration.signature.arguments
    values = dict(zip((a.name for a in arguments), args, strict=False))
    values.update(kwargs)
    for a in arguments:
        if a.name not in values:
            values[a.name] = {"True": True, "False": False}.get(a.default)
            if values[a.name] is None:
                convert = float if a.kind == "float" else int
                values[a.name] = convert(a.default)
    return {a.name: values[a.name] for a in declaration.order}


def _update_one(
    op: KernelOp, declaration: _Declaration, *args: Any, **kwargs: Any
) -> None:
    """The front of a kernel that writes one argument and computes nothing else."""
    values = _bound(declaration, args, kwargs)
    t, *rest = values.values()
    with _only_shapes():
        declaration.lower(t, *rest)  # the checks, before a buffer is touched
    if not t.numel():
        return
    written = declaration.order[0].name
    place = in_place.locate(t)
    in_place.check_writable(declaration.name, {written: (t, place)})
    if in_place.is_value(t):
        in_place.update(op, t, *rest)
    else:
        op.update_at_once(t, *rest, None)


def _update_several(
    op: KernelOp, declaration: _Declaration, *args: Any, **kwargs: Any
) -> Any:
    """The front of a kernel that writes several arguments, or has results too."""
    values = _bound(declaration, args, kwargs)
    written = [a.name for a in declaration.signature.written]
    targets: dict[str, torch.Tensor | None] = {name: values[name] for name in written}
    num_results = declaration.signature.num_results
    targets |= {f"result {i}": None for i in range(num_results)}
    update = mutable.Update(op, tuple(values.values()), targets)
    results = mutable.apply(declaration.name, update)[len(written) :]
    if num_results == 0:
        return None
    return results[0] if num_results == 1 else tuple(results)
