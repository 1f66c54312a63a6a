"""Finds, checks and configures the CUDA plugin that gives torch_xla 2.9.0 a GPU.

torch_xla loads this module at `import torch_xla` in every process, through the
entry points GPU and CUDA of the group `torch_xla.plugins` (xla_ops.plugin:GpuPlugin).
So it looks at nothing on the machine until a client is made, which happens only where
PJRT_DEVICE is GPU or CUDA. Then it finds JAX's CUDA plugin, checks what could make
it fail, and has the bridge (`libxla_ops_pjrt.so`) wrap it.

Environment:
  PJRT_DEVICE: GPU or CUDA, the same.
  XLA_OPS_PJRT_PLUGIN: path of the xla_cuda_plugin.so to use. Default: the installed
    one (jax-cuda12-pjrt or jax-cuda13-pjrt).
  PJRT_ALLOCATOR_FRACTION, or XLA_PYTHON_CLIENT_MEM_FRACTION: share of the GPU's
    memory for XLA. Default: XLA's, 0.75.
  PJRT_ALLOCATOR_PREALLOCATE, or XLA_PYTHON_CLIENT_PREALLOCATE: take that share at
    the start. Default: XLA's, true.
  PJRT_ALLOCATOR_CUDA_ASYNC: true for the allocator of the CUDA driver. Or
    XLA_PYTHON_CLIENT_ALLOCATOR: default, bfc, cuda_async or platform.
  CUDA_VISIBLE_DEVICES: as for every CUDA program.
  GPU_NUM_DEVICES: processes that xmp.spawn starts. Default: one a visible GPU.
  LOCAL_RANK, RANK, LOCAL_WORLD_SIZE, WORLD_SIZE, MASTER_ADDR (torchrun) and
    PJRT_LOCAL_PROCESS_RANK, PJRT_LOCAL_PROCESS_COUNT (xmp.spawn): one GPU a process.
The names that begin with PJRT_ go before those that begin with XLA_PYTHON_.

Tested by tests/test_plugin.py.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import TypeVar

PLUGIN_VARIABLE = "XLA_OPS_PJRT_PLUGIN"

_LIB = pathlib.Path(__file__).parent / "lib"
T = TypeVar("T")
_PLUGIN_FILE = "xla_cuda_plugin.so"
_INSTALL = (
    "pip install jax-cuda12-pjrt, or jax-cuda13-pjrt for drivers from 580"
    " (0.7.1 or newer)"
)
_ALLOCATORS = ("default", "bfc", "cuda_async", "platform")
_TRUE = ("1", "true", "yes", "on")
_FALSE = ("0", "false", "no", "off")


def __getattr__(name: str):
    """Makes `GpuPlugin` (device_plugin.py) an attribute of this module.

    Its base class is torch_xla's, which loads the entry point while it is imported
    itself: whichever is imported first, each finds the other complete.
    """
    if name != "GpuPlugin":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import torch_xla  # noqa: F401

    from .device_plugin import GpuPlugin

    return GpuPlugin


def bridge_path() -> str:
    """Path of the bridge. Raises RuntimeError if the installation lacks it."""
    path = _LIB / "libxla_ops_pjrt.so"
    if not path.exists():
        raise RuntimeError(f"xla_ops is installed without {path}: reinstall xla_ops")
    return str(path)


def open_bridge() -> str:
    """Checks this machine, has the bridge open the plugin, returns bridge_path().

    Called again, it opens nothing twice.

    Raises:
      RuntimeError: no plugin or several, a wrong PJRT version, no driver, or a GPU
        that the kernels were not built for; the text says what to do.
      ValueError: an environment variable has a wrong value.
    """
    bridge = bridge_path()
    plugin = find_plugin()
    check_machine(plugin)
    from . import _runtime

    _runtime.open_plugin(bridge, str(plugin))
    return bridge


def fail_bridge(reason: str) -> str:
    """Has the client fail with `reason` when torch_xla makes it; returns bridge_path()."""
    from . import _runtime

    _runtime.fail_plugin(bridge_path(), reason)
    return bridge_path()


def installed_plugins() -> list[pathlib.Path]:
    """JAX's CUDA plugins in this Python environment, by name."""
    # A namespace package: finding it runs no code of JAX.
    spec = importlib.util.find_spec("jax_plugins")
    folders = spec.submodule_search_locations if spec is not None else None
    return sorted(
        {
            path.resolve()
            for folder in folders or ()
            for path in pathlib.Path(folder).glob(f"xla_cuda*/{_PLUGIN_FILE}")
        }
    )


def describe_plugin(path: pathlib.Path) -> str:
    """`path` with the distribution that it came from, where that is known."""
    match = re.fullmatch(r"xla_(cuda\d+)", path.parent.name)
    if match is None:
        return str(path)
    name = f"jax-{match[1]}-pjrt"
    try:
        return f"{path} ({name} {importlib.metadata.version(name)})"
    except importlib.metadata.PackageNotFoundError:
        return str(path)


