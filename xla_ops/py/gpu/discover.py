"""Finds JAX's CUDA plugin, which the bridge wraps.

Tested by tests/gpu/test_discover.py.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import pathlib
import re

PLUGIN_VARIABLE = "XLA_OPS_PJRT_PLUGIN"

_PLUGIN_FILE = "xla_cuda_plugin.so"
_INSTALL = (
    "pip install jax-cuda12-pjrt, or jax-cuda13-pjrt for drivers from 580"
    " (0.7.1 or newer)"
)


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
