"""torch_xla's view of the GPU; plugin.py does the work.

Reached as xla_ops.plugin.GpuPlugin, which is what the entry points name.
Tested by tests/test_plugin.py.
"""

from __future__ import annotations

import os

from torch_xla.experimental import plugins

from . import plugin


class GpuPlugin(plugins.DevicePlugin):
    """The device plugin that torch_xla asks for a client; it calls the methods."""

    def library_path(self) -> str:
        """Path of the bridge, which wraps the plugin that was found.

        Called when the client is made. What would make that fail (open_bridge lists
        it) becomes the error of the client, a RuntimeError of torch_xla's with the
        same text at this and every later use of the device. An exception from here
        would do so once: torch_xla would try anew, and abort the process because
        it initialises logging twice.
        """
        try:
            return plugin.open_bridge()
        except (OSError, RuntimeError, ValueError) as error:
            return plugin.fail_bridge(str(error))

    def client_create_options(self) -> dict:
        """Options of PJRT_Client_Create, from the environment.

        library_path, which is called before, has checked them.
        """
        return plugin.client_options(os.environ)

    def physical_chip_count(self) -> int:
        """How many processes xmp.spawn starts: one a visible GPU."""
        return plugin.process_count(os.environ)

    def configure_single_process(self) -> None:
        """Nothing to do: a process without a rank uses all visible GPUs."""

    def configure_multiprocess(self, local_rank: int, local_world_size: int) -> None:
        """Nothing to do: torch_xla passes the rank on in the environment."""

    def requires_xla_coordinator(self) -> bool:
        """Whether processes have to find each other (NCCL needs it)."""
        try:
            return plugin.Ranks(os.environ).world_size > 1
        except ValueError:
            return False  # library_path, called next, reports it
