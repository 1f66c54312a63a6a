"""The share of a GPU that a client takes (gpu/share.py), where others have taken
theirs; fakes (fakes.py) stand for the driver and NVML."""

import uuid
import warnings

import pytest

import fakes
from xla_ops.gpu import driver, share, visible

GIB = 1 << 30
TOTAL = 80 * GIB  # of the fake driver's devices
UUIDS = [uuid.UUID(bytes=bytes([i] * 16)) for i in (1, 2)]


@pytest.fixture
def free(monkeypatch):
    """Returns a function that says how many bytes are free, and of what."""
    monkeypatch.setattr(driver, "_DRIVER_LIBRARY", str(fakes.build("fake_cuda_driver")))
    monkeypatch.setattr(visible, "_NVML_LIBRARY", str(fakes.build("fake_nvml")))
    monkeypatch.setenv("FAKE_CUDA_INIT", "0")
    monkeypatch.setenv("FAKE_CUDA_DEVICES", "9.0,9.0")

    def configure(size, kind="GPU"):
        for name in ("GPU", "MIG"):
            uuids = ",".join(f"{name}-{u}" for u in UUIDS) if name == kind else ""
            monkeypatch.setenv(f"FAKE_NVML_{name}S", uuids)
        monkeypatch.setenv("FAKE_NVML_FREE", str(size))

    return configure


@pytest.mark.parametrize("kind", ["GPU", "MIG"])
@pytest.mark.parametrize("ordinal", [0, 1])
def test_room(free, kind, ordinal):
    free(33 * GIB, kind)
    assert share.room(ordinal) == (TOTAL, 32 * GIB)


def test_room_that_nobody_knows(free, monkeypatch):
    free(33 * GIB)
    assert share.room(2) is None
    monkeypatch.setenv("FAKE_NVML_GPUS", "GPU-other")
    assert share.room(0) is None
    monkeypatch.setattr(visible, "_NVML_LIBRARY", "libno_such_nvml.so.1")
    assert share.room(0) is None
    monkeypatch.setattr(driver, "_DRIVER_LIBRARY", "libno_such_driver.so.1")
    assert share.room(0) is None


@pytest.mark.parametrize("asked", [{}, {"memory_fraction": 0.5}])
def test_a_share_that_is_not_free_is_made_smaller(free, asked):
    free(25 * GIB)
    options = {"allocator": "default", **asked}
    asked_share = asked.get("memory_fraction", 0.75)
    message = f"FRACTION must be at most 0.300, .* got {asked_share}: it is 0.300 now"
    with pytest.warns(UserWarning, match=message):
        fitted = share.fitted(options)
    assert fitted == {"allocator": "default", "memory_fraction": 24 / 80}
    assert options == {"allocator": "default", **asked}


def test_warnings_that_are_errors_do_not_stop_it(free):
    free(25 * GIB)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert share.fitted({"allocator": "bfc"})["memory_fraction"] == 24 / 80


@pytest.mark.parametrize(
    "options, size",
    [
        ({"allocator": "default"}, 79 * GIB),
        ({"allocator": "default", "memory_fraction": 0.3}, 25 * GIB),
        ({"allocator": "default", "preallocate": False}, 25 * GIB),
        ({"allocator": "cuda_async"}, 25 * GIB),
        ({"allocator": "platform"}, 25 * GIB),
        ({"allocator": "default", "memory_fraction": 1.5}, 25 * GIB),
    ],
)
@pytest.mark.filterwarnings("error")
def test_what_stays_as_it_is(free, options, size):
    free(size)
    assert share.fitted(options) == options


def test_a_rank_looks_at_its_own_gpu(free, monkeypatch):
    free(25 * GIB)
    monkeypatch.setattr(share, "room", lambda i: share.Room(TOTAL, (40, 8)[i] * GIB))
    with pytest.warns(UserWarning, match="at most 0.100"):
        options = share.fitted({"allocator": "default", "visible_devices": [1]})
    assert options["memory_fraction"] == 0.1
