"""XLA's own flags that several processes need, one a GPU.

XLA reads XLA_FLAGS once, when its plugin is loaded. What the user has set there stays.

Tested by tests/gpu/test_flags.py.
"""

from __future__ import annotations

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


def defaults(environ: Mapping[str, str]) -> str | None:
    """XLA_FLAGS with what this process needs; None where it needs nothing more."""
    if Ranks(environ).world_size == 1:
        return None
    given = environ.get(VARIABLE, "")
    missing = [
        f"--{name}={value}"
        for name, value in _OF_PROCESSES.items()
        if not re.search(rf"(?:^|\s)--(?:no)?{name}(?:=|\s|$)", given)
    ]
    return " ".join([given, *missing]).strip() if missing else None


def set_defaults(environ: MutableMapping[str, str]) -> None:
    """Sets XLA_FLAGS, before XLA's plugin is loaded."""
    flags = defaults(environ)
    if flags is not None:
        environ[VARIABLE] = flags
