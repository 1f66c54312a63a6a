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


# By which torch_xla gives no buffer away that a program was told to overwrite.
_ALIASING = "XLA_ENABLE_PARAM_ALIASING"


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
    if not re.fullmatch(r"[0-9]{1,18}", text) or int(text) < minimum:
        raise wrong(name, f"be an integer of at least {minimum}", text)
    return int(text)


def clash(environ: Mapping[str, str]) -> Problem | None:
    """What of torch_xla's settings no op can go with; None where all is well.

    It changes dtypes behind the tensors, or copies each cache that is updated, and
    then does not find the programs that were to update one.
    """
    aliasing = environ.get(_ALIASING)
    if aliasing is not None and not _is_set(aliasing):
        return Problem(
            f"{_ALIASING} must be 1 where xla_ops is used, got {aliasing!r}",
            "unset it: without it no cache is updated in place",
        )
    for name, remedy in _OTHER_DTYPES.items():
        text = environ.get(name, "")
        if _is_set(text):
            return Problem(
                f"{name} must not be set where xla_ops is used, got {text!r}",
                f"unset it, and {remedy}",
            )
    return None


def _is_set(text: str) -> bool:
    """As torch_xla reads it: "true", or what atoi() makes a number but 0 of."""
    return text == "true" or re.match(r"\s*[+-]?0*[1-9]", text) is not None
