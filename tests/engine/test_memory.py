"""How much memory KV caches get, and what the client is told to take."""

import pytest

from xla_ops.gpu import share
from xla_ops.vllm.memory import Memory, check_free, for_caches, memory, set_share

GIB = 1 << 30


def test_what_weights_and_a_step_leave():
    before = Memory(limit=100 * GIB, used=16 * GIB, peak=16 * GIB)
    after = Memory(limit=100 * GIB, used=17 * GIB, peak=20 * GIB)
    assert for_caches(before, after, None) == 98 * GIB - 17 * GIB - 4 * GIB


def test_what_was_asked_for_goes_before():
    assert for_caches(None, None, 123) == 123


def test_a_client_that_tells_nothing():
    assert memory() is None  # XLA:CPU
    assert for_caches(None, None, None) == 4 * GIB


def test_nothing_is_left():
    before = Memory(limit=20 * GIB, used=16 * GIB, peak=16 * GIB)
    after = Memory(limit=20 * GIB, used=16 * GIB, peak=20 * GIB)
    message = (
        r"xla_ops: gpu_memory_utilization must leave room for KV caches, got 20.0 GiB,"
        r" of which weights take 16.0 and a step 4.0"
    )
    with pytest.raises(ValueError, match=message):
        for_caches(before, after, None)


@pytest.mark.parametrize(
    "given, wanted",
    [
        ({}, {"PJRT_ALLOCATOR_FRACTION": "0.8"}),
        ({"PJRT_ALLOCATOR_FRACTION": ""}, {"PJRT_ALLOCATOR_FRACTION": "0.8"}),
        ({"PJRT_ALLOCATOR_FRACTION": "0.5"}, {"PJRT_ALLOCATOR_FRACTION": "0.5"}),
        (
            {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"},
            {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"},
        ),
    ],
)
def test_share(given, wanted):
    environ = dict(given)
    set_share(0.8, environ)
    assert environ == wanted


def test_memory_that_others_have(monkeypatch):
    rooms = [share.Room(80 * GIB, 40 * GIB), share.Room(80 * GIB, 20 * GIB)]
    monkeypatch.setattr(share, "room", lambda ordinal: rooms[ordinal])
    check_free(0.5, {})
    message = (
        r"xla_ops: gpu_memory_utilization must be at most 0.250, what is free of the"
        r" GPU \(20.0 of 80.0 GiB\), got 0.5: lower it"
    )
    rank = {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    with pytest.raises(ValueError, match=message):
        check_free(0.5, rank)
    check_free(0.25, rank)
    # The user's own share, which the client fits to what is free.
    check_free(0.5, rank | {"PJRT_ALLOCATOR_FRACTION": "0.2"})
    with pytest.raises(ValueError, match="gpu_memory_utilization must be at most"):
        check_free(0.5, rank | {"PJRT_ALLOCATOR_FRACTION": "0.5"})  # set_share's
    monkeypatch.setattr(share, "room", lambda ordinal: None)
    check_free(0.5, rank)
