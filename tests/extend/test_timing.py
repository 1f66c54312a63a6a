"""Timing of launches, with a driver of fakes: what is measured, and what is freed."""

import enum
import sys
import types

import pytest
import torch

from xla_ops.core.checks import Checker
from xla_ops.core.errors import Problem
from xla_ops.core.hlo import Spec
from xla_ops.extend import launch, timing
from xla_ops.extend.kernel_cache import Code
from xla_ops.extend.launch import Given, Launch

F32 = torch.float32


class Result(enum.Enum):
    OK = 0
    OUT_OF_MEMORY = 2


class FakeDriver:
    """Time passes by the launches: each takes as many ms as its block has threads."""

    def __init__(self):
        self.now = 0.0
        self.events = {}
        self.memory = {}
        self.live = 0  # streams, events and contexts
        self.room = 10**6

    def __getattr__(self, name):
        assert name.startswith("cu"), name

        def function(*args):
            self.live += ("Create" in name or "Retain" in name or "Push" in name) - (
                "Destroy" in name or "Release" in name or "Pop" in name
            )
            return (Result.OK, 7 if "Get" in name or "Retain" in name else None)

        return function

    def cuStreamCreate(self, flags):  # noqa: N802
        self.live += 1
        return Result.OK, 11

    def cuEventCreate(self, flags):  # noqa: N802
        self.live += 1
        self.events[len(self.events)] = 0.0
        return Result.OK, len(self.events) - 1

    def cuEventRecord(self, event, stream):  # noqa: N802
        self.events[event] = self.now
        return (Result.OK,)

    def cuEventSynchronize(self, event):  # noqa: N802
        return (Result.OK,)

    def cuEventElapsedTime(self, start, end):  # noqa: N802
        return Result.OK, self.events[end] - self.events[start]

    def cuMemAlloc(self, size):  # noqa: N802
        if size > self.room:
            return Result.OUT_OF_MEMORY, None
        address = 0x1000 * (1 + len(self.memory) + self.live)
        self.memory[address] = size
        return Result.OK, address

    def cuMemsetD8(self, address, value, size):  # noqa: N802
        assert (value, self.memory[address]) == (0, size)
        return (Result.OK,)

    def cuMemFree(self, address):  # noqa: N802
        del self.memory[address]
        return (Result.OK,)


@pytest.fixture
def driver(monkeypatch):
    fake, calls = FakeDriver(), []

    def call(target, platform, stream, operands, results, attributes):
        threads = int(attributes["block"].split()[0])
        if threads > 512:
            raise ValueError("too many")
        calls.append((target, platform, stream, operands, results))
        fake.now += threads

    monkeypatch.setattr(timing, "_bindings", lambda: fake)
    monkeypatch.setattr(launch, "add_code", lambda code: None)
    monkeypatch.setattr(timing._runtime, "call", call)
    fake.calls = calls
    return fake


def a_launch(threads, scratch=()):
    code = Code(b"code", "k", ("u64", "u64"))
    given = [Given((4,), F32, 0), Given((2,), F32, 0, is_result=True)]
    return Launch(code, given, (1, 1, 1), (threads, 1, 1), scratch=scratch)


def microseconds(*launches, operand=(4,)):
    specs = [Spec(operand, F32)], [Spec((2,), F32)]
    return timing.microseconds(Checker("op"), launches, *specs)


def test_times_each_launch(driver):
    times = microseconds(a_launch(256), a_launch(32), a_launch(64))
    assert times == pytest.approx([256000.0, 32000.0, 64000.0])
    target, platform, stream, operands, results = driver.calls[0]
    assert (target, platform, stream) == ("xla_ops.launch_kernel", "CUDA", 11)
    ((operand, dtype, shape),) = operands
    assert operand != 0 and dtype == 11 and shape == (4,)
    assert results[0][2] == (2,) and results[0][0] not in (0, operand)
    assert not driver.memory and driver.live == 0


def test_a_launch_that_cannot_be_is_left_out(driver):
    assert microseconds(a_launch(1024), a_launch(32))[0] is None
    assert not driver.memory and driver.live == 0


def test_scratch_is_there_while_a_launch_is_timed(driver):
    microseconds(a_launch(32, (Spec((640,), torch.uint8),)))
    (seen, scratch) = driver.calls[0][4]
    assert seen[2] == (2,) and scratch[2] == (640,) and scratch[0] != 0
    assert not driver.memory


def test_no_memory(driver):
    driver.room = 1000
    with pytest.raises(Problem, match="cannot be timed: OUT_OF_MEMORY: free memory"):
        microseconds(a_launch(32), operand=(1000,))
    assert not driver.memory and driver.live == 0


def test_no_bindings(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda", types.ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(Problem, match="cannot be timed without NVIDIA's bindings"):
        microseconds(a_launch(32))
