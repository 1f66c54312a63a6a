"""Reads the files of a checkpoint folder, and says what a broken one is.

SPDX-License-Identifier: Apache-2.0

What people really have in place of a weight file is a Git LFS pointer, half a
download, or the page on which a server said no. Errors therefore name the file,
what it holds by its first bytes, and what to do about it.
"""

import json
import os
import re
import stat
from pathlib import Path

AGAIN = "download it again"


class CheckpointError(ValueError):
    """A checkpoint cannot be used: it lacks something, or asks for too much."""


class CheckpointWarning(UserWarning):
    """A checkpoint says two things, of which one is followed."""


def short(value) -> str:
    """repr(), cut to what fits into a line of text."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def first_few(names) -> str:
    """The first names of many, and how many more there are."""
    names = list(names)
    rest = f" and {len(names) - 4} more" if len(names) > 5 else ""
    return ", ".join(names[:4] if rest else names) + rest


# --- Folders. -----------------------------------------------------------------
def check_folder(folder: Path) -> None:
    """Raises a CheckpointError unless `folder` is one and can be listed."""
    must = "model: must be the folder of a checkpoint, got"
    try:
        os.listdir(folder)
        os.stat(folder / ".")  # a folder may be listed and yet its files be closed
    except NotADirectoryError as error:
        raise CheckpointError(
            f"{must} {folder}, a file: give the folder that holds it"
        ) from error
    except FileNotFoundError as error:
        fix = "no such folder"
        if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(folder)):
            fix += (
                "; models are not downloaded here: `hf download "
                f"{folder} --local-dir DIR`, then give DIR"
            )
        raise CheckpointError(f"{must} {folder}: {fix}") from error
    except OSError as error:
        raise CheckpointError(f"{must} {folder}: {error.strerror}") from error


def missing(folder: Path, name: str, fixes: dict[str, str], fix: str):
    """The error for a file that is not there.

    Args:
      folder: where it should be.
      name: what the file is called.
      fixes: what to do, by the pattern of a file that is there instead.
      fix: what to do where none of them is.
    """
    for pattern, instead in fixes.items():
        if any(folder.glob(pattern)):
            fix = instead
            break
    found = first_few(sorted(os.listdir(folder))) or "nothing"
    return CheckpointError(
        f"model: folder must hold {name}, got {folder} with {found}: {fix}"
    )


def is_there(path: Path) -> bool:
    """Whether there is something of that name, if only a link that leads nowhere."""
    return os.path.lexists(path)


# --- Files. -------------------------------------------------------------------
def check_file(path: Path) -> None:
    """Raises a CheckpointError unless `path` is a file that can be opened."""
    must = f"model: {path} must be a file"
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise CheckpointError(f"{must}, got a folder: {AGAIN}")
        if not stat.S_ISREG(mode):  # opening a pipe would wait for its other end
            raise CheckpointError(f"{must}, got a device or a pipe")
        path.open("rb").close()
    except FileNotFoundError as error:
        what = "nothing there"
        if path.is_symlink():
            what = f"a link to {os.readlink(path)}, which is gone"
        raise CheckpointError(f"{must}, got {what}: {AGAIN}") from error
    except OSError as error:
        raise CheckpointError(
            f"{must} that can be read, got {error.strerror}"
        ) from error


def read_json(path: Path) -> dict:
    """The object in a JSON file.

    Raises:
      CheckpointError: there is no such file, or it holds something else.
    """
    check_file(path)
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise broken(path, "JSON", f"broken JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"model: {path} must be a JSON object, got {short(value)}: {AGAIN}"
        )
    return value


def broken(path: Path, must: str, otherwise: str) -> CheckpointError:
    """The error for a file that could not be read as what it should be.

    Args:
      path: the file.
      must: what it should be.
      otherwise: what it is where its first bytes do not tell.
    """
    what, fix = _what_is(path) or (" ".join(otherwise.split()), AGAIN)
    return CheckpointError(f"model: {path} must be {must}, got {what}: {fix}")


# First bytes, in lower case and without white space before them.
_KINDS = {
    b"<!doctype html": "an HTML page",
    b"<html": "an HTML page",
    b"<?xml": "an XML document",
    b"gguf": "a GGUF file",
    b"pk\x03\x04": "a zip or PyTorch file",
    b"\x80\x02": "a PyTorch file",
    b"\x1f\x8b": "a gzip file",
}


def _what_is(path: Path) -> tuple[str, str] | None:
    """What a file is by its first bytes, and what to do about it."""
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        return "an empty file", AGAIN
    if re.match(rb"version https?://(git-lfs|hawser)\.", head):
        size = re.search(rb"^size (\d+)", head, re.MULTILINE)
        of = f" to {int(size[1])} bytes" if size else ""
        return f"a Git LFS pointer{of}", f"run `git lfs pull` in {path.parent}"
    if not head.strip(b"\0"):
        return "zeros, a download that broke off", AGAIN
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for magic, what in _KINDS.items():
        if start.startswith(magic):
            signed_in = ", signed in where its owner asks for it"
            return what, AGAIN + (signed_in if start[:1] == b"<" else "")
    if not start.startswith((b"{", b"[")) and head[:60].isascii():
        text = head[:60].decode("ascii").strip()
        if text.replace("\n", " ").isprintable():
            return f"text, {short(text)}", AGAIN
    return None
