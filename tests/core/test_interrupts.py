"""Ctrl-C in the middle of a step: it ends after the step, and nothing is lost."""

import signal
import sys
import threading

import pytest
import torch
import torch_xla

import xla_ops
from support import addresses
from xla_ops.core import in_place
from xla_ops.core.interrupts import Uninterrupted
from xla_ops.programs.replay import replay


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def test_it_waits_for_the_end():
    done = []

    def work():
        with Uninterrupted():
            interrupt()
            done.append("went on")
            interrupt()  # twice is once
            done.append("to the end")
        done.append("not beyond")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["went on", "to the end"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


class Alarm(Exception):
    pass


@pytest.fixture
def handlers():
    """Has each signal raise an error of its own; returns those errors."""

    def handle(number, frame):
        raise Alarm(signal.Signals(number).name)

    names = ("SIGTERM", "SIGALRM", "SIGHUP", "SIGUSR1", "SIGUSR2")
    numbers = [getattr(signal, name) for name in names]
    before = [signal.signal(number, handle) for number in numbers]
    yield dict(zip(names, numbers, strict=True)), handle
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def test_any_signal_waits_for_the_end(handlers):
    numbers, handle = handlers
    for name, number in numbers.items():
        done = []

        def work(number=number, done=done):
            with Uninterrupted():
                signal.raise_signal(number)
                done.append("to the end")

        with pytest.raises(Alarm, match=name):
            work()
        assert done and all(signal.getsignal(n) is handle for n in numbers.values())


def test_each_signal_that_came_is_told(handlers):
    numbers, handle = handlers

    def work():
        with Uninterrupted():
            signal.raise_signal(numbers["SIGALRM"])
            interrupt()
            signal.raise_signal(numbers["SIGTERM"])

    with pytest.raises((Alarm, KeyboardInterrupt)) as raised:
        work()
    errors, error = set(), raised.value
    while error is not None:
        errors.add(str(error) or type(error).__name__)
        error = error.__context__
    assert errors == {"SIGALRM", "KeyboardInterrupt", "SIGTERM"}
    assert all(signal.getsignal(n) is handle for n in numbers.values())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_while_handlers_are_changed_leaves_them_as_they_were(handlers):
    """Before it is put off, and when it has been put back, it raises at once."""
    numbers, handle = handlers
    count = 0

    def profile(frame, event, function):
        # The module's own calls, at each of which a signal may come.
        nonlocal count
        if event == "c_call" and function.__name__ in ("signal", "getsignal"):
            count -= 1
            if not count:
                sys.setprofile(None)
                signal.raise_signal(numbers["SIGUSR1"])

    for number in range(1, 40):
        count, done = number, []
        sys.setprofile(profile)
        try:
            with Uninterrupted():
                done.append("begun")
                done.append("ended")
        except Alarm:
            pass
        finally:
            sys.setprofile(None)
        assert len(done) in (0, 2)
        assert all(signal.getsignal(n) is handle for n in numbers.values())
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_passes_and_the_handler_is_put_back():
    def work():
        with Uninterrupted():
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        work()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_one_within_another():
    done = []

    def inner():
        with Uninterrupted():
            interrupt()

    def outer():
        with Uninterrupted():
            inner()
            done.append("the outer one too")

    with pytest.raises(KeyboardInterrupt):
        outer()
    assert done == ["the outer one too"]


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL])
def test_handlers_that_are_not_pythons_stay(handler):
    before = signal.signal(signal.SIGINT, handler)
    try:
        with Uninterrupted():
            assert signal.getsignal(signal.SIGINT) is handler
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_have_nothing_to_wait_for():
    errors = []

    def work():
        try:
            with Uninterrupted():
                assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        except BaseException as error:  # noqa: BLE001 - told below
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors


@pytest.mark.parametrize("how", ["replay", "xla_ops"])
@pytest.mark.parametrize("where", ["after the program", "between two caches"])
def test_no_cache_is_lost(how, where, monkeypatch):
    device = torch_xla.device()
    caches = [torch.zeros(4, 2, 2, 8, device=device) for _ in range(4)]
    rows, slots = torch.ones(2, 2, 8).to(device), torch.tensor([0, 5]).to(device)

    def write(rows, slots, *caches):
        for key, value in zip(caches[::2], caches[1::2], strict=True):
            xla_ops.reshape_and_cache_flash(rows, 2 * rows, key, value, slots)
        return rows + 1

    step = replay(write) if how == "replay" else torch.compile(write, backend=how)
    adopt, calls = in_place.adopt, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == (1 if where == "after the program" else 3):
            interrupt()
        adopt(*args)

    with torch.no_grad():
        for _ in range(3):
            step(rows, slots, *caches)
        torch_xla.sync(wait=True)
        before = addresses(caches)
        if how == "replay":
            monkeypatch.setattr(in_place, "adopt", interrupted)
        else:
            profile_until_program_returns(where)
        try:
            with pytest.raises(KeyboardInterrupt):
                step(3 * rows, slots, *caches)
        finally:
            sys.setprofile(None)
        monkeypatch.undo()
        assert [c.sum().item() for c in caches] == [96, 192, 96, 192]
        step(rows, slots, *caches)
        assert [c.sum().item() for c in caches] == [32, 64, 32, 64]
    assert addresses(caches) == before


def profile_until_program_returns(where: str) -> None:
    """Interrupts when torch_xla's call returns, or a little later."""
    left = 0 if where == "after the program" else 8
    seen = False

    def profile(frame, event, function):
        nonlocal left, seen
        seen |= event == "c_return" and function.__name__ == "_run_cached_graph"
        if seen and event == "c_return":
            left -= 1
            if left < 0:
                sys.setprofile(None)
                interrupt()

    sys.setprofile(profile)
