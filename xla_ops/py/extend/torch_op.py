"""Any operator of torch as a custom call of an XLA program, by its name.

`torch_op` defines a front in torch.ops.xla_ops with the operator's own schema. For XLA
tensors it takes the arguments apart: tensors become operands, and everything else one
text (`call_text.py`), which the handler `xla_ops.torch_op` reads
(xla_ops/cc/extend/torch_op.cc). CPU and CUDA tensors go to the operator itself.

Below the front lies an `Op` for each number of operands and results, so that plans,
gradients, torch.compile and replay work as for the ops of this package. What the
operator writes into becomes that op's aliased results, which are the tensors' new
values (`core/in_place.py`).

Decision and costs: docs/adr/0013-extend.md, docs/extend.md.
Tested by tests/extend/test_torch_op.py.
"""

from __future__ import annotations

import functools
import itertools
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import _disable_current_modes

from ..core import autocast as autocasts
from ..core import front, handlers, in_place, mutable, ownership, paths
from ..core.checks import Checker
from ..core.custom_call import CustomCall
from ..core.dtypes import dtype_name
from ..core.errors import Problem
from ..core.gradients import Backward, Gradient
from ..core.hlo import Spec
from ..core.op import NAMESPACE, Op
from ..core.tracing import is_plain
from .call_text import DTYPES, Arguments, Place, Target, result_specs, result_text
from .library import register_library

_check = Checker("torch_op")
_DISPATCH_KEYS = {handlers.HOST: "CPU", handlers.CUDA: "CUDA"}

# As many as an `Op` keeps.
_MAX_PLANS = 1024


def torch_op(
    name: str,
    *,
    outputs: Sequence[str] = (),
    meta: Callable | None = None,
    capturable: bool = False,
    gradient: Gradient | None = None,
    autocast: autocasts.Rule = autocasts.unchanged,
) -> torch._ops.OpOverload:
    """Makes an operator of torch callable on XLA tensors.

    The operator runs inside the XLA program: on XLA's buffers, which are wrapped and
    never copied, and on XLA's device and stream, which are torch's current ones for
    that long. What it writes into by its schema ("Tensor(a!)", "Tensor!") is updated in
    place, and what it returns is copied once, from torch's memory to XLA's: where the
    operator has a form with `out`, that form saves the copy.

    CPU and CUDA tensors go to the operator itself, so the same code runs on them.

    Args:
        name: such as "aten::add.out" or "_C::rms_norm". The library that defines it
            must be loaded. It needs a kernel for CPU or CUDA, whatever XLA runs on.
        outputs: arguments that the operator only writes, although its schema does not
            say so: their old values are not passed. `out` arguments of aten are known.
        meta: (*arguments on the meta device) -> what the operator returns, likewise, or
            the argument itself where it returns that; for an operator that returns
            tensors and has no meta kernel (torch.library.register_fake).
        capturable: whether the operator neither takes memory from torch's allocator nor
            waits for the device, so that XLA may capture it into a CUDA graph. It must
            return no tensors of its own then.
        gradient: for operators that write nothing: how backward differentiates a call
            on XLA tensors, with the argument names of the schema, and "name_0" and so
            on for those in a list. None: backward raises.
        autocast: what torch.autocast means for it on XLA tensors.

    Returns:
        torch.ops.xla_ops.<namespace>_<operator>, with the operator's own schema.

    Raises:
        ValueError: there is no such operator, it cannot be called from XLA (it returns
            numbers, say), or it was declared before with other options.

    Example:
        >>> add = torch_op("aten::add.out")
        >>> out = torch.empty(2)
        >>> add(torch.ones(2), torch.ones(2), out=out)
        tensor([2., 2.])
    """
    _check.text("name", name)
    is_one = isinstance(outputs, str)
    _check.require(not is_one, "outputs", "be a sequence of names", repr(outputs))
    for option, function in (("meta", meta), ("autocast", autocast)):
        is_function = callable(function) or function is None
        _check.require(is_function, option, "be a function", function)
    options = (tuple(outputs), meta, capturable, gradient, autocast)
    with _lock:
        known = _declared.get(name)
        if known is None:
            known = _Operator(name, options)
            known.define()
            _declared[name] = known
    rule = "be declared once, or with the same options again"
    _check.require(known.options == options, "name", rule, f"{name} with others")
    return known.front


