"""The share of a GPU that a client takes, where others have taken theirs.

XLA's client takes its share when it starts. Where less is free it takes what it gets
and goes on; a program that needs more then ends the process, by a check of the
allocator's (https://github.com/openxla/xla, bfc_allocator.cc), and not with an error.
So a share is what is free at most.

Tested by tests/gpu/test_share.py.
"""

from __future__ import annotations

import contextlib
import warnings
from typing import NamedTuple

from . import driver, visible

# XLA's, of a client that is told none.
_DEFAULT = 0.75
# What a context takes, and what is loaded outside of the share.
_CONTEXT = 1 << 30


class Room(NamedTuple):
    """Of a GPU, in bytes: all there is, and what a client may take of it now."""

    total: int
    free: int


def room(ordinal: int) -> Room | None:
    """Of a visible GPU; None where the machine cannot tell."""
    try:
        total = driver.query().devices[ordinal].memory_bytes
        free = visible.free_bytes(driver.uuid_of(ordinal))
    except (AttributeError, IndexError, driver.DriverError):
        return None
    return None if free is None else Room(total, max(free - _CONTEXT, 0))


def fitted(options: dict) -> dict:
    """The options of a client, with a share that is free; warns where it is smaller.

    Args:
        options: of PJRT_Client_Create, of options.client_options.
    """
    share = options.get("memory_fraction", _DEFAULT)
    grows = not options.get("preallocate", True)
    if grows or options.get("allocator") not in ("default", "bfc") or share > 1:
        return options
    fits = share
    for ordinal in options.get("visible_devices", [0]):
        found = room(ordinal)
        if found is not None and 0 < found.free < share * found.total:
            fits = min(fits, found.free / found.total)
    if fits == share:
        return options
    with contextlib.suppress(Warning):  # of a process where warnings are errors
        warnings.warn(
            f"xla_ops: PJRT_ALLOCATOR_FRACTION must be at most {fits:.3f}, what is free"
            f" of the GPU, got {share:g}: it is {fits:.3f} now. Other processes have"
            " the rest (nvidia-smi).",
            stacklevel=2,
        )
    return {**options, "memory_fraction": fits}
