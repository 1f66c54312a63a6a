"""programs.feed: inputs and results through memory that host and device see.

Runs on a GPU too: PJRT_DEVICE=GPU pytest tests/programs/test_feed.py, from the wheel.
"""

import threading
import time

import numpy as np
import pytest
import torch
import torch_xla
import torch_xla.runtime as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from xla_ops.programs import feed as feed_module
from xla_ops.programs.feed import HostFeed
from xla_ops.programs.replay import compile_calls, replay

SIZES = (1, 7, 40, 100)
CPU_ONLY = pytest.mark.skipif(
    xr.device_type() != "CPU", reason="on a GPU it is a fault, which ends the client"
)
RESULTS = 5


class Steps:
    """Programs of several sizes on one feed, and what they have to return."""

    def __init__(self, slots=4):
        self.feed = HostFeed(max(SIZES), RESULTS, slots)
        self.total = torch.zeros(1, dtype=torch.int32, device="xla")
        self.wanted_total = 0
        torch_xla.sync(wait=True)

        @replay
        def run(number, total, size):
            data, following = self.feed.receive(number, size)
            total.add_(data.sum(dtype=torch.int32))
            first = torch.nn.functional.pad(data[:RESULTS], (0, max(RESULTS - size, 0)))
            sent = self.feed.send(first + 1, number)
            late = self.feed.send(first * 2, following - 1, 1)
            return following, sent, late

        self.program = run

    def launch(self, values: np.ndarray):
        self.feed.begin(len(values))[:] = values
        following, sent, late = self.program(
            self.feed.number(), self.total, len(values)
        )
        self.wanted_total += int(values.sum())
        return self.feed.end(following), values, sent, late

    def check(self, fed, values, sent, late):
        first = np.zeros(RESULTS, np.int32)
        first[: len(values)] = values[:RESULTS]
        assert fed.result(RESULTS).tolist() == (first + 1).tolist()
        assert fed.result(3, channel=1).tolist() == (first * 2)[:3].tolist()
        assert sent.tolist() == (first + 1).tolist()
        assert late.tolist() == (first * 2).tolist()


@pytest.fixture(scope="module")
def steps():
    return Steps()


inputs = st.sampled_from(SIZES).flatmap(
    lambda size: st.integers(0, 2**32 - 1).map(
        lambda seed: np.random.default_rng(seed).integers(-999, 999, size, np.int32)
    )
)


@settings(max_examples=40, deadline=None)
@given(st.lists(inputs, min_size=1, max_size=12), st.integers(0, 3))
def test_results_are_of_their_steps(steps, given_inputs, behind):
    """With up to three further steps under way when one's result is read."""
    under_way = []
    for values in given_inputs:
        under_way.append(steps.launch(values))
        if len(under_way) > behind:
            steps.check(*under_way.pop(0))
    for step in under_way:
        steps.check(*step)
    assert steps.total.item() == steps.wanted_total


@pytest.mark.parametrize("first", [2**31 - 3, 2**32 - 3])
def test_numbers_begin_anew(first):
    steps = Steps()
    steps.feed._step = first
    for i in range(10):
        steps.check(*steps.launch(np.full(7, i, np.int32)))


def test_an_overwritten_result_is_none_at_once(steps):
    old = steps.launch(np.arange(7, dtype=np.int32))
    for _ in range(4):
        last = steps.launch(np.ones(7, np.int32))
    steps.check(*last)
    start = time.monotonic()
    assert old[0].result(RESULTS) is None
    assert time.monotonic() - start < 0.5
    assert old[2].tolist() == [1, 2, 3, 4, 5]


def test_a_result_is_none_once_it_may_be_overwritten():
    """Not when it has been: a reader would see some of both."""
    steps = Steps(slots=1)
    fed, *_ = steps.launch(np.ones(7, np.int32))
    assert fed.result(3).tolist() == [2, 2, 2]
    steps.feed.begin(7)
    assert fed.result(3).tolist() == [2, 2, 2]
    steps.feed.number()  # its program may be launched now
    assert fed.result(3) is None


def test_a_number_for_a_compilation_is_no_step(monkeypatch):
    """The slot may be that of a step that has not read its input."""
    steps = Steps(slots=1)
    steps.feed.begin(7)[:] = 1
    number = steps.feed.number()
    following, *_ = steps.program(number, steps.total, 7)
    fed = steps.feed.end(following)
    marked = steps.feed._fed.copy()
    steps.feed.number()
    assert (steps.feed._fed == marked).all()
    assert fed.result(3).tolist() == [2, 2, 2]


