"""xla_ops.gpu.job: starts and ends of processes that work together."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import types
import warnings

import pytest
import torch_xla
from torch_xla._internal import pjrt
from torch_xla.core import xla_model as xm
from torch_xla.experimental import plugins

import xla_ops_pjrt
from xla_ops.gpu import job

CONNECTS = """
import socket, sys, time
connections = [socket.create_connection((sys.argv[1], int(sys.argv[2])))]
print("there", flush=True)
sys.stdin.readline()
"""
# The first process of a job: connects to itself too, as XLA's client does.
COORDINATES = """
import os, socket, sys, threading
from xla_ops.gpu import job

server = socket.create_server(("", 0))
port = server.getsockname()[1]
own = socket.create_connection(("127.0.0.1", port))
accepted = [server.accept()[0]]
job.stay_for_others({**os.environ, "XLA_COORDINATOR_PORT": str(port)})
print(port, flush=True)
accepted += [server.accept()[0]]
END
"""


def connect(address, port):
    other = subprocess.Popen(
        [sys.executable, "-c", CONNECTS, address, str(port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout is not None and other.stdout.readline() == "there\n"
    return other


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_counts_connections_of_other_processes_alone(family):
    both = {"dualstack_ipv6": True} if family == socket.AF_INET6 else {}
    with socket.create_server(("", 0), family=family, **both) as server:
        port = server.getsockname()[1]
        assert job.others(port) == 0
        with socket.create_connection(("127.0.0.1", port)), server.accept()[0]:
            assert job.others(port) == 0
            other = connect("127.0.0.1", port)
            with server.accept()[0]:
                assert job.others(port) == 1
                assert job.others(port + 1) == 0
                other.communicate("\n")
                assert job.others(port) == 0


def coordinate(end, rank="0"):
    first = subprocess.Popen(
        [sys.executable, "-c", COORDINATES.replace("END", end)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "WORLD_SIZE": "2", "RANK": rank},
    )
    assert first.stdout is not None
    return first, connect("127.0.0.1", int(first.stdout.readline()))


@pytest.mark.parametrize(
    "end, rank, stays",
    [
        ("", "0", True),
        ("sys.exit(3)", "0", True),
        ("raise ValueError('early')", "0", False),
        ("", "1", False),
    ],
)
def test_coordinator_ends_behind_the_others(end, rank, stays):
    first, other = coordinate(end, rank)
    if stays:
        with pytest.raises(subprocess.TimeoutExpired):
            first.wait(1)
    else:
        first.wait(20)
    began = time.monotonic()
    other.communicate("\n")
    first.communicate(timeout=20)
    assert time.monotonic() - began < 20
    expected = {"": 0, "sys.exit(3)": 3}.get(end, 1)
    assert first.returncode == expected


def test_coordinator_does_not_stay_for_ever(monkeypatch):
    monkeypatch.setattr(job, "STAY_S", 0.3)
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        other = connect("127.0.0.1", port)
        with server.accept()[0]:
            began = time.monotonic()
            job._stay(port, os.getpid())
            assert 0.3 <= time.monotonic() - began < 5
            began = time.monotonic()
            job._stay(port, os.getpid() + 1)  # as in a forked child
            assert time.monotonic() - began < 0.3
            other.communicate("\n")


@pytest.mark.parametrize("world_size, replicated", [("2", True), ("1", False)])
def test_only_process_of_a_host_is_one_of_the_job(monkeypatch, world_size, replicated):
    """What torch_xla does where torchrun has a process on each host."""
    plugin = types.SimpleNamespace(
        configure_single_process=lambda: (
            xla_ops_pjrt.GpuPlugin.configure_single_process(None)
        )
    )
    monkeypatch.setattr(plugins, "using_dynamic_plugins", lambda: True)
    monkeypatch.setattr(plugins, "default", lambda: plugin)
    monkeypatch.setenv("WORLD_SIZE", world_size)
    monkeypatch.setenv("PJRT_LOCAL_PROCESS_COUNT", "1")
    calls = []

    def set_replication(device, devices):
        calls.append((str(device), list(map(str, devices))))

    monkeypatch.setattr(xm, "set_replication", set_replication)
    pjrt.initialize_singleprocess()
    device = str(torch_xla.device())
    assert calls == [(device, [device] if replicated else [])]
    assert xm.set_replication is set_replication


@pytest.mark.parametrize(
    "environ, is_spmd, warns",
    [
        ({"WORLD_SIZE": "2", "RANK": "1"}, False, True),
        ({"WORLD_SIZE": "2", "RANK": "1"}, True, False),
        ({"WORLD_SIZE": "1"}, False, False),
        ({"WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}, False, False),
        ({"PJRT_LOCAL_PROCESS_COUNT": "2"}, False, False),
    ],
)
def test_a_job_that_torch_xla_does_not_know_is_told(environ, is_spmd, warns):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        job.check_launcher(environ, is_spmd)
    assert ["set TORCHELASTIC_RUN_ID too" in str(w.message) for w in caught] == (
        [True] * warns
    )
