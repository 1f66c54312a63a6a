"""torch_xla's entry point to the GPU: GpuPlugin, under the names GPU and CUDA.

torch_xla loads this module at `import torch_xla` in every process, through the group
`torch_xla.plugins`. So it stands beside the package xla_ops, not in it, and imports
nothing of it before a GPU client is asked for (PJRT_DEVICE=GPU or CUDA): whatever is
wrong with xla_ops, `import torch_xla` works, and a GPU client alone fails, with the
cause.

Tested by tests/gpu/test_entry_point.py.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any


def __getattr__(name: str) -> Any:
    """Makes GpuPlugin when it is first asked for.

    Its base class is torch_xla's, and torch_xla asks for it while it is imported
    itself: whichever of the two is imported first, each finds the other complete.
    """
    if name != "GpuPlugin":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from torch_xla.experimental import plugins  # may come back here by itself

    if "GpuPlugin" not in globals():
        globals()["GpuPlugin"] = _make_class(plugins.DevicePlugin)
    return globals()["GpuPlugin"]


def _make_class(base: type) -> type:
    class GpuPlugin(base):
        """The device plugin that torch_xla asks for a client; it calls the methods.

        It calls requires_xla_coordinator, library_path and client_create_options, in
        this order, whenever the device is used and there is no client yet. An exception
        from any of them would reach the user once: at the next use torch_xla tries
        anew, and aborts the process because it initialises logging twice. So they
        raise nothing, and what is wrong becomes the error of the client: a
        RuntimeError of torch_xla's, the same at every use of the device.
        """

        def __init__(self) -> None:
            super().__init__()
            # torch_xla compares names as they are written, and of one that it does not
            # know it says to write a plugin. Under these names this one says more.
            from torch_xla import _XLAC

            for name in ("gpu", "cuda", "Gpu", "Cuda"):
                _XLAC._register_pjrt_plugin(name, self)

        def library_path(self) -> str:
            """Path of the bridge, which wraps the plugin that was found."""
            device = os.environ.get("PJRT_DEVICE", "")
            if device != device.upper():
                return _fail(
                    f"PJRT_DEVICE must be in capitals, got {device!r}:"
                    f" set PJRT_DEVICE={device.upper()}"
                )
            try:
                from xla_ops.gpu import job, plugin

                job.joined()  # the others of the job, if it has any, have come
            except Exception as error:  # noqa: BLE001 - of any kind, by a broken file
                return _fail(
                    f"xla_ops cannot be imported ({type(error).__name__}: {error}):"
                    " reinstall xla_ops, or run on the CPU with PJRT_DEVICE=CPU"
                )
            try:
                return plugin.open_bridge()
            except Exception as error:  # noqa: BLE001 - none may pass, see the class
                known = isinstance(error, (OSError, RuntimeError, ValueError))
                return _fail(str(error) if known else repr(error))

        def client_create_options(self) -> dict:
            """Options of PJRT_Client_Create, from the environment."""
            try:
                from xla_ops.gpu import options, share

                return share.fitted(options.client_options(os.environ))
            except Exception:  # noqa: BLE001 - library_path has reported it
                return {}

        def physical_chip_count(self) -> int:
            """How many processes xmp.spawn starts: one a visible GPU."""
            from xla_ops.gpu import options

            return options.process_count(os.environ)

        def configure_single_process(self) -> None:
            """A process without a rank uses all visible GPUs; one with, its own."""
            try:
                from xla_ops.gpu import job, options

                if options.Ranks(os.environ).world_size > 1:
                    job.replicate_only_process()
            except Exception:  # noqa: BLE001 - library_path, called next, reports it
                return

        def configure_multiprocess(
            self, local_rank: int, local_world_size: int
        ) -> None:
            """Nothing to do: torch_xla passes the rank on in the environment."""

        def requires_xla_coordinator(self) -> bool:
            """Whether processes have to find each other (NCCL needs it)."""
            try:
                from torch_xla import runtime

                from xla_ops.gpu import job, options

                is_needed = options.Ranks(os.environ).world_size > 1
                options.set_coordinator_port(os.environ)
                job.stay_for_others(os.environ)
                job.wait_for_others(os.environ)
            except Exception:  # noqa: BLE001 - library_path, called next, reports it
                return False
            # Where warnings are errors, the others would wait for a coordinator.
            with contextlib.suppress(Warning):
                job.check_launcher(os.environ, runtime.is_spmd())
            return is_needed

    GpuPlugin.__module__ = __name__
    GpuPlugin.__qualname__ = "GpuPlugin"
    return GpuPlugin


def _fail(reason: str) -> str:
    """Has the client fail with `reason`; returns the path that library_path has to.

    Looks for the bridge itself: the reason may be that xla_ops cannot be imported.
    """
    import ctypes
    import importlib.util
    import runpy

    package = importlib.util.find_spec("xla_ops")
    for folder in (package and package.submodule_search_locations) or ():
        bridge = os.path.join(folder, "lib", "libxla_ops_pjrt.so")
        try:
            # Loading a file that was cut short would end the process.
            elf = runpy.run_path(os.path.join(folder, "core", "elf.py"))
            if not elf["unusable"](bridge):
                ctypes.CDLL(bridge).xla_ops_pjrt_fail(reason.encode())
                return bridge
        except Exception:  # noqa: BLE001 - of any kind, by a broken file
            continue
    # Without the bridge the path itself has to tell: torch_xla's error names the path
    # that it cannot open, whatever its length.
    return " ".join(reason.split())
