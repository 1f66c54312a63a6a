"""Debug mode: handlers report what they skip or mask.

Slots and block ids are device data that the host never sees, so an id out of range is
defined as skipped (written) or masked (read) and costs nothing to ignore. In debug mode
handlers print each such id, on stderr on the CPU and on stdout on a GPU.
"""

from __future__ import annotations

import os

_enabled = os.environ.get("XLA_OPS_DEBUG", "0") not in ("", "0")


def set_debug(enabled: bool) -> None:
    """Turns debug mode on or off for calls traced from now on.

    XLA_OPS_DEBUG=1 turns it on for a whole process. Compiled functions keep the mode
    that they were traced in.
    """
    global _enabled  # noqa: PLW0603 - one mode a process
    _enabled = bool(enabled)


def enabled() -> bool:
    """Returns whether debug mode is on."""
    return _enabled
