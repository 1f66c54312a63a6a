"""What the environment asks of the GPU client (gpu/options.py)."""

from __future__ import annotations

import os

import pytest

from xla_ops.gpu import job, options, visible
from xla_ops_pjrt import GpuPlugin

BASE = {"platform_name": "gpu", "allocator": "default"}


@pytest.fixture(autouse=True)
def gpus(monkeypatch):
    """A machine with one GPU; returns a function that gives it another number."""

    def install(number: int | None) -> None:
        names = None if number is None else [f"GPU-{i}" for i in range(number)]
        machine = None if names is None else visible.Gpus(names)
        monkeypatch.setattr(visible, "query", lambda: machine)

    install(1)
    return install


@pytest.mark.parametrize(
    "environ, expected",
    [
        ({}, {}),
        ({"PJRT_ALLOCATOR_FRACTION": "0.5"}, {"memory_fraction": 0.5}),
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": ".25"}, {"memory_fraction": 0.25}),
        (
            {"PJRT_ALLOCATOR_FRACTION": "1", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.1"},
            {"memory_fraction": 1.0},
        ),
        (
            {"PJRT_ALLOCATOR_FRACTION": "1.5", "TF_FORCE_UNIFIED_MEMORY": "1"},
            {"memory_fraction": 1.5},
        ),
        ({"PJRT_ALLOCATOR_PREALLOCATE": "0"}, {"preallocate": False}),
        ({"PJRT_ALLOCATOR_PREALLOCATE": "1"}, {"preallocate": True}),
        ({"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}, {"preallocate": False}),
        ({"XLA_PYTHON_CLIENT_PREALLOCATE": "True"}, {"preallocate": True}),
        ({"PJRT_ALLOCATOR_PREALLOCATE": ""}, {}),
        ({"PJRT_ALLOCATOR_CUDA_ASYNC": "1"}, {"allocator": "cuda_async"}),
        ({"PJRT_ALLOCATOR_CUDA_ASYNC": "0"}, {}),
        ({"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}, {"allocator": "platform"}),
        ({"XLA_PYTHON_CLIENT_ALLOCATOR": "BFC"}, {"allocator": "bfc"}),
        # torchrun: four processes on two hosts.
        (
            {
                "LOCAL_RANK": "1",
                "RANK": "3",
                "LOCAL_WORLD_SIZE": "2",
                "WORLD_SIZE": "4",
            },
            {"node_id": 3, "num_nodes": 4, "visible_devices": [1]},
        ),
        # xmp.spawn: two processes on this host.
        (
            {"PJRT_LOCAL_PROCESS_RANK": "1", "PJRT_LOCAL_PROCESS_COUNT": "2"},
            {"node_id": 1, "num_nodes": 2, "visible_devices": [1]},
        ),
        # One process on each of two hosts uses all GPUs of its host.
        (
            {
                "LOCAL_RANK": "0",
                "RANK": "1",
                "LOCAL_WORLD_SIZE": "1",
                "WORLD_SIZE": "2",
            },
            {"node_id": 1, "num_nodes": 2},
        ),
        # The launcher shows each process its own GPU only.
        (
            {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "5"},
            {"node_id": 1, "num_nodes": 2, "visible_devices": [0]},
        ),
        (
            {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "5,6"},
            {"node_id": 1, "num_nodes": 2, "visible_devices": [1]},
        ),
    ],
)
def test_client_options(environ, expected, gpus):
    gpus(8 if "LOCAL_WORLD_SIZE" in environ else 1)
    assert options.client_options(environ) == {**BASE, **expected}


@pytest.mark.parametrize(
    "name, value",
    [
        ("PJRT_ALLOCATOR_FRACTION", "0"),
        ("PJRT_ALLOCATOR_FRACTION", "1.5"),
        ("PJRT_ALLOCATOR_FRACTION", "-1"),
        ("PJRT_ALLOCATOR_FRACTION", "nan"),
        ("PJRT_ALLOCATOR_FRACTION", "half"),
        ("XLA_PYTHON_CLIENT_MEM_FRACTION", "2"),
        ("PJRT_ALLOCATOR_PREALLOCATE", "maybe"),
        ("XLA_PYTHON_CLIENT_PREALLOCATE", "2"),
        ("PJRT_ALLOCATOR_CUDA_ASYNC", "cuda"),
        ("XLA_PYTHON_CLIENT_ALLOCATOR", "arena"),
        ("LOCAL_RANK", "one"),
        ("RANK", "-1"),
        ("WORLD_SIZE", "0"),
        ("LOCAL_WORLD_SIZE", "1.0"),
        ("WORLD_SIZE", "9" * 5000),
    ],
)
def test_wrong_value_raises_naming_the_variable(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be .*, got '{value}'$"):
        options.client_options({name: value})


@pytest.mark.parametrize(
    "name, value",
    [
        ("RANK", "2"),
        ("RANK", "7"),
        ("XLA_COORDINATOR_PORT", ""),
        ("XLA_COORDINATOR_PORT", "x"),
        ("XLA_COORDINATOR_PORT", "0"),
        ("XLA_COORDINATOR_PORT", "-1"),
        ("XLA_COORDINATOR_PORT", "65536"),
        ("XLA_COORDINATOR_PORT", "²"),
        ("XLA_COORDINATOR_PORT", "9" * 5000),
    ],
)
def test_what_several_processes_cannot_meet_by_is_refused(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be .*, got '{value}'$"):
        options.client_options({"WORLD_SIZE": "2", name: value})
    options.client_options({"WORLD_SIZE": "1", name: value})


@pytest.mark.parametrize("number", [None, 1, 2, 8])
def test_several_gpus_are_not_preallocated_by_a_process_without_a_rank(gpus, number):
    gpus(number)
    several = number is not None and number > 1
    grows = {"preallocate": False} if several else {}
    assert options.client_options({}) == {**BASE, **grows}
    # One of them, what the user says, and a rank: XLA's default, or theirs.
    one = {"CUDA_VISIBLE_DEVICES": "0"}
    assert options.client_options(one) == BASE
    asked = {"PJRT_ALLOCATOR_PREALLOCATE": "1"}
    assert options.client_options(asked) == {**BASE, "preallocate": True}
    share = {"PJRT_ALLOCATOR_FRACTION": "0.5"}
    assert options.client_options(share) == {**BASE, "memory_fraction": 0.5, **grows}
    for ranks in (
        {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "2"},
    ):
        assert "preallocate" not in options.client_options(ranks)


def test_fewer_visible_gpus_than_processes_raises(gpus):
    gpus(3)
    environ = {"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "3"}
    assert options.client_options(environ)["visible_devices"] == [2]
    for value in ("0,1", "0,1,7", "GPU-0,GPU-1,GPU-0xff"):
        with pytest.raises(
            ValueError, match="CUDA_VISIBLE_DEVICES must name a GPU for"
        ):
            options.client_options({**environ, "CUDA_VISIBLE_DEVICES": value})
    # None visible, or more processes than GPUs: check_machine says so.
    for value in ("", "-1", "9"):
        environ["CUDA_VISIBLE_DEVICES"] = value
        assert options.client_options(environ)["visible_devices"] == [2]
    gpus(1)
    del environ["CUDA_VISIBLE_DEVICES"]
    assert options.client_options(environ)["visible_devices"] == [2]


@pytest.fixture
def launched(monkeypatch):
    """As torchrun starts a process, whose wait for others is called off at the end."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    yield
    job.joined()


def test_coordinator_is_needed_by_several_processes(monkeypatch, launched):
    gpu = GpuPlugin()
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "PJRT_LOCAL_PROCESS_COUNT"):
        monkeypatch.delenv(name, raising=False)
    assert not gpu.requires_xla_coordinator()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert gpu.requires_xla_coordinator()
    monkeypatch.setenv("WORLD_SIZE", "two")  # library_path reports it
    assert not gpu.requires_xla_coordinator()


@pytest.mark.filterwarnings("error")
def test_coordinator_is_needed_where_warnings_are_errors(monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "PJRT_LOCAL_PROCESS_COUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert GpuPlugin().requires_xla_coordinator()
    job.joined()


def test_jobs_have_coordinators_of_their_own(monkeypatch, launched):
    def port(**given):
        environ = {k: str(v) for k, v in given.items()}
        options.set_coordinator_port(environ)
        return environ.get("XLA_COORDINATOR_PORT")

    assert port(MASTER_PORT=29500) == "8547"  # the defaults of torchrun and torch_xla
    ports = [int(port(MASTER_PORT=master)) for master in range(1024, 65536)]
    assert len(set(ports)) == len(ports)
    assert min(ports) == 1024 and max(ports) == 65535
    assert all(port != master for master, port in enumerate(ports, 1024))
    assert port(MASTER_PORT=29501, XLA_COORDINATOR_PORT=5) == "5"
    digits = "\u0662\u0669\u0665\u0660\u0660"  # of another script
    for wrong in ("", "x", "-1", "0", "99999", "29500.0", digits, "9" * 5000):
        assert port(MASTER_PORT=wrong) is None
    assert port() is None
    # Before torch_xla reads it.
    monkeypatch.setenv("XLA_COORDINATOR_PORT", "1")  # to be put back at the end
    monkeypatch.delenv("XLA_COORDINATOR_PORT")
    monkeypatch.setenv("MASTER_PORT", "29507")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert GpuPlugin().requires_xla_coordinator()
    assert os.environ["XLA_COORDINATOR_PORT"] == "8554"


@pytest.mark.parametrize(
    "names, count",
    [("0,1,2", 3), ("GPU-2", 1), ("0,1,7", 2), ("", 1), ("-1", 1), (None, 4)],
)
def test_processes_of_spawn(monkeypatch, gpus, names, count):
    gpus(4)
    monkeypatch.delenv("GPU_NUM_DEVICES", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if names is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", names)
    assert GpuPlugin().physical_chip_count() == count
    monkeypatch.setenv("GPU_NUM_DEVICES", "5")
    assert GpuPlugin().physical_chip_count() == 5
    gpus(None)
    monkeypatch.delenv("GPU_NUM_DEVICES")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert GpuPlugin().physical_chip_count() == 1
