"""Errors of an installation or a machine: what is wrong, and what to do about it."""

from __future__ import annotations


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
