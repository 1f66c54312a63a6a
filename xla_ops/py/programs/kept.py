"""Programs kept in a folder, so that another process need not compile them.

torch_xla keeps executables by the hash of their graph alone, which two graphs may share
(pytorch/xla#8353). So each file of its has one beside it that says what HLO the program
was compiled from, and a program without that, or of another HLO, is not taken.

Tested by tests/programs/test_kept.py.
"""

from __future__ import annotations

import os
import pathlib

import torch_xla.runtime as xr

from ..core import files
from ..core.errors import warn_user

_SUFFIX = ".hlo-sha256"
_folders: list[pathlib.Path] = []  # at most one


def keep_programs(folder: str | os.PathLike) -> None:
    """Has programs kept in `folder`, and taken from it.

    Must be called before the process computes anything on an XLA device. A folder must
    be used by one installation on one kind of device only: give it a name that has the
    versions and the device in it.

    Raises:
        RuntimeError: something has been computed already.
        OSError: the folder cannot be made.
    """
    path = pathlib.Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    try:
        xr.initialize_cache(str(path), readonly=False)
    except AssertionError:
        raise RuntimeError(
            "keep_programs: must be called before anything is computed on a device,"
            " got a process that has computed"
        ) from None
    _folders.append(path)


def recall(program: bytes) -> str | None:
    """The HLO, as a digest, that a kept program was compiled from."""
    if not _folders:
        return None
    try:
        return (_folders[0] / (program.hex() + _SUFFIX)).read_text().strip()
    except OSError:
        return None


def remember(program: bytes, digest: str) -> None:
    """Notes what a program that has just been compiled computes.

    Where that cannot be written, as on a full disk, it says so and keeps no more.
    """
    if not _folders:
        return
    path = _folders[0] / (program.hex() + _SUFFIX)
    try:
        files.write_at_once(path, digest.encode())
    except OSError as error:
        folder = _folders.pop()
        warn_user(
            f"keep_programs: programs are not kept any more, because {folder} cannot be"
            f" written ({error})"
        )
