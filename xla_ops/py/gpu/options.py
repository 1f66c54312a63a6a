"""What the environment asks of the client and of xmp.spawn.

Environment:
  PJRT_DEVICE: GPU or CUDA, the same.
  XLA_OPS_PJRT_PLUGIN: path of the xla_cuda_plugin.so to use. Default: the installed
    one (jax-cuda12-pjrt or jax-cuda13-pjrt).
  PJRT_ALLOCATOR_FRACTION, or XLA_PYTHON_CLIENT_MEM_FRACTION: share of the GPU's
    memory for XLA. Default: XLA's, 0.75.
  PJRT_ALLOCATOR_PREALLOCATE, or XLA_PYTHON_CLIENT_PREALLOCATE: take that share at
    the start. Default: XLA's, true, for a process with one GPU or with a rank; false
    for one that sees several GPUs and has no rank, as a plain script on a large host:
    each GPU's memory then grows with what is used of it.
  PJRT_ALLOCATOR_CUDA_ASYNC: true for the allocator of the CUDA driver. Or
    XLA_PYTHON_CLIENT_ALLOCATOR: default, bfc, cuda_async or platform.
  CUDA_VISIBLE_DEVICES: as for every CUDA program.
  GPU_NUM_DEVICES: processes that xmp.spawn starts. Default: one a visible GPU.
  LOCAL_RANK, RANK, LOCAL_WORLD_SIZE, WORLD_SIZE, MASTER_ADDR (torchrun) and
    PJRT_LOCAL_PROCESS_RANK, PJRT_LOCAL_PROCESS_COUNT (xmp.spawn): one GPU a process.
  XLA_COORDINATOR_PORT: where the processes' clients find each other on the first one's
    host. Default: one that follows from MASTER_PORT; torch_xla's, 8547, without that.
  XLA_OPS_JOIN_TIMEOUT_S: seconds that a process waits for the others of its job to come
    before it ends with an error. Default: 600.
The names that begin with PJRT_ go before those that begin with XLA_PYTHON_.

Tested by tests/gpu/test_options.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping

from ..core.environment import TRUE, boolean, first, integer, wrong
from . import visible

# As long as a collective waits (flags.py), and torch.distributed with NCCL.
_JOIN_S = 600
JOIN_VARIABLE = "XLA_OPS_JOIN_TIMEOUT_S"
_ALLOCATORS = ("default", "bfc", "cuda_async", "platform")


def process_count(environ: Mapping[str, str]) -> int:
    """How many processes xmp.spawn starts: one a visible GPU.

    Raises BadValue if GPU_NUM_DEVICES is set to anything but a positive integer.
    """
    number = integer(environ, "GPU_NUM_DEVICES", minimum=1)
    if number is not None:
        return number
    # Where there is no driver, the one process's client says so.
    return max(visible.count(environ) or 1, 1)


class Ranks:
    """This process's place, from torchrun's or torch_xla's variables."""

    def __init__(self, environ: Mapping[str, str]):
        def read(names: tuple[str, ...], default: int, minimum: int) -> int:
            for name in names:
                if name in environ:
                    number = integer(environ, name, minimum)
                    return default if number is None else number
            return default

        self.local_rank = read(("PJRT_LOCAL_PROCESS_RANK", "LOCAL_RANK"), 0, 0)
        self.rank = read(("RANK",), self.local_rank, 0)
        self.local_world_size = read(
            ("PJRT_LOCAL_PROCESS_COUNT", "LOCAL_WORLD_SIZE"), 1, 1
        )
        self.world_size = read(("WORLD_SIZE",), self.local_world_size, 1)
        if self.rank >= self.world_size > 1:
            rule = f"be below the number of processes, {self.world_size}"
            raise wrong("RANK", rule, str(self.rank))


# The defaults of torchrun and of torch_xla.
_MASTER_PORT, _COORDINATOR_PORT = 29500, 8547
_COORDINATOR_VARIABLE = "XLA_COORDINATOR_PORT"
_PORTS = range(1024, 65536)  # that need no privilege


def join_seconds(environ: Mapping[str, str]) -> int:
    """How long a process waits for the others of its job to come.

    Raises BadValue if XLA_OPS_JOIN_TIMEOUT_S is set to anything but a positive integer.
    """
    return integer(environ, JOIN_VARIABLE, minimum=1) or _JOIN_S