def find_plugin() -> pathlib.Path:
    """The plugin to wrap. Raises RuntimeError if there is none, or no one choice."""
    chosen = os.environ.get(PLUGIN_VARIABLE)
    if chosen:
        path = pathlib.Path(chosen)
        if not path.is_file():
            raise RuntimeError(
                f"{PLUGIN_VARIABLE} must be the path of a PJRT plugin, got {chosen!r}:"
                " no such file"
            )
        return path.resolve()
    found = installed_plugins()
    if not found:
        raise RuntimeError(
            f"PJRT_DEVICE={os.environ.get('PJRT_DEVICE')} needs JAX's CUDA plugin, and"
            f" none is installed: {_INSTALL}; or set {PLUGIN_VARIABLE} to the path of"
            f" {_PLUGIN_FILE}; or run on the CPU with PJRT_DEVICE=CPU"
        )
    if len(found) > 1:
        names = " and ".join(describe_plugin(path) for path in found)
        raise RuntimeError(
            f"{len(found)} CUDA plugins are installed, {names}: set {PLUGIN_VARIABLE}"
            " to the path of one of them, or pip uninstall the others"
        )
    return found[0]


def check_machine(plugin: pathlib.Path) -> None:
    """Checks the driver and the GPUs that this process is going to use.

    Raises:
      RuntimeError: no driver (cuda_driver.DriverError), a driver too old for
        `plugin` or for the kernels, or a GPU that the kernels were not built for.
    """
    from . import cuda_driver

    driver = cuda_driver.query()
    match = re.fullmatch(r"xla_cuda(\d+)", plugin.parent.name)
    if match is not None and driver.cuda_version[0] < int(match[1]):
        have = ".".join(map(str, driver.cuda_version))
        raise RuntimeError(
            f"the NVIDIA driver runs CUDA up to {have}, and"
            f" {describe_plugin(plugin)} needs CUDA {match[1]}: update the driver, or"
            f" install jax-cuda{driver.cuda_version[0]}-pjrt instead"
        )
    for library, version in kernel_cuda_versions().items():
        if driver.cuda_version[0] < version[0]:
            have, needed = (
                ".".join(map(str, v)) for v in (driver.cuda_version, version)
            )
            raise RuntimeError(
                f"the NVIDIA driver runs CUDA up to {have}, and the kernels of"
                f" {library} were built with CUDA {needed}: update the driver, or run"
                " on the CPU with PJRT_DEVICE=CPU"
            )
    used = client_options(os.environ).get("visible_devices")
    for ordinal in used or ():
        if ordinal >= len(driver.devices):
            raise RuntimeError(
                f"this process is to use GPU {ordinal}, and {len(driver.devices)} are"
                " visible: start as many processes on a host as it has GPUs"
            )
    for device in driver.devices:
        if used is None or device.ordinal in used:
            _check_kernels(device)


def _of_kernels(describe: Callable[[str], T]) -> dict[str, T]:
    """File name of each installed CUDA op library to what `describe` says of it."""
    libraries = sorted(_LIB.glob("libxla_ops_*_cuda.so"))
    return {path.name: describe(str(path)) for path in libraries}


def kernel_archs() -> dict[str, str]:
    """File name of each installed CUDA op library to its architectures."""
    from . import _runtime

    return _of_kernels(_runtime.cuda_archs)


