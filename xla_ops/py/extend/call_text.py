"""The arguments of a torch operator, taken apart: operands of a custom call, and a text
for all the rest. xla_ops/cc/extend/torch_op.cc reads the text and describes it.

Tested by tests/extend/test_torch_op.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from ..core.checks import Checker
from ..core.dtypes import dtype_name, primitive_type
from ..core.hlo import Spec

DTYPES = {
    primitive_type(dtype): dtype
    for dtype in (
        torch.bool,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.uint8,
        torch.float16,
        torch.float32,
        torch.float64,
        torch.bfloat16,
        torch.float8_e5m2,
        torch.float8_e4m3fn,
    )
}
# torch's numbers, c10/core/MemoryFormat.h and c10/core/Layout.h.
_MEMORY_FORMATS = {
    torch.contiguous_format: 0,
    torch.preserve_format: 1,
    torch.channels_last: 2,
    torch.channels_last_3d: 3,
}
_LISTS = {"int": "I", "float": "F", "bool": "B", "str": "S"}


# Where a tensor lies: which argument it is, and which element of that if it is a list.
Place = tuple[int, int | None]


class Operand(NamedTuple):
    name: str
    place: Place


class Target(NamedTuple):
    """A tensor that the operator writes.

    Attributes:
        label: what it is called in error texts.
        place: of it.
        operand: the operand that it is; None: the operator only writes it.
    """

    label: str
    place: Place
    operand: int | None


class Arguments:
    """The arguments of one call, as they are added.

    Attributes:
        operands: the tensors that the operator reads.
        targets: those that it writes, in the order of results.
        labels: what an operand of a list is called in error texts.
    """

    def __init__(self, check: Checker, arguments: list[Any]):
        self.operands: list[Operand] = []
        self.targets: list[Target] = []
        self.labels: dict[str, str] = {}
        self._check = check
        self._places: list[list[int]] = []  # of each argument, the results it is
        self._lists: list[bool] = []
        self._items: list[str] = []
        self._names = {a.name for a in arguments}

    def add(self, argument: Any, value: Any, is_written: bool, is_output: bool) -> None:
        """Takes the next argument of the schema."""
        self._places.append([])
        self._lists.append("List[" in str(argument.type))
        kind = str(argument.real_type)
        kind = (
            kind.removeprefix("Optional[").removesuffix("]")
            if (kind.startswith("Optional["))
            else kind
        )
        name = argument.name
        if value is None:
            self._items.append("n")
        elif kind == "Tensor":
            self._tensor(name, name, None, value, is_written, is_output)
        elif kind in ("List[Tensor]", "List[Optional[Tensor]]"):
            self._items.append(f"{'T' if kind == 'List[Tensor]' else 'O'}{len(value)}")
            for i, t in enumerate(value):
                if t is None:
                    self._items.append("n")
                else:
                    unique = f"{name}_{i}"
                    while unique in self._names:
                        unique += "_"
                    label = f"{name}[{i}]"
                    self._tensor(unique, label, i, t, is_written, is_output)
        elif kind.startswith("List["):
            inner = kind.removeprefix("List[").removesuffix("]")
            if inner not in _LISTS:
                self._refuse(name, value, kind)
            self._items.append(f"{_LISTS[inner]}{len(value)}")
            self._items += [self._item(name, inner, v) for v in value]
        else:
            self._items.append(self._item(name, kind, value))

    def _tensor(
        self,
        name: str,
        label: str,
        element: int | None,
        t: Any,
        is_written: bool,
        is_output: bool,
    ) -> None:
        self._check.tensor(label, t)
        if t.dtype not in DTYPES.values():
            names = ", ".join(dtype_name(d) for d in DTYPES.values())
            self._check.require(False, label, f"be one of {names}", dtype_name(t.dtype))
        if label != name:
            self.labels[name] = label
        place = (len(self._places) - 1, element)
        result = len(self.targets)
        if is_written:
            self._places[-1].append(result)
        if is_output:
            self.targets.append(Target(label, place, None))
            self._items.append(f"r{result}")
            return
        operand = len(self.operands)
        self.operands.append(Operand(name, place))
        if is_written:
            self.targets.append(Target(label, place, operand))
            self._items.append(f"a{operand},{result}")
        else:
            self._items.append(f"t{operand}")

    def _item(self, name: str, kind: str, value: Any) -> str:
        if isinstance(value, torch.dtype):
            if value not in DTYPES.values():
                self._check.require(False, name, "be a dtype of XLA", dtype_name(value))
            return f"d{primitive_type(value)}"
        if isinstance(value, torch.device):
            return "D"
        if isinstance(value, torch.memory_format):
            return f"m{_MEMORY_FORMATS[value]}"
        if isinstance(value, torch.layout):
            is_dense = value is torch.strided
            self._check.require(is_dense, name, "be torch.strided", value)
            return "l0"
        if isinstance(value, str):
            return "s" + value.encode().hex()
        if isinstance(value, (bool, torch.SymBool)) and kind != "float":
            return f"b{int(bool(value))}"
        if isinstance(value, (int, torch.SymInt)) and kind != "float":
            return f"i{int(value)}"
        if isinstance(value, (bool, int, float, torch.SymInt, torch.SymFloat)):
            number = float(value)
            return "f" + (number.hex() if math.isfinite(number) else repr(number))
        return self._refuse(name, value, kind)

    def _refuse(self, name: str, value: Any, kind: str) -> str:
        rule = f"{self._check.op}: {name} must be None or of a type that XLA can carry"
        raise TypeError(f"{rule}, got {type(value).__name__} for {kind}")

    def require_operand(self) -> None:
        """Makes outputs operands where there is none: XLA needs a tensor to start."""
        if self.operands:
            return
        self._check.require(bool(self.targets), "arguments", "hold a tensor", "none")
        for number, target in enumerate(self.targets):
            name = target.label.replace("[", "_").replace("]", "")
            self.operands.append(Operand(name, target.place))
            self.targets[number] = target._replace(operand=number)
            self._items[self._items.index(f"r{number}")] = f"a{number},{number}"

    def results_of(self, place: int) -> list[int]:
        """The results that an argument is, which the operator writes."""
        return self._places[place]

    def is_list(self, place: int) -> bool:
        return self._lists[place]

    def text(self, name: str, returned: Iterable[int | list[int]]) -> str:
        """The call's text.

        Args:
            name: of the operator.
            returned: the result that each tensor it returns is.
        """
        operator, _, overload = name.partition(".")
        flat = []
        for entry in returned:
            flat += entry if isinstance(entry, list) else [entry]
        num_targets = len(self.targets)
        results = ["-" if n < num_targets else str(n) for n in flat]
        head = f"{operator} {overload or '-'}"
        items = (self._in_call(item) for item in self._items)
        return "|".join([head, " ".join(results), " ".join(items)])

    def _in_call(self, item: str) -> str:
        """An item with the operand's number in the call, which counts from the end.

        torch_xla numbers a program's parameters from a call's last operand on, and XLA
        pairs donated buffers with results by order: so each gets the buffer it updates.
        """
        if item[0] not in "ta":
            return item
        number, comma, result = item[1:].partition(",")
        return f"{item[0]}{len(self.operands) - 1 - int(number)}{comma}{result}"


def result_text(specs: Iterable[Spec]) -> str:
    """Shapes and dtypes as a text, "11:4,8 5:" for float32 [4, 8] and int64 []."""
    return " ".join(
        f"{primitive_type(spec.dtype)}:{','.join(map(str, spec.shape))}"
        for spec in specs
    )


def result_specs(text: str) -> tuple[Spec, ...]:
    """What `result_text` was made of."""
    specs = []
    for word in text.split():
        number, _, shape = word.partition(":")
        dims = tuple(int(size) for size in shape.split(",") if size)
        specs.append(Spec(dims, DTYPES[int(number)]))
    return tuple(specs)
