"""XLA's flags: what is added, and what stays the user's."""

import os

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


@pytest.fixture
def plugin(tmp_path):
    path = tmp_path / "xla_cuda13" / "xla_cuda_plugin.so"
    path.parent.mkdir()
    path.write_bytes(b"a plugin")
    return path


def test_tuning_is_kept_by_plugin(tmp_path, plugin):
    environ = {"XLA_FLAGS": "--a=1"}
    path = flags.keep_tuning(tmp_path / "kept", plugin, environ)
    assert path.is_dir() and path.parent == tmp_path / "kept"
    flag = f"--xla_gpu_per_fusion_autotune_cache_dir={path}"
    assert environ["XLA_FLAGS"] == f"--a=1 {flag}"
    assert flags.keep_tuning(tmp_path / "kept", plugin, {}) == path
    plugin.write_bytes(b"another plugin")
    assert flags.keep_tuning(tmp_path / "kept", plugin, {}) != path


def test_the_users_folder_of_tuning_stays(tmp_path, plugin):
    given = "--xla_gpu_per_fusion_autotune_cache_dir="
    environ = {"XLA_FLAGS": given}
    assert flags.keep_tuning(tmp_path / "kept", plugin, environ) is None
    assert environ == {"XLA_FLAGS": given}
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize("name", ["file/below", "with space"])
def test_without_a_folder_nothing_is_kept(tmp_path, plugin, name):
    (tmp_path / "file").write_text("")
    environ = {}
    assert flags.keep_tuning(tmp_path / name, plugin, environ) is None
    assert environ == {}


def test_a_folder_that_cannot_be_written(tmp_path, plugin, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    environ = {}
    assert flags.keep_tuning(tmp_path / "kept", plugin, environ) is None
    assert environ == {}
