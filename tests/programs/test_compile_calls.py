"""programs.replay.compile_calls: programs that are compiled beside each other."""

import itertools
import threading

import pytest
import torch
import torch_xla
import torch_xla.debug.metrics as met

import xla_ops
from support import addresses
from xla_ops.programs import calls
from xla_ops.programs.replay import compile_calls, replay

_numbers = itertools.count(1)


def xla(*values) -> torch.Tensor:
    tensor = torch.tensor(values, dtype=torch.float32).to(torch_xla.device())
    torch_xla.sync(wait=True)
    return tensor


def compiled() -> int:
    return met.counter_value("UncachedCompile") or 0


class Watched:
    """torch_xla's module, with something done before a graph is compiled."""

    def __init__(self, module, before):
        self._module, self._before = module, before

    def __getattr__(self, name):
        return getattr(self._module, name)

    def _xla_warm_up_cache(self, *args):
        self._before()
        return self._module._xla_warm_up_cache(*args)


@pytest.fixture
def before_compiling(monkeypatch):
    def watch(before):
        monkeypatch.setattr(calls, "_xlac", Watched(torch_xla._XLAC, before))

    return watch


def several(count):
    """Functions of one argument, of graphs that no other test has, and their traces."""
    traces = []
    first = next(_numbers)

    def make(i):
        def f(x):
            traces.append(i)
            return chain(x, first, i)

        return replay(f)

    return [make(i) for i in range(count)], traces, first


def chain(x, first, i):
    # Lengths, not factors: torch_xla takes numbers as inputs.
    for _ in range(first):
        x = x.cos()
    for _ in range(i):
        x = x.sin()
    return x.cumsum(0), x


def check(functions, first, values):
    x = torch.tensor(values, dtype=torch.float32)
    for i, f in enumerate(functions):
        result = [t.cpu() for t in f(xla(*values))]
        torch.testing.assert_close(result, list(chain(x, first, i)))


def test_calls_find_what_was_compiled():
    functions, traces, first = several(4)
    x = xla(1, 2, 3)
    compile_calls([(f, (x,)) for f in functions])
    assert traces == [0, 1, 2, 3]
    before = compiled()
    check(functions, first, (4, 5, 6))
    assert compiled() == before
    assert traces == [0, 1, 2, 3]
    assert x.tolist() == [1, 2, 3]


def test_they_are_compiled_at_the_same_time(before_compiling):
    functions, _, first = several(3)
    meeting = threading.Barrier(3)
    before_compiling(lambda: meeting.wait(60))
    compile_calls([(f, (xla(1, 2, 3),)) for f in functions])
    before_compiling(lambda: None)
    check(functions, first, (7, 8, 9))


def test_a_call_given_twice_is_traced_once():
    (f,), traces, first = several(1)
    compile_calls((f, (xla(i, i),)) for i in range(3))
    assert f.num_programs == 1
    compile_calls([(f, (xla(1, 2),)), (f, (xla(1, 2, 3),))])
    assert f.num_programs == 2
    assert traces == [0, 0]
    check([f], first, (3, 4))


def test_functions_of_one_graph_share_a_program():
    def make():
        return replay(lambda x: x.cos() * 5 + x)

    functions = [make() for _ in range(3)]
    before = compiled()
    compile_calls([(f, (xla(1, 2, 3, 4, 5),)) for f in functions])
    assert compiled() == before + 1
    for f in functions:
        x = torch.randn(5)
        torch.testing.assert_close(f(x.to("xla")).cpu(), x.cos() * 5 + x)


def test_graphs_that_torch_xla_takes_for_one_stay_apart():
    """As in test_replay.py (pytorch/xla#8353)."""
    functions = [
        lambda a, b, c: (a.T, b.T, c.T, a * b + c),
        lambda a, b, c: (a.T, b.T, c.T, a * c + b),
    ]
    args = [torch.randn(13, 13) for _ in range(3)]
    given = [a.to(torch_xla.device()) for a in args]
    hashes = {torch_xla._XLAC._get_graph_hash(list(f(*given))) for f in functions}
    assert len(hashes) == 1
    replayed = [replay(f) for f in functions]
    compile_calls([(f, given) for f in replayed])
    for f, wanted in zip(replayed, functions, strict=True):
        torch.testing.assert_close(f(*given)[-1].cpu(), wanted(*args)[-1])


def test_one_that_updates_an_argument_updates_nothing_yet():
    functions, _, first = several(2)

    @replay
    def write(cache, rows):
        xla_ops.copy_blocks([cache], [cache * 1], rows)
        cache.add_(1)
        return cache.sum()

    key = torch.arange(8.0).reshape(4, 1, 1, 2)
    cache = key.to(torch_xla.device()) * 1
    rows = torch.tensor([[0, 2]]).to(torch_xla.device())
    torch_xla.sync(wait=True)
    held = addresses([cache])
    x = xla(1, 2, 3)
    compile_calls([(functions[0], (x,)), (write, (cache, rows)), (functions[1], (x,))])
    torch.testing.assert_close(cache.cpu(), key)
    before = compiled()
    expected = key.clone()
    expected[2] = expected[0]
    torch.testing.assert_close(write(cache, rows).cpu(), (expected + 1).sum())
    torch.testing.assert_close(cache.cpu(), expected + 1)
    check(functions, first, (1, 2, 3))
    assert compiled() == before
    assert addresses([cache]) == held


