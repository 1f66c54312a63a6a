"""programs.replay where several threads are at work."""

import _thread
import sys
import threading
import time
from concurrent import futures

import pytest
import torch
import torch_xla

import xla_ops
from xla_ops.core import interrupts, ownership
from xla_ops.programs import reachable
from xla_ops.programs.replay import replay


def device():
    return torch_xla.device()


def ready(*values: float) -> torch.Tensor:
    t = torch.tensor(values).to(device())
    torch_xla.sync(wait=True)
    return t


def run_threads(*functions):
    """Runs each in a thread, all at once and changing often; raises what one raised."""
    start = threading.Barrier(len(functions))

    def run(f):
        with torch.no_grad():
            start.wait(60)
            f()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with futures.ThreadPoolExecutor(len(functions)) as pool:
            for running in [pool.submit(run, f) for f in functions]:
                running.result(300)
    finally:
        sys.setswitchinterval(interval)


@pytest.fixture
def other():
    """Another thread: other(f) runs f there and returns what it gives."""
    asked, done, calls, results = threading.Event(), threading.Event(), [], []

    def serve():
        while asked.wait() and calls[-1] is not None:
            asked.clear()
            with torch.no_grad():
                results.append(calls[-1]())
            done.set()

    def ask(f):
        done.clear()
        calls.append(f)
        asked.set()
        assert done.wait(60)
        return results[-1]

    thread = threading.Thread(target=serve)
    thread.start()
    yield ask
    calls.append(None)
    asked.set()
    thread.join(60)


def test_one_thread_traces():
    """Several times, it may be, if the others are at work meanwhile."""
    tracers = []

    @replay
    def step(x):
        tracers.append(threading.get_ident())
        time.sleep(0.2)  # the others arrive
        return (x * 3).exp()

    def work(i):
        x = torch.full((2,), float(i))
        torch.testing.assert_close(step(x.to(device())).cpu(), (x * 3).exp())

    run_threads(*(lambda i=i: work(i) for i in range(4)))
    assert len(set(tracers)) == 1


@pytest.mark.parametrize("_", range(3))
def test_one_program_and_one_cache(_):
    """No row is lost: torch_xla itself takes what a thread brings for zeros."""
    cache = torch.zeros(2, 8, 4, 1, 8, device=device())
    torch_xla.sync(wait=True)

    tracers = []

    @replay(state=[cache])
    def step(key, slots):
        tracers.append(threading.get_ident())
        xla_ops.reshape_and_cache_flash(key, key * 2, *cache.unbind(0), slots)
        return cache[0].reshape(32, 8).index_select(0, slots)

    keys = torch.randn(4, 60, 1, 1, 8)

    def work(i):
        for n in range(60):
            slots = torch.tensor([i * 8 + n % 8]).to(device())
            row = step(keys[i, n].to(device()), slots).cpu()
            assert torch.equal(row, keys[i, n, 0])

    run_threads(*(lambda i=i: work(i) for i in range(4)))
    last = [keys[i, 56 - 8 * (s > 3) + s, 0, 0] for i in range(4) for s in range(8)]
    assert torch.equal(cache[0].reshape(32, 8).cpu(), torch.stack(last))
    assert len(set(tracers)) == 1


def test_functions_that_are_traced_beside_calls():
    shared = replay(lambda x: (x * 3, x.exp()))

    def work(i):
        for n in range(10):
            x = torch.randn(2 + i)

            @replay
            def step(x, total, n=n):
                total.add_(x.sum())
                return (x * n).cos() + x

            total = torch.zeros(1).to(device())
            for times in (1, 2):
                got = step(x.to(device()), total).cpu()
                torch.testing.assert_close(got, (x * n).cos() + x)
                torch.testing.assert_close(total.cpu(), times * x.sum()[None])
            torch.testing.assert_close(shared(x.to(device()))[0].cpu(), x * 3)

    run_threads(*(lambda i=i: work(i) for i in range(3)))


def test_pending_arguments_in_threads():
    step = replay(lambda x: x.add_(1) * 2)

    def work(i):
        for n in range(40):
            x = torch.full((3,), float(n)).to(device())
            y = x * 10 + i
            read = y.sum()
            assert step(y).tolist() == [(10 * n + i + 1) * 2] * 3
            assert y.tolist() == [10 * n + i + 1] * 3
            assert read.item() == 3 * (10 * n + i)

    run_threads(*(lambda i=i: work(i) for i in range(3)))


