"""Command lines: options that are checked where they are read.

SPDX-License-Identifier: Apache-2.0
"""

import argparse
from collections.abc import Callable
from typing import NoReturn

USAGE_STATUS = 2  # exit status for what the user can mend, as argparse has it


class Parser(argparse.ArgumentParser):
    """Answers a wrong option in one line, and knows options by their whole names:
    tools/demo reads --device too, and would not know an abbreviation."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_STATUS, f"error: {message} (--help lists the options)\n")


def integer(least: int) -> Callable[[str], int]:
    """The type of an option that takes integers from `least` on."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or value < least:
            raise argparse.ArgumentTypeError(
                f"must be an integer of at least {least}, got {text[:40]!r}"
            )
        return value

    return parse