_declared: dict[str, _Operator] = {}
_lock = threading.RLock()
_numbers = itertools.count()


@functools.cache
def _load_handlers() -> None:
    register_library(paths.LIB / "libxla_ops_torch_op.so")


def _find(name: str) -> torch._ops.OpOverload:
    namespace, _, rest = name.partition("::")
    op, _, overload = rest.partition(".")
    try:
        packet = getattr(getattr(torch.ops, namespace), op)
        return getattr(packet, overload or "default")
    except AttributeError:
        rule = "be an operator that torch has, whose library is loaded"
        raise ValueError(f"{_check.op}: name must {rule}, got {name!r}") from None


class _Call(Op):
    """The functional op of one operator with one number of operands and results.

    Its arguments are the operands, the call's text, that of the results' shapes, and a
    donor for each operand that is updated.
    """


class _Plan(NamedTuple):
    """What is done for every call of one signature.

    Attributes:
        op: that runs.
        texts: of the call, and of its results' shapes.
        operands: where each lies in the arguments.
        targets: what the operator writes; the first results are theirs.
        returned: for each return the number of the result, or several of a list.
    """

    op: _Call
    texts: tuple[str, str]
    operands: tuple[Place, ...]
    targets: tuple[Target, ...]
    returned: tuple


class _Operator:
    """One operator of torch: its front, and its calls."""

    def __init__(self, name: str, options: tuple):
        self.name = name
        self.options = options
        outputs, self.meta, self.capturable, self.gradient, self.autocast = options
        self.overload = _find(name)
        schema = self.overload._schema
        self.check = Checker(name)
        self.arguments = schema.arguments
        self.names = [a.name for a in schema.arguments]
        self.written = [_is_written(a) for a in schema.arguments]
        for output in outputs:
            place = self.names.index(output) if output in self.names else -1
            rule = "name arguments that the operator writes"
            _check.require(place >= 0 and self.written[place], "outputs", rule, output)
        _check.require(
            torch.Tag.inplace_view not in self.overload.tags,
            "name",
            "be an operator that leaves shapes and strides of what it writes alone",
            name,
        )
        self.is_output = [a.is_out or a.name in outputs for a in schema.arguments]
        for returned in schema.returns:
            rule = "be an operator that returns tensors alone"
            kind = str(returned.type)
            _check.require(
                kind in ("Tensor", "List[Tensor]"), "name", rule, f"{name} -> {kind}"
            )
        # The argument that each return is, by its alias; -1: none.
        self.returned = [self._aliased(r) for r in schema.returns]
        _check.require(
            bool(schema.returns) or any(self.written),
            "name",
            "be an operator that returns a tensor or writes one",
            name,
        )
        _check.require(
            not (self.capturable and self.returned == [-1] and not any(self.written)),
            "capturable",
            "be False for an operator that returns tensors of its own",
            name,
        )
        self._calls: dict[tuple, _Call] = {}
        self._plans: dict[tuple, _Plan] = {}
        self._platforms: set[str] = set()

    def _aliased(self, returned: Any) -> int:
        alias = returned.alias_info
        if alias is None or not alias.is_write:
            return -1
        found = [
            i
            for i, a in enumerate(self.arguments)
            if a.alias_info and a.alias_info.before_set == alias.before_set
        ]
        return found[0] if found else -1

    def define(self) -> None:
        """Defines the front."""
        _load_handlers()
        schema = str(self.overload._schema)
        # "Tensor! out" is shown in a form that torch does not read.
        schema = re.sub(r"\(\$(\w+)! -> \)", r"(w\1!)", schema)
        op, dot, overload = self.name.replace("::", "_").partition(".")
        self.base = op
        front.define(
            NAMESPACE,
            f"{op}{dot}{overload}{schema[schema.index('(') :]}",
            self._run,
            autocast=self.autocast,
        )
        self.front = getattr(getattr(torch.ops.xla_ops, op), overload or "default")

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        values = self._values(args, kwargs)
        devices = {t.device.type for value in values for t in _tensors(value)}
        if "xla" not in devices:
            return self.overload(*args, **kwargs)
        if len(devices) > 1:
            self._refuse_other_devices(values)
        key = _signature(values)
        plan = None if key is None else self._plans.get(key)
        if plan is None:
            plan = self._new_plan(values)
            if key is not None:
                if len(self._plans) >= _MAX_PLANS:
                    self._plans.clear()
                self._plans[key] = plan
        return self._on_xla(plan, values)

    def _refuse_other_devices(self, values: list) -> None:
        for name, value in zip(self.names, values, strict=True):
            for t in _tensors(value):
                rule = "be on an XLA device, as other arguments are"
                self.check.require(t.device.type == "xla", name, rule, t.device)

    def _values(self, args: tuple, kwargs: dict) -> list:
        """All arguments, in the schema's order; torch leaves defaults out."""
        positional = iter(args)
        values = []
        for a in self.arguments:
            if a.name in kwargs:
                values.append(kwargs[a.name])
            elif a.kwarg_only:
                values.append(a.default_value)
            else:
                values.append(next(positional, a.default_value))
        return values

    def _new_plan(self, values: list) -> _Plan:
        self._require_kernel(handlers.xla_platform())
        taken = Arguments(self.check, self.arguments)
        for a, value, is_written, is_output in zip(
            self.arguments, values, self.written, self.is_output, strict=True
        ):
            taken.add(a, value, is_written, is_output)
        taken.require_operand()
        if any(_at(values, target.place).numel() == 0 for target in taken.targets):
            self._refuse_growth(values, taken)
        returned, specs = self._returned(values, taken)
        updated = [
            Spec(tuple(map(int, t.shape)), t.dtype)
            for t in (_at(values, target.place) for target in taken.targets)
        ]
        results = updated + specs
        text = taken.text(self.name, returned)
        if self.gradient is not None:
            _remember(text, dict(zip(self.names, values, strict=True)))
        return _Plan(
            self._call(taken, len(results)),
            (text, result_text(results)),
            tuple(operand.place for operand in taken.operands),
            tuple(taken.targets),
            returned,
        )

    def _on_xla(self, plan: _Plan, values: list) -> Any:
        operands = [_at(values, place) for place in plan.operands]
        if not plan.targets:
            computed = plan.op(*operands, *plan.texts)
            computed = list(computed) if isinstance(computed, tuple) else [computed]
            return _structured(plan.returned, computed)
        targets = [_at(values, target.place) for target in plan.targets]
        named = {
            t.label: tensor for t, tensor in zip(plan.targets, targets, strict=True)
        }
        mutable.check_writable(self.name, named)
        places = [t.operand for t in plan.targets if t.operand is not None]
        aliased = [operands[place] for place in places]
        old, donors = in_place.prepare(self.name, aliased)
        for place, t in zip(places, old, strict=True):
            operands[place] = t
        computed = plan.op(*operands, *plan.texts, *donors)
        computed = list(computed) if isinstance(computed, tuple) else [computed]
        for target, value in zip(targets, computed, strict=False):
            if target.numel():
                in_place.assign(target, value)
        ownership.renew([t for t in aliased if t._is_view()])
        return _structured(plan.returned, targets + computed[len(targets) :])

    def _require_kernel(self, platform: str) -> None:
        if platform in self._platforms:
            return
        key = _DISPATCH_KEYS.get(platform)
        rule = f"{self.name}: XLA's device must be one that torch has kernels for"
        if key is None:
            raise ValueError(f"{rule}, got {platform}")
        full = str(self.overload._schema.name)
        if self.overload._schema.overload_name:
            full += f".{self.overload._schema.overload_name}"
        if not torch._C._dispatch_has_computed_kernel_for_dispatch_key(full, key):
            raise ValueError(f"{self.name}: kernel must be there for {key}, got none")
        table = torch._C._dispatch_dump_table(full).splitlines()
        kernel = next((line for line in table if line.startswith(f"{key}: ")), "")
        # On a thread of XLA's it would wait for the interpreter's lock, and torch_xla
        # waits for XLA in places where it holds that.
        found = re.search(r"registered at (.*(?:\.py|>):\d+) \[", kernel)
        if found:
            rule = f"{self.name}: kernel must not be written in Python"
            raise ValueError(f"{rule}, got that of {found[1]}")
        if key == "CUDA":
            torch.cuda.init()  # the handler, on a thread of XLA's, finds it ready
        self._platforms.add(platform)

    def _returned(self, values: list, taken: Arguments) -> tuple[tuple, list[Spec]]:
        """What the operator returns, as it returns it, and shapes of what is new.

        Returns:
            For each return one entry or, for a list, several: the number of the result
            it is; and the Specs of the results after the targets.
        """
        if all(place >= 0 for place in self.returned):
            entries = tuple(self._entry(place, taken) for place in self.returned)
            return entries, []
        return self._ask_meta(values, taken)

    def _entry(self, place: int, taken: Arguments) -> Any:
        """The results that an argument, which is returned, is."""
        numbers = taken.results_of(place)
        return numbers if taken.is_list(place) else numbers[0]

    def _refuse_growth(self, values: list, taken: Arguments) -> None:
        """Raises ValueError for `out=torch.empty(0)`, which torch would make larger.

        No handler would: a call without an element of results does not reach it.
        """
        stand_ins: dict[int, torch.Tensor] = {}
        try:
            self._call_meta(values, stand_ins)
        except NotImplementedError:
            return
        for target in taken.targets:
            given = _at(values, target.place)
            wanted = stand_ins[id(given)].shape
            rule = f"have shape {list(wanted)}"
            self.check.require(
                given.shape == wanted, target.label, rule, list(given.shape)
            )

    def _call_meta(self, values: list, stand_ins: dict[int, torch.Tensor]) -> Any:
        """Calls the operator, or what was given as `meta`, on the meta device.

        Args:
            stand_ins: is filled with the tensors of that device, by id of the given.
        """
        with _disable_current_modes(), torch.no_grad():
            args = [_to_meta(value, stand_ins) for value in values]
            positional, keywords = [], {}
            for a, value in zip(self.arguments, args, strict=True):
                if a.kwarg_only:
                    keywords[a.name] = value
                else:
                    positional.append(value)
            return (self.meta or self.overload)(*positional, **keywords)

    def _ask_meta(self, values: list, taken: Arguments) -> tuple[tuple, list[Spec]]:
        stand_ins: dict[int, torch.Tensor] = {}
        try:
            answer = self._call_meta(values, stand_ins)
        except NotImplementedError as error:
            reason = str(error).partition("\n")[0]
            rule = f"{self.name}: meta must be given for an operator without a"
            raise ValueError(f"{rule} meta kernel, got none: {reason}") from None
        answers = answer if isinstance(answer, tuple) else (answer,)
        if len(answers) != len(self.returned):
            rule = f"return {len(self.returned)} values"
            self.check.require(False, "meta", rule, len(answers))
        known = {
            id(stand_ins[id(_at(values, target.place))]): number
            for number, target in enumerate(taken.targets)
        }
        specs: list[Spec] = []

        def entry(t: torch.Tensor) -> int:
            if id(t) in known:
                return known[id(t)]
            if t.dtype not in DTYPES.values():
                rule = "return tensors of XLA's dtypes"
                self.check.require(False, "meta", rule, dtype_name(t.dtype))
            specs.append(Spec(tuple(map(int, t.shape)), t.dtype))
            return len(taken.targets) + len(specs) - 1

        entries = []
        for place, given in zip(self.returned, answers, strict=True):
            if place >= 0:
                entries.append(self._entry(place, taken))
            elif isinstance(given, (list, tuple)):
                entries.append([entry(t) for t in given])
            else:
                entries.append(entry(given))
        _check.require(
            not (self.capturable and specs),
            "capturable",
            "be False for an operator that returns tensors of its own",
            self.name,
        )
        return tuple(entries), specs

    def _call(self, taken: Arguments, num_results: int) -> _Call:
        names = tuple(operand.name for operand in taken.operands)
        aliases = {
            number: names[target.operand]
            for number, target in enumerate(taken.targets)
            if target.operand is not None
        }
        key = (names, tuple(aliases.items()), num_results)
        op = self._calls.get(key)
        if op is None:
            op = self._calls[key] = self._new_call(names, aliases, num_results, taken)
        return op

    def _new_call(
        self,
        names: tuple[str, ...],
        aliases: dict[int, str],
        num_results: int,
        taken: Arguments,
    ) -> _Call:
        donors = [f"donor_{number}" for number in aliases]
        parts = [f"Tensor {name}" for name in names]
        parts += ["str call_", "str results_", *(f"Tensor? {d}" for d in donors)]
        results = ", ".join(["Tensor"] * num_results)
        results = f"({results})" if num_results > 1 else results
        target = "xla_ops.torch_op" + ("_captured" if self.capturable else "")

        def lower(*args: Any) -> CustomCall:
            *_, text, shapes = args
            specs = result_specs(shapes)
            # From the last to the first: see call_text.py.
            return CustomCall(target, names[::-1], specs, {"call": text}, aliases)

        def reference(*args: Any) -> Any:
            raise Problem(
                f"{self.name}: handler must be there for XLA's device, got none",
                "an operator of torch has no other form; `python -m xla_ops doctor`"
                " tells more",
            )

        gradient = self.gradient
        if gradient is not None:
            compute = gradient.compute
            gradient = replace(
                gradient, compute=lambda backward: compute(_with_values(backward))
            )
        return _Call(
            f"torch_op_{self.base}_{next(_numbers)}",
            f"({', '.join(parts)}) -> {results}",
            lower,
            reference,
            autocast=autocasts.unchanged,
            gradient=gradient,
            public_name=self.name,
            labels=taken.labels,
        )