def writers(count):
    """Calls that write one cache, and what each does to a copy on the host."""
    key = torch.arange(16.0).reshape(8, 1, 1, 2)
    cache = key.to(torch_xla.device()) * 1
    torch_xla.sync(wait=True)

    @replay
    def write(cache, rows, scale):
        xla_ops.copy_blocks([cache], [cache * scale], rows)
        cache.add_(len(rows))
        return cache.sum(), cache[0] * scale

    def written(key, rows, scale):
        key = key.clone()
        for source, target in rows:
            key[target] = key[source]
        key += len(rows)
        return key, key.sum(), key[0] * scale

    rows = [[(0, i + 1) for i in range(n + 1)] for n in range(count)]
    calls = [
        (write, (cache, torch.tensor(pairs).to("xla"), 3 + next(_numbers)))
        for pairs in rows
    ]
    return calls, cache, key, rows, written


def check_writers(calls, cache, key, rows, written):
    before, held = compiled(), addresses([cache])
    for (write, args), pairs in zip(calls, rows, strict=True):
        total, first = write(*args)
        key, *wanted = written(key, pairs, args[-1])
        torch.testing.assert_close([total.cpu(), first.cpu()], wanted)
        torch.testing.assert_close(cache.cpu(), key)
    assert compiled() == before
    assert addresses([cache]) == held


def test_those_that_update_one_cache_are_compiled_at_the_same_time(before_compiling):
    calls, cache, key, *rest = writers(3)
    meeting = threading.Barrier(3)
    before_compiling(lambda: meeting.wait(60))
    held, told = addresses([cache]), []
    compile_calls(calls, lambda: told.append(threading.current_thread()))
    before_compiling(lambda: None)
    assert told == [threading.main_thread()] * 3
    assert addresses([cache]) == held
    torch.testing.assert_close(cache.cpu(), key)
    check_writers(calls, cache, key, *rest)


def test_of_several_caches_none_is_written_by_the_program_of_another(before_compiling):
    """A buffer that one program overwrites and another reads."""
    groups = [writers(2) for _ in range(2)]
    other = groups[0][1]

    @replay
    def read(cache, other):
        xla_ops.copy_blocks([cache], [cache * 1], torch.tensor([[0, 1]]).to("xla"))
        return other * 7 + cache.sum()

    calls = [call for calls, *_ in groups for call in calls]
    compile_calls([calls[0], (read, (groups[1][1], other)), *calls[1:]])
    held = addresses([other])
    wanted = other.cpu() * 7
    one = groups[1][1].cpu()
    one[1] = one[0]
    torch.testing.assert_close(
        read(groups[1][1], other).cpu(), wanted + one.sum(), rtol=1e-6, atol=1e-6
    )
    assert addresses([other]) == held
    check_writers(*groups[0])
    (calls, cache, _, rows, written) = groups[1]
    check_writers(calls, cache, one, rows, written)


def computing_once():
    """Computes all that is pending, at the first call."""
    once = threading.Event()

    def disturb():
        if not once.is_set():
            once.set()
            torch_xla.sync(wait=True)

    return disturb


def test_one_that_updates_is_traced_again_if_somebody_computes_it(before_compiling):
    calls, cache, key, *rest = writers(3)
    before_compiling(computing_once())
    compile_calls(calls)
    before_compiling(lambda: None)
    torch.testing.assert_close(cache.cpu(), key)
    check_writers(calls, cache, key, *rest)


def test_a_graph_that_somebody_computes_is_traced_again(before_compiling):
    functions, traces, first = several(3)
    before_compiling(computing_once())
    compile_calls([(f, (xla(1, 2, 3),)) for f in functions])
    before_compiling(lambda: None)
    assert len(traces) > 3
    check(functions, first, (3, 2, 1))


def test_an_error_leaves_arguments_and_the_others_as_they_were():
    functions, _, first = several(2)
    x = xla(1, 2, 3)

    @replay
    def wrong(x):
        x.mul_(3)
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        compile_calls([(functions[0], (x,)), (wrong, (x,)), (functions[1], (x,))])
    assert x.tolist() == [1, 2, 3]
    assert wrong.num_programs == functions[0].num_programs == 0
    with pytest.raises(TypeError, match="hash"):
        compile_calls([(functions[0], (x,)), (functions[1], ({1: {2}},))])
    compile_calls([(f, (x,)) for f in functions])
    check(functions, first, (1, 2, 3))


def test_none_are_no_work():
    compile_calls([])
    f = replay(lambda x: x)
    compile_calls([(f, (xla(1),))])
    assert f(xla(2)).tolist() == [2]
