"""Finds JAX's CUDA plugin, which the bridge wraps.

Tested by tests/gpu/test_discover.py.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import pathlib
import re

from ..core.errors import BadValue, Problem

PLUGIN_VARIABLE = "XLA_OPS_PJRT_PLUGIN"

_PLUGIN_FILE = "xla_cuda_plugin.so"
# The extras bring a plugin with all that it opens, in versions that go together.
INSTALL = "install xla_ops[cuda13], or xla_ops[cuda12] for drivers before 580"


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


def distribution_of(path: pathlib.Path) -> str:
    """The distribution that brings the plugin at `path`; "" where it is another."""
    match = re.fullmatch(r"xla_(cuda\d+)", path.parent.name)
    return f"jax-{match[1]}-pjrt" if match else ""


def reinstall(path: pathlib.Path) -> str:
    """What to do about a plugin at `path` that is broken."""
    match = re.fullmatch(r"jax-(cuda\d+)-pjrt", distribution_of(path))
    if match is None:
        return "reinstall it"
    return f"reinstall {match[0]}, which xla_ops[{match[1]}] brings"


def describe_plugin(path: pathlib.Path) -> str:
    """`path` with the distribution that it came from, where that is known."""
    name = distribution_of(path)
    try:
        version = importlib.metadata.version(name) if name else None
    except importlib.metadata.PackageNotFoundError:
        version = None
    # None too of metadata that pip left empty.
    return f"{path} ({name} {version})" if version else str(path)


def find_plugin() -> pathlib.Path:
    """The plugin to wrap. Raises Problem if there is none, or no one choice."""
    chosen = os.environ.get(PLUGIN_VARIABLE)
    if chosen:
        path = pathlib.Path(chosen)
        if not path.is_file():
            raise BadValue(
                f"{PLUGIN_VARIABLE} must be the path of a PJRT plugin, got {chosen!r}:"
                " no such file"
            )
        return path.resolve()
    found = installed_plugins()
    if not found:
        raise Problem(
            "a GPU client needs JAX's CUDA plugin, and none is installed",
            f"{INSTALL}; or set {PLUGIN_VARIABLE} to the path of {_PLUGIN_FILE}; or"
            " run on the CPU with PJRT_DEVICE=CPU",
        )
    if len(found) > 1:
        names = " and ".join(describe_plugin(path) for path in found)
        raise Problem(
            f"{len(found)} CUDA plugins are installed, {names}",
            f"set {PLUGIN_VARIABLE} to the path of one of them, or pip uninstall the"
            " others",
        )
    return found[0]
