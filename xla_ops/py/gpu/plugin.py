"""What torch_xla's entry point (the module xla_ops_pjrt) does when a client is made.

Tested by tests/gpu/test_entry_point.py.
"""

from __future__ import annotations

import os
import pathlib
from typing import TYPE_CHECKING

from .. import _runtime
from ..core.errors import Problem
from ..core.paths import bridge_path
from . import check, discover, flags

if TYPE_CHECKING:
    from .._runtime import PluginInfo


def open_bridge() -> str:
    """Checks this machine, has the bridge open the plugin, returns bridge_path().

    Called again, it opens nothing twice. A process of several gets XLA's flags for that
    (flags.py).

    Raises:
        Problem: no plugin or several, a wrong PJRT version, no driver, a GPU that the
            kernels were not built for, a broken file of CUDA, or an environment
            variable with a wrong value.
    """
    bridge = bridge_path()
    plugin = discover.find_plugin()
    check.check_machine(plugin)
    broken = check.broken_cuda_files(plugin)
    if broken is not None:
        raise broken
    plugin_info(plugin)
    flags.set_defaults(os.environ)
    _runtime.open_plugin(bridge, str(plugin))
    return bridge


def plugin_info(path: pathlib.Path) -> PluginInfo:
    """What the plugin at `path` offers: see _runtime.find_plugin_info.

    Raises Problem if the bridge cannot use it.
    """
    what = check.fault_of(str(path))
    if what:
        raise Problem(what, discover.reinstall(path))
    info = _runtime.find_plugin_info(str(path))
    if info["error"]:
        raise Problem(info["error"], info["fix"])
    return info