def set_coordinator_port(environ: MutableMapping[str, str]) -> None:
    """Gives a job's processes a port of their own to find each other at.

    torch_xla has one for all jobs of a host: the ranks of a second job come to the
    first one's coordinator, which takes them for its own, started anew, and ends both.
    MASTER_PORT is a job's own, as torchrun's processes meet there, and the same for all
    of them. A value that the user has set stays.
    """
    name = _COORDINATOR_VARIABLE
    master = environ.get("MASTER_PORT", "")
    if name in environ or not re.fullmatch("[0-9]{1,5}", master):
        return
    if int(master) in _PORTS:
        place = int(master) - _MASTER_PORT + _COORDINATOR_PORT - _PORTS.start
        environ[name] = str(_PORTS[place % len(_PORTS)])


def coordinator_port(environ: Mapping[str, str]) -> int:
    """Where the job's first process coordinates.

    Raises BadValue if XLA_COORDINATOR_PORT is set to anything but a port.
    """
    port = environ.get(_COORDINATOR_VARIABLE, str(_COORDINATOR_PORT))
    if not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < _PORTS.stop:
        raise wrong(_COORDINATOR_VARIABLE, "be a port, from 1 to 65535", port)
    return int(port)


def client_options(environ: Mapping[str, str]) -> dict:
    """The options of PJRT_Client_Create that `environ` asks for.

    Options that it does not mention are left out, so XLA's defaults hold, but for a
    process on several GPUs (see above). Raises BadValue naming the variable with a
    wrong value.
    """
    options: dict = {"platform_name": "gpu", "allocator": _allocator(environ)}
    fraction = _fraction(
        environ, ("PJRT_ALLOCATOR_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    )
    if fraction is not None:
        options["memory_fraction"] = fraction
    ranks = Ranks(environ)
    join_seconds(environ)
    if ranks.world_size > 1:
        options["node_id"] = ranks.rank
        options["num_nodes"] = ranks.world_size
        coordinator_port(environ)
    if ranks.local_world_size > 1:
        options["visible_devices"] = [_device_of_process(environ, ranks)]
    preallocate = boolean(
        environ, "PJRT_ALLOCATOR_PREALLOCATE", "XLA_PYTHON_CLIENT_PREALLOCATE"
    )
    if preallocate is None and ranks.world_size == 1:
        # XLA would take three quarters of every GPU of the host for a script that
        # may use one. Of several it takes what is used.
        preallocate = False if (visible.count(environ) or 1) > 1 else None
    if preallocate is not None:
        options["preallocate"] = preallocate
    return options


def ordinal(environ: Mapping[str, str]) -> int:
    """This process's first GPU, as CUDA counts. Raises BadValue as client_options."""
    (first_device, *_) = client_options(environ).get("visible_devices", [0])
    return int(first_device)


def _device_of_process(environ: Mapping[str, str], ranks: Ranks) -> int:
    """Which of the visible GPUs is this process's, where each has its own."""
    count = visible.count(environ)
    value = environ.get(visible.VARIABLE)
    if value is None or not count or ranks.local_rank < count:
        return ranks.local_rank  # check_machine looks whether there is one
    # Launchers such as Slurm show each process its own GPU only.
    if count == 1:
        return 0
    raise wrong(
        visible.VARIABLE,
        f"name a GPU for each of the {ranks.local_world_size} processes of this host",
        value,
    )


def _fraction(environ: Mapping[str, str], names: tuple[str, ...]) -> float | None:
    name, text = first(environ, names)
    if text is None:
        return None
    # With unified memory XLA may take more than the GPU has.
    unified = environ.get("TF_FORCE_UNIFIED_MEMORY", "").lower() in TRUE
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if 0 < value <= 1 or (unified and 1 < value < float("inf")):
        return value
    raise wrong(name, "be a number above 0 and at most 1", text)


def _allocator(environ: Mapping[str, str]) -> str:
    use_async = boolean(environ, "PJRT_ALLOCATOR_CUDA_ASYNC")
    if use_async is not None:
        return "cuda_async" if use_async else "default"
    name, text = first(environ, ("XLA_PYTHON_CLIENT_ALLOCATOR",))
    if text is None:
        return "default"
    if text.lower() not in _ALLOCATORS:
        raise wrong(name, f"be one of {', '.join(_ALLOCATORS)}", text)
    return text.lower()