def test_a_read_by_another_thread_is_none_of_the_function(other):
    x, token = ready(1, 2), ready(7)
    traces = []

    @replay
    def step(x):
        traces.append(0)
        y = x * 2
        assert other(lambda: token.cpu().item()) == 7
        return y + 1

    assert step(x).tolist() == step(x).tolist() == [3, 5]
    assert len(traces) == 2  # the second one by operations


@pytest.mark.parametrize(
    "f",
    [
        lambda x: x * x[0].item(),
        lambda x: x[x > 1],
        lambda x: x * x.cpu().sum().item(),
        lambda x: x.view(torch.int32),
    ],
)
def test_a_read_of_the_function_is_found_beside_other_threads(other, f):
    step = replay(f)
    message = "replay: the function must not read a tensor's value on the host"
    with pytest.raises(RuntimeError, match=message):
        step(ready(1, 2))


@pytest.mark.parametrize("when", ["first", "always"])
def test_another_thread_that_computes_a_part_of_a_trace(other, when):
    """It was a constant of the program."""
    traces = []

    @replay
    def step(x):
        y = x * 2
        if when == "always" or not traces:
            other(lambda: torch_xla.sync(wait=True))
        traces.append(0)
        return y + 1

    if when == "always":
        with pytest.raises(RuntimeError, match="while no other thread runs lazy graph"):
            step(ready(1))
        return
    assert [step(ready(x)).item() for x in (1, 5, 7)] == [3, 11, 15]
    assert len(traces) == 2


class Model:
    def __init__(self, noise):
        self.held = {"noise": [noise]}

    def step(self, x):
        return x + self.held["noise"][0]


def test_pending_tensors_that_a_function_closes_over(other):
    """They would be random numbers anew in each call."""
    noise, state = torch.randn(3, device=device()), torch.randn(3, device=device())
    model = Model(torch.randn(3, device=device()))

    def inner(x):
        return x + noise

    step = replay(lambda x: (inner(x), model.step(x), x + state), state=[state])
    first, second = step(ready(0, 0, 0)), step(ready(0, 0, 0))
    wanted = [noise, model.held["noise"][0], state]
    for a, b, w in zip(first, second, wanted, strict=True):
        assert a.tolist() == b.tolist() == w.tolist()


@pytest.mark.parametrize(
    "module, may", [("tqdm._monitor", True), ("tqdm", False), (__name__, False)]
)
def test_threads_that_draw_leave_tensors_alone(module, may):
    stop = threading.Event()

    def wait():
        stop.wait(60)

    wait.__module__ = module
    thread = threading.Thread(target=wait, daemon=True)
    before = ownership.may_compute_all()
    thread.start()
    try:
        assert ownership.may_compute_all() == (before and may)
        assert before
    finally:
        stop.set()
        thread.join()


def test_a_thread_that_torch_made_counts_for_nothing_once_it_ended():
    ended = _thread.allocate_lock()
    ended.acquire()

    def work():
        with interrupts.Uninterrupted():
            pass
        ended.release()

    _thread.start_new_thread(work, ())
    assert ended.acquire(timeout=60)
    assert ownership.may_compute_all()


def test_a_read_by_a_thread_that_ends_in_the_trace_is_not_the_function_s():
    value, x = ready(1.0), ready(2.0)
    reader = threading.Thread(target=lambda: stop.wait(60) and value.cpu())
    stop = threading.Event()
    reader.start()

    @replay
    def f(x):
        if reader.is_alive():
            stop.set()
            reader.join()
        return x + 1

    assert f(x).item() == 3
    assert f(x).item() == 3


def test_a_function_that_syncs_is_refused_at_once():
    traces = []

    @replay
    def f(x):
        traces.append(1)
        y = x * 2
        torch_xla.sync()
        return y + 1

    with pytest.raises(RuntimeError, match="replay: the function must not run lazy"):
        f(ready(1.0))
    assert len(traces) == 1


NAMED: list[torch.Tensor] = []


class Table(dict):
    def values(self):
        raise AssertionError


def test_tensors_that_a_function_names_are_found():
    tensors = [torch.ones(1, device=device()) for _ in range(3)]
    NAMED[:] = [tensors[0]]
    table = Table(key=tensors[2])

    def inner(x, *, other=tensors[1]):
        return (lambda y: y + NAMED[0])(x) + other + len(table)

    found = {id(t) for t in reachable.tensors(inner)}
    assert found == {id(t) for t in tensors}
