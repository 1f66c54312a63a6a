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


def test_a_graph_that_somebody_computes_is_traced_again(before_compiling):
    functions, traces, first = several(3)
    once = threading.Event()

    def disturb():
        if not once.is_set():
            once.set()
            torch_xla.sync(wait=True)

    before_compiling(disturb)
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
