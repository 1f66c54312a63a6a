"""torch_xla's entry point to the GPU: GpuPlugin, under the names GPU and CUDA.

torch_xla loads this module at `import torch_xla` in every process, through the group
`torch_xla.plugins`. So it stands beside the package xla_ops, not in it, and imports
nothing of it before a GPU client is asked for (PJRT_DEVICE=GPU or CUDA): whatever is
wrong with xla_ops, `import torch_xla` works, and only a GPU client fails, with the cause.

Tested by tests/gpu/test_entry_point.py.
"""

from __future__ import annotations

import os


def __getattr__(name: str):
    """Makes GpuPlugin when it is first asked for.

    Its base class is torch_xla's, and torch_xla asks for it while it is imported itself:
    whichever of the two is imported first, each finds the other complete.
    """
    if name != "GpuPlugin":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from torch_xla.experimental import plugins  # may come back here by itself

    if "GpuPlugin" not in globals():
        globals()["GpuPlugin"] = _make_class(plugins.DevicePlugin)
    return globals()["GpuPlugin"]


def _make_class(base: type) -> type:
    class GpuPlugin(base):
        """The device plugin that torch_xla asks for a client; it calls the methods."""

        def library_path(self) -> str:
            """Path of the bridge, which wraps the plugin that was found.

            Called when the client is made. What would make that fail becomes the error
            of the client, a RuntimeError of torch_xla's with the same text at this and
            every later use of the device. An exception from here would do so once:
            torch_xla would try anew, and abort the process because it initialises
            logging twice.
            """
            try:
                from xla_ops.gpu import plugin
            except Exception as error:
                return _broken(error)
            try:
                return plugin.open_bridge()
            except (OSError, RuntimeError, ValueError) as error:
                return plugin.fail_bridge(str(error))

        def client_create_options(self) -> dict:
            """Options of PJRT_Client_Create, from the environment.

            library_path, which is called before, has checked them.
            """
            from xla_ops.gpu import options

            return options.client_options(os.environ)

        def physical_chip_count(self) -> int:
            """How many processes xmp.spawn starts: one a visible GPU."""
            from xla_ops.gpu import options

            return options.process_count(os.environ)

        def configure_single_process(self) -> None:
            """Nothing to do: a process without a rank uses all visible GPUs."""

        def configure_multiprocess(self, local_rank: int, local_world_size: int):
            """Nothing to do: torch_xla passes the rank on in the environment."""

        def requires_xla_coordinator(self) -> bool:
            """Whether processes have to find each other (NCCL needs it)."""
            try:
                from xla_ops.gpu import options

                return options.Ranks(os.environ).world_size > 1
            except (ImportError, ValueError):
                return False  # library_path, called next, reports it

    GpuPlugin.__module__ = __name__
    GpuPlugin.__qualname__ = "GpuPlugin"
    return GpuPlugin


def _broken(error: Exception) -> str:
    """Says why xla_ops cannot be imported; returns a path that torch_xla cannot open.

    Its error then names that path, and the text in it.
    """
    return (
        f"xla_ops cannot be imported ({type(error).__name__}: {error}):"
        " reinstall xla_ops, or run on the CPU with PJRT_DEVICE=CPU"
    )
