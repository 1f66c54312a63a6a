"""Debug mode: handlers report what they skip or mask.

Slots and block ids are device data that the host never sees, so an id out of range is
defined as skipped (written) or masked (read) and costs nothing to ignore. In debug mode
handlers print each such id, on stderr on the CPU and on stdout on a GPU.
"""

from __future__ import annotations

import functools
import os

from . import environment

_enabled: bool | None = None  # as the environment says


def set_debug(enabled: bool) -> None:
    """Turns debug mode on or off for calls traced from now on.

    XLA_OPS_DEBUG=1 turns it on for a whole process. Compiled functions keep the mode
    that they were traced in.
    """
    global _enabled  # noqa: PLW0603 - one mode a process
    _enabled = bool(enabled)


def enabled() -> bool:
    """Returns whether debug mode is on.

    Raises BadValue if XLA_OPS_DEBUG is set to anything but a truth value.
    """
    return _of_environment() if _enabled is None else _enabled


@functools.cache
def _of_environment() -> bool:
    return environment.boolean(os.environ, "XLA_OPS_DEBUG") or False
