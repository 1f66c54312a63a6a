"""xla_ops.gpu.job on XLA's own coordination service, which JAX brings: torch_xla's
processes on GPUs find each other by the same one."""

import socket
import subprocess
import sys

import pytest

# Leaves as torch_xla does: nothing is shut down.
RANK = """
import atexit, os, sys, time
atexit.register(os._exit, 0)
from jax._src.lib import _jax as xla
from xla_ops.gpu import job

rank, port, stays = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "True"
if rank == 0:
    service = xla.get_distributed_runtime_service("[::]:" + port, 2)
client = xla.get_distributed_runtime_client(
    "127.0.0.1:" + port, rank, init_timeout=60, shutdown_on_destruction=False
)
client.connect()
# Else the first one may leave while the other waits for an answer, for a minute.
if rank == 1:
    client.key_value_set("connected", "yes")
    time.sleep(3)
else:
    client.blocking_key_value_get("connected", 60000)
if rank == 0 and stays:
    job.stay_for_others({"WORLD_SIZE": "2", "XLA_COORDINATOR_PORT": port})
"""


@pytest.mark.parametrize("stays", [True, False])
def test_others_end_well_where_the_coordinator_ends_first(stays):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(port), str(stays)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    errors = [rank.communicate(timeout=60)[1] for rank in ranks]
    first, other = (rank.returncode for rank in ranks)
    assert first == 0, errors[0]
    assert (other == 0) == stays, errors[1]  # it aborts otherwise