def kernel_cuda_versions() -> dict[str, tuple[int, int]]:
    """File name of each installed CUDA op library to its CUDA, as (13, 0)."""
    from . import _runtime

    versions = _of_kernels(_runtime.cuda_version)
    return {k: (v // 1000, v % 1000 // 10) for k, v in versions.items()}


def runs_on(archs: str, capability: tuple[int, int]) -> bool:
    """Whether device code for `archs`, as "8.0 9.0a 12.0+PTX", runs on a GPU.

    Code for 8.0 runs on 8.0 to 8.9; for 9.0a on 9.0 alone; for 10.0f on the family
    10.x from 10.0 on; with +PTX on every later GPU too.
    """
    for arch in archs.replace(",", " ").split():
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch)
        if match is None:
            raise ValueError(f"malformed architecture {arch!r} in {archs!r}")
        built = (int(match[1]), int(match[2]))
        if match[3] == "a":
            if capability == built:
                return True
        elif capability[0] == built[0] and capability >= built:
            return True
        if match[4] and not match[3] and capability >= built:
            return True
    return False


def _check_kernels(device) -> None:
    for library, archs in kernel_archs().items():
        if runs_on(archs, device.capability):
            continue
        have = ".".join(map(str, device.capability))
        raise RuntimeError(
            f"GPU {device.ordinal} ({device.name}) has compute capability {have}, and"
            f" the kernels of {library} were built for {archs}: build xla_ops with"
            f" {have} among the architectures, or hide this GPU by"
            " CUDA_VISIBLE_DEVICES, or run on the CPU with PJRT_DEVICE=CPU"
        )


def process_count(environ: Mapping[str, str]) -> int:
    """How many processes xmp.spawn starts: one a visible GPU.

    Raises ValueError if GPU_NUM_DEVICES is set to anything but a positive integer.
    """
    number = _integer(environ, "GPU_NUM_DEVICES", None, minimum=1)
    if number is not None:
        return number
    from . import cuda_driver

    # Where there is no driver, the one process's client says so.
    return max(cuda_driver.count() or 1, 1)


class Ranks:
    """This process's place, from torchrun's or torch_xla's variables."""

    def __init__(self, environ: Mapping[str, str]):
        def read(names: tuple[str, ...], default: int, minimum: int) -> int:
            for name in names:
                if name in environ:
                    return _integer(environ, name, default, minimum)
            return default

        self.local_rank = read(("PJRT_LOCAL_PROCESS_RANK", "LOCAL_RANK"), 0, 0)
        self.rank = read(("RANK",), self.local_rank, 0)
        self.local_world_size = read(
            ("PJRT_LOCAL_PROCESS_COUNT", "LOCAL_WORLD_SIZE"), 1, 1
        )
        self.world_size = read(("WORLD_SIZE",), self.local_world_size, 1)


def client_options(environ: Mapping[str, str]) -> dict:
    """The options of PJRT_Client_Create that `environ` asks for.

    Options that it does not mention are left out, so XLA's defaults hold. Raises
    ValueError naming the variable with a wrong value.
    """
    options: dict = {"platform_name": "gpu", "allocator": _allocator(environ)}
    fraction = _fraction(
        environ, ("PJRT_ALLOCATOR_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    )
    if fraction is not None:
        options["memory_fraction"] = fraction
    preallocate = _boolean(
        environ, ("PJRT_ALLOCATOR_PREALLOCATE", "XLA_PYTHON_CLIENT_PREALLOCATE")
    )
    if preallocate is not None:
        options["preallocate"] = preallocate
    ranks = Ranks(environ)
    if ranks.world_size > 1:
        options["node_id"] = ranks.rank
        options["num_nodes"] = ranks.world_size
    if ranks.local_world_size > 1:
        device = _device_of_process(environ, ranks)
        options["visible_devices"] = [device]
    return options


def _device_of_process(environ: Mapping[str, str], ranks: Ranks) -> int:
    """Which of the visible GPUs is this process's, where each has its own."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return ranks.local_rank
    count = len(visible.split(","))
    # Launchers such as Slurm show each process its own GPU only.
    if count == 1:
        return 0
    if ranks.local_rank < count:
        return ranks.local_rank
    raise ValueError(
        f"CUDA_VISIBLE_DEVICES must name a GPU for each of the"
        f" {ranks.local_world_size} processes of this host, got {visible!r}"
    )


def _first(
    environ: Mapping[str, str], names: tuple[str, ...]
) -> tuple[str, str | None]:
    """The first of `names` that is set and not empty, and its value."""
    for name in names:
        if environ.get(name, "").strip():
            return name, environ[name].strip()
    return names[0], None


def _boolean(environ: Mapping[str, str], names: tuple[str, ...]) -> bool | None:
    name, text = _first(environ, names)
    if text is None:
        return None
    if text.lower() in _TRUE:
        return True
    if text.lower() in _FALSE:
        return False
    raise ValueError(f"{name} must be 1, 0, true or false, got {text!r}")


def _fraction(environ: Mapping[str, str], names: tuple[str, ...]) -> float | None:
    name, text = _first(environ, names)
    if text is None:
        return None
    # With unified memory XLA may take more than the GPU has.
    unified = environ.get("TF_FORCE_UNIFIED_MEMORY", "").lower() in _TRUE
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if 0 < value <= 1 or (unified and 1 < value < float("inf")):
        return value
    raise ValueError(f"{name} must be a number above 0 and at most 1, got {text!r}")


def _integer(
    environ: Mapping[str, str], name: str, default: int | None, minimum: int
) -> int | None:
    text = environ.get(name, "").strip()
    if not text:
        return default
    if not re.fullmatch(r"\d+", text) or int(text) < minimum:
        raise ValueError(
            f"{name} must be an integer of at least {minimum}, got {text!r}"
        )
    return int(text)


def _allocator(environ: Mapping[str, str]) -> str:
    use_async = _boolean(environ, ("PJRT_ALLOCATOR_CUDA_ASYNC",))
    if use_async is not None:
        return "cuda_async" if use_async else "default"
    name, text = _first(environ, ("XLA_PYTHON_CLIENT_ALLOCATOR",))
    if text is None:
        return "default"
    if text.lower() not in _ALLOCATORS:
        raise ValueError(
            f"{name} must be one of {', '.join(_ALLOCATORS)}, got {text!r}"
        )
    return text.lower()
