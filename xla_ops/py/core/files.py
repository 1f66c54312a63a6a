"""Files that several processes share.

Tested by tests/extend/test_kernel_cache.py and tests/programs/test_kept.py.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import threading


def write_at_once(path: pathlib.Path, data: bytes) -> None:
    """Writes a file at once or not at all: another process may read it.

    Raises OSError where it cannot be written, as on a full disk; no draft stays.
    """
    draft = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        draft.write_bytes(data)
        draft.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            draft.unlink()  # what there was room for
        raise
