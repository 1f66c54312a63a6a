"""What torch.autocast means for an op.

Every op and every front declares a rule: which of its arguments are cast to which
dtype, given the dtype of torch.autocast. Only float32, float16 and bfloat16 tensors are
cast, and only where autocast is on for their device; a float64 argument stays as it is
and is refused by the op's own checks. Arguments that an op writes to are never cast.

Tested by tests/core/test_autocast.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .dtypes import FLOAT_DTYPES
from .lazy import torch, tracing

# (arguments by name, the dtype of torch.autocast) -> new dtypes by argument.
Rule = Callable[[Mapping[str, Any], torch.dtype], Mapping[str, torch.dtype]]

_DEVICES = {"xla": "AutocastXLA", "cuda": "AutocastCUDA", "cpu": "AutocastCPU"}


def unchanged(args: Mapping[str, Any], dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The rule of an op that takes its arguments as they are."""
    return {}


def like(reference: str, *others: str, scales: Sequence[str] = ()) -> Rule:
    """Makes the rule of an op that computes in the dtype of one of its arguments.

    Args:
        reference: that argument, which stays as it is.
        others: arguments that are cast to its dtype.
        scales: arguments that are cast to float32.
    """

    def rule(args: Mapping[str, Any], dtype: torch.dtype) -> dict[str, torch.dtype]:
        given = args[reference]
        assert isinstance(given, torch.Tensor), reference
        return {**dict.fromkeys(others, given.dtype), **float32(*scales)(args, dtype)}

    return rule


def float32(*scales: str) -> Rule:
    """Makes the rule of an op whose scales are float32, and the rest as given."""
    return lambda args, dtype: dict.fromkeys(scales, torch.float32)


def register(
    library: torch.library.Library, overload: torch._ops.OpOverload, rule: Rule
) -> None:
    """Gives an op kernels for torch's autocast keys, which follow `rule`."""
    schema = overload._schema
    name = schema.name.partition("::")[2]
    if schema.overload_name:
        name += f".{schema.overload_name}"
    for device, key in _DEVICES.items():
        library.impl(name, tracing.untraced(_kernel(device, overload, rule)), key)


def _kernel(device: str, overload: torch._ops.OpOverload, rule: Rule) -> Callable:
    arguments = overload._schema.arguments
    defaults = {a.name: a.default_value for a in arguments if a.has_default_value()}
    names = [a.name for a in arguments]
    written = {a.name for a in arguments if a.alias_info and a.alias_info.is_write}

    def kernel(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        dtypes = rule({**defaults, **given}, torch.get_autocast_dtype(device))
        for name, dtype in dtypes.items():
            if name in given and name not in written:
                given[name] = _cast(given[name], dtype)
        with torch._C._DisableAutocast():
            return overload(**given)

    return kernel


def _cast(value: object, dtype: torch.dtype) -> object:
    if (
        not isinstance(value, torch.Tensor)
        or value.dtype not in FLOAT_DTYPES
        or dtype not in FLOAT_DTYPES
    ):
        return value
    return value.to(dtype)
