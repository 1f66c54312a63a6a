"""What torch_xla's entry point (the module xla_ops_pjrt) does when a client is made.

Tested by tests/gpu/test_plugin.py.
"""

from __future__ import annotations

from .. import _runtime
from ..core.paths import bridge_path
from . import check, discover


def open_bridge() -> str:
    """Checks this machine, has the bridge open the plugin, returns bridge_path().

    Called again, it opens nothing twice.

    Raises:
      RuntimeError: no plugin or several, a wrong PJRT version, no driver, or a GPU
        that the kernels were not built for; the text says what to do.
      ValueError: an environment variable has a wrong value.
    """
    bridge = bridge_path()
    plugin = discover.find_plugin()
    check.check_machine(plugin)
    _runtime.open_plugin(bridge, str(plugin))
    return bridge


def fail_bridge(reason: str) -> str:
    """Has the client fail with `reason` when torch_xla makes it; returns bridge_path()."""
    _runtime.fail_plugin(bridge_path(), reason)
    return bridge_path()