@CPU_ONLY
def test_steps_go_on_after_one_whose_program_failed(monkeypatch):
    """Those that took its number fail with it: as many as there are slots."""
    monkeypatch.setattr(feed_module, "_PATIENCE_US", 100_000)
    steps = Steps()
    steps.check(*steps.launch(np.ones(7, np.int32)))
    steps.feed.begin(7)[:] = 1
    number = steps.feed.number()
    steps.feed._fed[steps.feed._step % 4] = -7
    following, *_ = steps.program(number, steps.total, 7)
    steps.feed.end(following)
    failed = 0
    for _ in range(8):
        try:
            steps.total = torch.zeros(1, dtype=torch.int32, device="xla")
            torch_xla.sync(wait=True)
            launched = steps.launch(np.full(7, 3, np.int32))
            launched[2].cpu()
        except RuntimeError:
            failed += 1
            continue
        steps.check(*launched)
    assert 1 <= failed <= 5


def test_a_result_that_does_not_come_is_none(steps, monkeypatch):
    monkeypatch.setattr(feed_module, "_PATIENCE_US", 1000)
    fed, *_ = steps.launch(np.ones(7, np.int32))
    fed._step += 1  # which has not begun
    assert fed.result(RESULTS) is None


def test_a_slot_is_taken_only_when_its_step_has_ended(steps, monkeypatch):
    asked = []
    is_there = HostFeed._is_there

    def watched(self, step, channel, timeout_us):
        asked.append((step, channel))
        return is_there(self, step, channel, timeout_us)

    steps.check(*steps.launch(np.ones(7, np.int32)))
    monkeypatch.setattr(HostFeed, "_is_there", watched)
    steps.launch(np.ones(7, np.int32))
    assert asked[0] == (steps.feed._step - 1 - 4, 0)


def test_a_step_that_was_never_launched_costs_its_number(steps, monkeypatch):
    monkeypatch.setattr(feed_module, "_PATIENCE_US", 1000)
    for _ in range(6):
        steps.check(*steps.launch(np.ones(40, np.int32)))
        steps.feed.begin(40)[:] = 8
        steps.feed.number()
        # As where the call raised.
        steps.check(*steps.launch(np.ones(7, np.int32) * 3))


def test_a_step_that_failed_after_its_launch(steps):
    steps.feed.begin(7)[:] = 1
    steps.program(steps.feed.number(), steps.total, 7)  # and then, say, an interrupt
    steps.wanted_total += 7
    steps.check(*steps.launch(np.full(7, 9, np.int32)))
    assert steps.total.item() == steps.wanted_total


@CPU_ONLY
def test_a_step_that_was_not_fed_is_an_error():
    steps = Steps()
    number = torch.tensor([3], dtype=torch.int32).to("xla")
    message = "step must be one that the host has fed"
    with pytest.raises(RuntimeError, match=message):
        steps.program(number, steps.total, 7)[0].cpu()


def test_any_thread_may_read(steps):
    """While another launches: nobody waits for the client."""
    launched = [steps.launch(np.full(7, i, np.int32)) for i in range(3)]
    read = {}

    def fetch(i):
        read[i] = launched[i][0].result(RESULTS).tolist()

    threads = [threading.Thread(target=fetch, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read == {i: [i + 1] * 5 for i in range(3)}


def test_programs_are_compiled_before_anything_is_fed():
    steps = Steps()
    number = steps.feed.number()
    compile_calls([(steps.program, (number, steps.total, size)) for size in SIZES])
    for size in SIZES:
        steps.check(*steps.launch(np.arange(size, dtype=np.int32)))


def test_sizes_are_checked():
    with pytest.raises(ValueError, match="slots must be a power of two"):
        HostFeed(10, 10, slots=3)
    with pytest.raises(ValueError, match="in_elements must be"):
        HostFeed(0, 10)
    feed = HostFeed(10, 2)
    number = feed.number()
    message = "host_infeed: elements must be 1 to 10, got 11"
    with pytest.raises(ValueError, match=message):
        feed.receive(number, 11)
    with pytest.raises(ValueError, match=message):
        feed.begin(11)
    with pytest.raises(ValueError, match="host_outfeed: values must be 1 to 2, got 3"):
        feed.send(torch.zeros(3, dtype=torch.int32, device="xla"), number)
    with pytest.raises(ValueError, match="host_outfeed: channel must be 0 or 1, got 2"):
        feed.send(number, number, 2)
