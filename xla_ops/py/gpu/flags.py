"""XLA's own flags: those that several processes need, and a folder for its tuning.

XLA reads XLA_FLAGS once, when its plugin is loaded. What the user has set there stays.

Tested by tests/gpu/test_flags.py.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import pathlib
import re
from collections.abc import Mapping, MutableMapping

from .options import Ranks

VARIABLE = "XLA_FLAGS"

# Flags that torch_xla 2.9.0 and the plugins of JAX 0.7.2 to 0.11.2 know: each of them
# ends the process at one that it does not know.
_OF_PROCESSES = {
    # Each process tunes its own kernels. Sharing that work goes by a key-value store
    # that torch_xla does not hand to the compiler: the first program with a collective
    # would wait for it for ever.
    "xla_gpu_shard_autotuning": "false",
    # A collective whose other ranks do not come ends the process, instead of waiting
    # for ever. As long as torch.distributed's timeout with NCCL: ranks may compile for
    # minutes before they come.
    "xla_gpu_nccl_termination_timeout_seconds": "600",
}


_TUNING = "xla_gpu_per_fusion_autotune_cache_dir"


def set_defaults(environ: MutableMapping[str, str]) -> None:
    """Sets what this process needs, before XLA's plugin is loaded."""
    if Ranks(environ).world_size > 1:
        _add(environ, _OF_PROCESSES)


def keep_tuning(
    folder: str | os.PathLike, plugin: pathlib.Path, environ: MutableMapping[str, str]
) -> pathlib.Path | None:
    """Has XLA keep in a folder which kernels it found to be the fastest.

    To be called before XLA's plugin is loaded. Processes may share the folder.

    Args:
        folder: gets one folder for each plugin and set of CUDA's libraries, since a
            choice means nothing to others.
        plugin: the plugin that will be loaded.

    Returns:
        The folder; None where the user has set one, or none can be made there.
    """
    if is_set(_TUNING, environ):
        return None
    libraries = sorted(
        f"{name} {distribution.version}"
        for distribution in importlib.metadata.distributions()
        if (name := (distribution.metadata["Name"] or "").lower()).startswith("nvidia")
    )
    build = f"{plugin.parent.name} {plugin.stat().st_size}"
    key = hashlib.sha256("\n".join([build, *libraries]).encode()).hexdigest()[:16]
    path = pathlib.Path(folder) / key
    if " " in str(path):  # XLA splits its flags there
        return None
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    if not os.access(path, os.W_OK):
        return None
    _add(environ, {_TUNING: str(path)})
    return path


def is_set(name: str, environ: Mapping[str, str]) -> bool:
    """Whether the user has set the flag."""
    given = environ.get(VARIABLE, "")
    return bool(re.search(rf"(?:^|\s)--(?:no)?{name}(?:=|\s|$)", given))


def _add(environ: MutableMapping[str, str], flags: Mapping[str, str]) -> None:
    missing = [f"--{k}={v}" for k, v in flags.items() if not is_set(k, environ)]
    if missing:
        environ[VARIABLE] = " ".join([environ.get(VARIABLE, ""), *missing]).strip()