def _structured(returned: tuple, tensors: list[torch.Tensor]) -> Any:
    """What the front returns, of all results."""
    found = [
        [tensors[n] for n in entry] if isinstance(entry, list) else tensors[entry]
        for entry in returned
    ]
    if not found:
        return None
    return found[0] if len(found) == 1 else tuple(found)


def _at(values: list, place: Place) -> torch.Tensor:
    argument, element = place
    value = values[argument]
    return value if element is None else value[element]


def _signature(values: list) -> tuple | None:
    """What a plan depends on; None in a trace, where sizes may be symbols."""
    found: list[Any] = []
    seen: dict[int, int] = {}  # which tensors are the same one
    for value in values:
        is_list = isinstance(value, (list, tuple))
        for v in value if is_list else (value,):
            if isinstance(v, torch.Tensor):
                if not is_plain(v):
                    return None
                found += v.shape, v.dtype, seen.setdefault(id(v), len(seen))
            elif isinstance(v, float):
                found.append(v.hex())
            else:
                found += type(v), v  # 1, 1.0 and True are the same key
        found.append(len(value) if is_list else None)
    return tuple(found)


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _tensors(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [t for t in value if isinstance(t, torch.Tensor)]
    return []


def _to_meta(value: Any, stand_ins: dict[int, torch.Tensor]) -> Any:
    """The value for a meta kernel; a tensor is the same one wherever it occurs."""
    if isinstance(value, torch.Tensor):
        if id(value) not in stand_ins:
            shape = tuple(map(int, value.shape))
            stand_ins[id(value)] = torch.empty(shape, dtype=value.dtype, device="meta")
        return stand_ins[id(value)]
    if isinstance(value, (list, tuple)):
        return [_to_meta(v, stand_ins) for v in value]
    return torch.device("meta") if isinstance(value, torch.device) else value


# The other arguments of a call, by its text, for gradients. As many as calls that
# differ, which XLA's programs hold too.
_arguments: dict[str, dict[str, Any]] = {}


def _remember(text: str, values: dict[str, Any]) -> None:
    if text not in _arguments:
        _arguments[text] = {
            name: value for name, value in values.items() if not _tensors(value)
        }


def _with_values(backward: Backward) -> Backward:
    args = dict(backward.args)
    text = args.pop("call_")
    args.pop("results_")
    assert isinstance(text, str)
    return backward._replace(args={**_arguments[text], **args})
