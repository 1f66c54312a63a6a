"""How much memory the device has, what is used of it, and what is left for caches.

The GPU client takes a share of the card when it starts (PJRT_ALLOCATOR_FRACTION) and
allocates from that. So vLLM's gpu_memory_utilization is made that share before the
client starts, and means what it says. XLA:CPU tells nothing of its memory.

Tested by tests/engine/test_memory.py.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch_xla
import torch_xla.core.xla_model as xm

from ..gpu import options, share

# Of what the client has beside weights, caches and what a step takes: kernels and
# constants of programs yet to be loaded, and what breaks into pieces.
_SLACK = 0.02
# On the CPU client, where nobody says how much there is: vLLM's own default there.
_CPU_CACHE_BYTES = 4 << 30


class Memory(NamedTuple):
    """In bytes: what the client may use, what it uses, and the most it ever used."""

    limit: int
    used: int
    peak: int


def set_share(utilization: float, environ: dict | os._Environ = os.environ) -> None:
    """Has a GPU client that is yet to start take this share of the card.

    A share that the user has set himself stays.
    """
    for name in ("PJRT_ALLOCATOR_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        if environ.get(name):  # the client takes an empty one for none
            return
    environ["PJRT_ALLOCATOR_FRACTION"] = str(utilization)


def check_free(utilization: float, environ: Mapping[str, str] = os.environ) -> None:
    """Raises ValueError where others have memory of the GPU that the client is to take.

    The client would take what there is (gpu/share.py), and caches be smaller than was
    asked for. That is what becomes of another share, which the user has set himself.
    """
    taken = options.client_options(environ).get("memory_fraction", utilization)
    found = share.room(options.ordinal(environ))
    if found is None or taken != utilization:
        return
    if utilization * found.total <= found.free:
        return
    raise ValueError(
        "xla_ops: gpu_memory_utilization must be at most"
        f" {found.free / found.total:.3f}, what is free of the GPU"
        f" ({found.free / 2**30:.1f} of {found.total / 2**30:.1f} GiB), got"
        f" {utilization:g}: lower it, or end the processes that have the rest"
        " (nvidia-smi)"
    )


def memory() -> Memory | None:
    """What the client tells; None of one that tells nothing."""
    try:
        info: Mapping[str, Any] = xm.get_memory_info(torch_xla.device())
    except RuntimeError:  # UNIMPLEMENTED, by XLA:CPU
        return None
    return Memory(
        info["bytes_limit"], info["bytes_used"], info.get("peak_bytes_used", 0)
    )


def bytes_used() -> int:
    """Bytes that are in use on the device, 0 where the client does not tell."""
    now = memory()
    return now.used if now else 0


def for_caches(before: Memory | None, after: Memory | None, asked: int | None) -> int:
    """Bytes that KV caches may take.

    Args:
        before: with the weights loaded and no step run.
        after: after the largest step, whose peak shows what steps need.
        asked: kv_cache_memory_bytes, which goes before everything.

    Raises:
        ValueError: nothing is left.
    """
    if asked:
        return asked
    if before is None or after is None:
        return _CPU_CACHE_BYTES
    step = max(after.peak - before.used, 0)
    left = int(after.limit * (1 - _SLACK)) - after.used - step
    if left <= 0:
        raise ValueError(
            "xla_ops: gpu_memory_utilization must leave room for KV caches, got"
            f" {after.limit / 2**30:.1f} GiB, of which weights take"
            f" {before.used / 2**30:.1f} and a step {step / 2**30:.1f}: raise it, or"
            " lower max_num_batched_tokens or max_num_seqs"
        )
    return left
