"""XLA's flags for several processes: what is added, and what stays the user's."""

import pytest

from xla_ops.gpu import flags

SHARD = "--xla_gpu_shard_autotuning=false"
TIMEOUT = "--xla_gpu_nccl_termination_timeout_seconds=600"
RANKS = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    "given, expected",
    [
        (None, f"{SHARD} {TIMEOUT}"),
        ("", f"{SHARD} {TIMEOUT}"),
        ("--xla_dump_to=/d", f"--xla_dump_to=/d {SHARD} {TIMEOUT}"),
        (
            "--xla_gpu_shard_autotuning=true",
            f"--xla_gpu_shard_autotuning=true {TIMEOUT}",
        ),
        (
            "--noxla_gpu_shard_autotuning --a=1",
            f"--noxla_gpu_shard_autotuning --a=1 {TIMEOUT}",
        ),
        (
            "--xla_gpu_nccl_termination_timeout_seconds=9",
            f"--xla_gpu_nccl_termination_timeout_seconds=9 {SHARD}",
        ),
        (
            "--xla_gpu_shard_autotuning_x",
            f"--xla_gpu_shard_autotuning_x {SHARD} {TIMEOUT}",
        ),
        (f"{TIMEOUT} {SHARD}", f"{TIMEOUT} {SHARD}"),
    ],
)
def test_several_processes(given, expected):
    environ = dict(RANKS) if given is None else {**RANKS, "XLA_FLAGS": given}
    flags.set_defaults(environ)
    assert environ["XLA_FLAGS"] == expected
    flags.set_defaults(environ)
    assert environ["XLA_FLAGS"] == expected


@pytest.mark.parametrize("given", [{}, {"XLA_FLAGS": "--xla_dump_to=/d"}])
@pytest.mark.parametrize("ranks", [{}, {"RANK": "0", "WORLD_SIZE": "1"}])
def test_one_process_gets_none(given, ranks):
    environ = {**given, **ranks}
    flags.set_defaults(environ)
    assert environ == {**given, **ranks}


def test_processes_of_spawn():
    environ = {"PJRT_LOCAL_PROCESS_RANK": "0", "PJRT_LOCAL_PROCESS_COUNT": "2"}
    flags.set_defaults(environ)
    assert environ["XLA_FLAGS"] == f"{SHARD} {TIMEOUT}"
