"""A job of several processes: what torch_xla leaves to be done at its start and end.

Tested by tests/gpu/test_job.py.
"""

from __future__ import annotations

import atexit
import os
import pathlib
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from .. import _runtime
from .options import JOIN_VARIABLE, Ranks, coordinator_port, join_seconds

# How long the process that others find each other at stays for them. A rank that has
# left the others alone by sys.exit ends so, and they with it.
STAY_S = 60.0


def replicate_only_process() -> None:
    """Has the only process of a host compute together with those of other hosts.

    For `torch_xla._internal.pjrt.initialize_singleprocess`, which calls this first:
    it takes the only process of a host for that of a job, and next sets no replication.
    Collectives would then be of each process by itself, without a word.
    """
    from torch_xla.core import xla_model as xm

    set_replication: Any = xm.set_replication

    def set_once(device: object, devices: object) -> None:
        xm.set_replication = set_replication
        set_replication(device, xm.get_xla_supported_devices())

    xm.set_replication = set_once


def check_launcher(environ: Mapping[str, str], is_spmd: bool) -> None:
    """Warns of a job whose processes torch_xla does not know to be one.

    It sets up its collectives where torchrun or torch_xla.launch started the process.
    """
    world_size = Ranks(environ).world_size
    known = {"TORCHELASTIC_RUN_ID", "PJRT_LOCAL_PROCESS_COUNT"} & set(environ)
    if world_size > 1 and not known and not is_spmd:
        warnings.warn(
            f"xla_ops: WORLD_SIZE is {world_size}, but neither torchrun nor"
            " torch_xla.launch started this process: torch_xla's collectives are of"
            " each process by itself. Where another launcher sets torchrun's variables,"
            " set TORCHELASTIC_RUN_ID too, to any name for the job",
            stacklevel=2,
        )


def wait_for_others(environ: Mapping[str, str]) -> None:
    """Ends this process with an error where others do not come; `joined` calls it off.

    By itself torch_xla waits for them far longer, deaf to Ctrl-C.
    """
    ranks = Ranks(environ)
    seconds = join_seconds(environ)
    if ranks.world_size == 1:
        return
    port = coordinator_port(environ)
    address = environ.get("MASTER_ADDR", "localhost")
    others = [rank for rank in range(ranks.world_size) if rank != ranks.rank]
    names = ", ".join(map(str, others[:8])) + ", ..." * (len(others) > 8)
    _runtime.start_deadline(
        seconds * 1000,
        f"xla_ops: WORLD_SIZE must be the number of processes that come, got"
        f" {ranks.world_size}, and rank {ranks.rank} has waited {seconds} s for rank"
        f" {names} at {address}:{port}. Look why one did not start or ended, and"
        " whether MASTER_ADDR and the port are the same for all;"
        f" {JOIN_VARIABLE} sets how long to wait",
    )


def joined() -> None:
    """To be called when the others have come."""
    _runtime.end_deadline()


def stay_for_others(environ: Mapping[str, str]) -> None:
    """Has the process that others find each other at end behind them.

    Their clients abort when its coordinator is gone, even at the end of their work.
    Nothing where this is another process of the job, or one without others.
    """
    ranks = Ranks(environ)
    if ranks.world_size > 1 and ranks.rank == 0:
        atexit.register(_stay, coordinator_port(environ), os.getpid())


def _stay(port: int, pid: int) -> None:
    # Not in a forked child, and not to put off that an exception is seen.
    if os.getpid() != pid or getattr(sys, "last_value", None) is not None:
        return
    end = time.monotonic() + STAY_S
    while others(port) and time.monotonic() < end:
        time.sleep(0.02)


def others(port: int) -> int:
    """Number of connections that other processes have to this one's `port`."""
    inodes = set()
    try:
        for link in pathlib.Path("/proc/self/fd").iterdir():
            try:
                target = os.readlink(link)
            except OSError:  # closed meanwhile
                continue
            if target.startswith("socket:["):
                inodes.add(target[len("socket:[") : -1])
        rows = list(_connections())
    except OSError:
        return 0
    own = {local for local, _, inode in rows if inode in inodes}
    return sum(
        local[1] == port and inode in inodes and remote not in own
        for local, remote, inode in rows
    )


def _connections() -> Iterator[tuple[tuple[str, int], tuple[str, int], str]]:
    """Local end, remote end and inode of each connection of this network namespace."""
    for name in ("tcp", "tcp6"):
        path = pathlib.Path("/proc/self/net", name)
        for line in path.read_text().splitlines()[1:] if path.exists() else []:
            fields = line.split()
            if fields[3] == "01":  # established
                yield _end(fields[1]), _end(fields[2]), fields[9]


def _end(text: str) -> tuple[str, int]:
    """Address and port; of IPv4 mapped into IPv6, which one end may have, IPv4's."""
    address, _, port = text.partition(":")
    return address.removeprefix("0000000000000000FFFF0000"), int(port, 16)
