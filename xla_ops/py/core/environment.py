"""Reads environment variables; a wrong value is an error that names its variable."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from .errors import BadValue, Problem

TRUE = ("1", "true", "yes", "on")
FALSE = ("0", "false", "no", "off")

# What torch_xla 2.9.0 still reads of its variables that make XLA arrays of another type
# than the tensors say; a handler would get those. (Of XLA_USE_FP16 and
# XLA_DOWNCAST_FP16 it only says that they do nothing.)
_OTHER_DTYPES = {
    "XLA_USE_BF16": "convert the model itself, as by model.to(torch.bfloat16)",
    "XLA_DOWNCAST_BF16": "convert the model itself, as by model.to(torch.bfloat16)",
    "XLA_USE_32BIT_LONG": "give int32 tensors where they are to be int32",
}


def wrong(name: str, rule: str, value: str) -> BadValue:
    """The error of a variable that must <rule>."""
    return BadValue(f"{name} must {rule}, got {value!r}")


def first(environ: Mapping[str, str], names: Iterable[str]) -> tuple[str, str | None]:
    """The first of `names` that is set and not empty, and its value."""
    names = tuple(names)
    for name in names:
        if environ.get(name, "").strip():
            return name, environ[name].strip()
    return names[0], None


def boolean(environ: Mapping[str, str], *names: str) -> bool | None:
    """The first of `names` that is set as a truth value; None where none is."""
    name, text = first(environ, names)
    if text is None:
        return None
    if text.lower() in TRUE:
        return True
    if text.lower() in FALSE:
        return False
    raise wrong(name, "be 1, 0, true or false", text)


def integer(environ: Mapping[str, str], name: str, minimum: int) -> int | None:
    """`name` as an integer of at least `minimum`; None where it is not set."""
    text = environ.get(name, "").strip()
    if not text:
        return None
    if not re.fullmatch(r"[0-9]+", text) or int(text) < minimum:
        raise wrong(name, f"be an integer of at least {minimum}", text)
    return int(text)


def other_dtypes(environ: Mapping[str, str]) -> Problem | None:
    """What is wrong where torch_xla changes dtypes behind the tensors; else None."""
    for name, remedy in _OTHER_DTYPES.items():
        text = environ.get(name, "")
        # As torch_xla reads it: "true", or what atoi() makes a number but 0 of.
        if text == "true" or re.match(r"\s*[+-]?0*[1-9]", text):
            return Problem(
                f"{name} must not be set where xla_ops is used, got {text!r}",
                f"unset it, and {remedy}",
            )
    return None
