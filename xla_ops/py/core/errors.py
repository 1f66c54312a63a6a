"""Errors of an installation or a machine: what is wrong, and what to do about it."""

from __future__ import annotations

import os
import sys
import warnings


class Problem(RuntimeError):
    """Something that a user can mend. Its text is "what: fix".

    Attributes:
        what: what is wrong.
        fix: what to do, as an order ("install ..."); "" where nothing is known to help.
    """

    def __init__(self, what: str, fix: str = ""):
        super().__init__(what, fix)
        self.what = what
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.what}: {self.fix}" if self.fix else self.what


class BadValue(Problem, ValueError):
    """An environment variable has a wrong value; the text has the rule, so no fix."""


def warn_user(text: str) -> None:
    """Warns at the line of the user's code that led here."""
    modules = (sys.modules.get(name) for name in ("xla_ops", "torch", "torch_xla"))
    folders = (os.path.dirname(m.__file__) for m in modules if m and m.__file__)
    inner = ("<", *(folder + os.sep for folder in folders))
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inner):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, stacklevel=level)
