"""Command lines: options that are checked where they are read, and errors in a line.

SPDX-License-Identifier: Apache-2.0
"""

import argparse
import contextlib
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from files import CheckpointWarning, short

USAGE_STATUS = 2  # exit status for what the user can mend, as argparse has it


class Parser(argparse.ArgumentParser):
    """Answers a wrong option in one line, and knows options by their whole names:
    tools/demo reads --device too, and would not know an abbreviation."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_STATUS, f"error: {message} (--help lists the options)\n")


def integer(least: int, most: int | None = None) -> Callable[[str], int]:
    """The type of an option that takes integers from `least` on, up to `most`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or value < least:
            raise argparse.ArgumentTypeError(
                f"must be an integer of at least {least}, got {text[:40]!r}"
            )
        if most is not None and value > most:
            raise argparse.ArgumentTypeError(
                f"must be an integer of at most {most}, got {text[:40]!r}"
            )
        return value

    return parse


def positive(text: str) -> float:
    """The type of an option that takes numbers above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text[:40]!r}")
    return value


def from_environment(name: str, default: int, least: int) -> int:
    """An integer of at least `least` that a launcher such as torchrun sets.

    Raises:
      ValueError: it is set to something else.
    """
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    try:
        return integer(least)(text)
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"{name} {error}") from error


def check_out(out: Path, *inputs: Path) -> None:
    """Looks whether a folder can be written, before there is something to write.

    Raises:
      ValueError: it cannot, or is one of `inputs`.
    """
    for path in inputs:
        if out.exists() and path.exists() and out.samefile(path):
            raise ValueError(f"--out must be another folder than the input, got {out}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"--out must be a folder that can be made, got {out}: {error.strerror}"
        ) from error
    if not os.access(out, os.W_OK | os.X_OK):
        raise ValueError(f"--out must be a folder that can be written, got {out}")


def read_text(path: Path) -> str:
    """The text of a file in UTF-8.

    Raises:
      ValueError: it cannot be read, or is of another encoding.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(
            f"--text must be a file that can be read, got {path}: {error.strerror}"
        ) from error
    except UnicodeDecodeError as error:
        found = short(error.object[error.start :])
        raise ValueError(
            f"--text must be in UTF-8, got {path} with {found} at byte {error.start}"
        ) from error


@contextlib.contextmanager
def errors_as_lines(room: str) -> Iterator[None]:
    """Answers what the user can mend in a line, and warns of a checkpoint in one.

    Args:
      room: what to do where the device has no memory left.
    """
    try:
        with plain_warnings():
            yield
    except (ValueError, MemoryError) as error:
        fail(error)
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        fail(
            "the device must have room for weights and work, got "
            f"{str(error).splitlines()[0]}: {room}"
        )


@contextlib.contextmanager
def plain_warnings() -> Iterator[None]:
    """Shows what is said about a checkpoint as a line of its own."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def show_plainly(message, category, *place):
            if issubclass(category, CheckpointWarning):
                warn(message)
            else:
                show(message, category, *place)

        warnings.showwarning = show_plainly
        warnings.simplefilter("always", CheckpointWarning)
        yield


def warn(text) -> None:
    print(f"warning: {text}", file=sys.stderr)


def fail(error) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(USAGE_STATUS) from None
