"""programs.replay: programs that are traced once and called by their hash."""

import os
import subprocess
import sys

import pytest
import torch
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.debug.metrics as met
from hypothesis import given, settings
from hypothesis import strategies as st

import xla_ops
from support import addresses
from xla_ops.core import in_place
from xla_ops.programs.replay import replay


def xla(*values, dtype=torch.float32) -> torch.Tensor:
    tensor = torch.tensor(values, dtype=dtype).to(torch_xla.device())
    torch_xla.sync(wait=True)
    return tensor


def counted(function):
    """A replayed function, and the list of its traces."""
    traces = []

    def f(*args, **kwargs):
        traces.append(args)
        return function(*args, **kwargs)

    return replay(f), traces


def test_python_runs_once_a_signature():
    f, traces = counted(lambda x, y: x * y + 1)
    for i in range(4):
        assert f(xla(1, 2), xla(i, 3)).tolist() == [i + 1, 7]
    assert len(traces) == f.num_programs == 1
    assert f(xla(1), xla(2)).tolist() == [3]
    assert f(xla(1, dtype=torch.int32), xla(2, dtype=torch.int32)).tolist() == [3]
    assert len(traces) == f.num_programs == 3


def test_a_further_call_compiles_nothing():
    f = replay(lambda x: x.sin() @ x)
    x = torch.randn(5, 5)
    f(x.to(torch_xla.device()))
    before = met.counter_value("UncachedCompile")
    for _ in range(3):
        x = torch.randn(5, 5)
        result = f(x.to(torch_xla.device())).cpu()
        torch.testing.assert_close(result, x.sin() @ x)
    assert met.counter_value("UncachedCompile") == before


def test_values_are_part_of_the_signature():
    f, traces = counted(lambda x, factor, name="a": (x * factor, name))
    assert f(xla(1, 2), 3)[0].tolist() == [3, 6]
    assert f(xla(1, 2), 4)[0].tolist() == [4, 8]
    assert f(xla(1, 2), 4.0)[0].tolist() == [4, 8]
    assert f(xla(1, 2), True)[0].tolist() == [1, 2]
    assert f(xla(1, 2), 1)[0].tolist() == [1, 2]
    result, name = f(xla(1, 2), 4, name="b")
    assert (result.tolist(), name) == ([4, 8], "b")
    assert len(traces) == 6


def test_trees_go_in_and_come_out():
    f = replay(
        lambda tree: {"sum": tree["a"] + tree["b"][0], "rest": (tree["b"][1], 5)}
    )
    for i in range(3):
        x = xla(9)
        result = f({"a": xla(1), "b": [xla(i), x]})
        assert result["sum"].tolist() == [1 + i]
        assert result["rest"][0] is x
        assert result["rest"][1] == 5


def test_one_tensor_given_twice_is_another_program():
    f, traces = counted(lambda x, y: x - 2 * y)
    x = xla(3)
    assert f(x, x).tolist() == [-3]
    assert f(x, xla(1)).tolist() == [1]
    assert f(x, x).tolist() == [-3]
    assert len(traces) == 2


def test_tensors_that_share_a_buffer_are_two_inputs():
    f = replay(lambda x, y: x - 2 * y)
    x = xla(3)
    y = x.clone()
    torch_xla.sync(wait=True)
    assert f(x, y).tolist() == [-3]
    assert f(x, xla(1)).tolist() == [1]
    assert f(xla(1), y).tolist() == [-5]


def test_pending_arguments():
    f = replay(lambda x: x + 1)
    for i in range(3):
        assert f(xla(i) * 2).tolist() == [2 * i + 1]


def test_a_read_that_waits_beside_an_argument():
    def add(t):
        t.add_(1)
        return t * 2

    f, x = replay(add), xla(1, 2)
    f(xla(0, 0))
    read = x.sum() + 0
    x.mul_(10)  # in the same lazy graph, which gives the old buffer away
    assert f(x).tolist() == [22, 42]
    torch_xla.sync()
    assert (read.item(), x.tolist()) == (3, [11, 21])


def test_a_view_of_another_argument_is_another_program():
    f, traces = counted(lambda x, y: x * 10 + y)
    base = xla(1, 2, 3)
    assert f(xla(1, 2), xla(3, 4)).tolist() == [13, 24]
    assert f(base[:2], base[1:]).tolist() == [12, 23]
    assert f(base[1:], base[:2]).tolist() == [21, 32]
    assert len(traces) == 2


@pytest.mark.parametrize("way", [lambda t: t[:], torch.detach, lambda t: t.data[:]])
@pytest.mark.parametrize("op", ["aten", "ours"])
def test_an_update_that_would_show_in_another_argument_is_refused(way, op):
    """Also where the program is there already, of tensors apart."""

    def f(cache, other, mapping):
        if op == "aten":
            cache.add_(1)
        else:
            xla_ops.swap_blocks(cache, cache, mapping)
        return other.sum()

    f, mapping = replay(f), xla([0, 1], dtype=torch.int64)
    f(xla(1, 2), xla(3, 4), mapping)
    cache = xla(5, 6)
    message = (
        "replay: tensor argument 1 must not share memory with tensor argument 0, which"
        " the function updates, got a view of it"
    )
    with pytest.raises(ValueError, match=message):
        f(cache, way(cache), mapping)
    torch_xla.sync()
    assert cache.tolist() == [5, 6]
    held = replay(lambda x: x.add_(1), state=[cache])
    held(xla(1, 2))
    with pytest.raises(ValueError, match="tensor 0 of the state must not share memory"):
        held(way(cache))


def test_an_argument_that_is_in_the_state_is_another_program():
    a, b = xla(1), xla(2)
    f = replay(lambda t: t * 10 + a, state=[a, b])
    assert [f(t).item() for t in (a, xla(3), b, a)] == [11, 31, 21, 11]


def test_zeros_of_either_sign_are_two_signatures():
    f = replay(lambda x, factor: x * factor)
    results = [f(xla(1.0), zero) for zero in (0.0, -0.0)]
    assert [torch.signbit(r.cpu()).item() for r in results] == [False, True]


def test_a_result_that_is_an_argument():
    def f(x):
        return x, x.clone(), x.detach(), x + 0

    f = replay(f)
    for i in range(3):
        x = xla(i)
        same, clone, detached, sum_ = f(x)
        assert same is x
        clone.add_(1)
        sum_.add_(2)
        assert [x.item(), clone.item(), sum_.item()] == [i, i + 1, i + 2]
        assert detached.item() == i


def test_a_result_that_comes_twice():
    def f(x):
        y = x + 1
        return y, y, y.view(1, -1)

    f = replay(f)
    for i in range(2):
        assert [r.tolist() for r in f(xla(i))] == [[i + 1], [i + 1], [[i + 1]]]


def test_a_function_of_nothing_new():
    constant = xla(5)
    f = replay(lambda x: constant)
    assert f(xla(1)).item() == f(xla(2)).item() == 5


def test_updates_by_aten():
    def f(x, y):
        x.add_(y)
        y.mul_(2)
        return x * 10

    f = replay(f)
    x, y = xla(1, 2), xla(1, 1)
    row = x[1]
    for i in range(1, 4):
        result = f(x, y)
        assert x.tolist() == [2**i, 2**i + 1]
        assert y.tolist() == [2**i] * 2
        assert row.item() == 2**i + 1
        assert result.tolist() == [2**i * 10, (2**i + 1) * 10]


def cache_step():
    caches = [torch.zeros(2, 4, 2, 1, 8, device=torch_xla.device()) for _ in range(3)]
    torch_xla.sync(wait=True)

    def step(key, slots, *caches):
        for i, cache in enumerate(caches):
            k, v = cache.unbind(0)
            xla_ops.reshape_and_cache_flash(key + i, key * 2, k, v, slots)
        return sum(cache.sum() for cache in caches)

    return caches, step


@pytest.mark.parametrize("way", ["argument", "state"])
def test_caches_keep_their_buffers(way):
    caches, step = cache_step()
    if way == "argument":
        f = replay(step)
        call = lambda key, slots: f(key, slots, *caches)  # noqa: E731
    else:
        call = replay(lambda key, slots: step(key, slots, *caches), state=caches)
    before = addresses(caches)
    expected = [torch.zeros(2, 8, 8) for _ in caches]
    for i in range(5):
        key, slot = torch.randn(1, 1, 8), i
        total = call(
            key.to(torch_xla.device()), torch.tensor([slot]).to(torch_xla.device())
        )
        for j, cache in enumerate(expected):
            cache[0, slot] = key[0, 0] + j
            cache[1, slot] = key[0, 0] * 2
        torch.testing.assert_close(total.cpu(), sum(c.sum() for c in expected))
        assert addresses(caches) == before
    for cache, wanted in zip(caches, expected, strict=True):
        torch.testing.assert_close(cache.cpu().view(2, 8, 8), wanted)


def test_values_of_any_op_may_overwrite_a_buffer():
    buffers = [torch.zeros(3, 4, device=torch_xla.device()) for _ in range(3)]
    torch_xla.sync(wait=True)
    before = addresses(buffers)

    def write(rows, place):
        every = torch.arange(3, dtype=torch.int32, device=rows.device)
        for i, buffer in enumerate(buffers):
            is_place = (every == place).unsqueeze(-1)
            in_place.overwrite(buffer, torch.where(is_place, rows[i], buffer))

    write = replay(write, state=buffers)
    read = replay(lambda: tuple(buffer * 2 for buffer in buffers), state=buffers)
    expected = torch.zeros(3, 3, 4)
    for place in (2, 0, 2):
        rows = torch.randn(3, 4)
        expected[:, place] = rows
        place = torch.tensor([place], dtype=torch.int32).to(torch_xla.device())
        write(rows.to(torch_xla.device()), place)
        for got, wanted in zip(read(), expected, strict=True):
            torch.testing.assert_close(got.cpu(), wanted * 2)
        assert addresses(buffers) == before


def test_a_step_takes_nothing_from_who_shares_the_cache():
    (cache, *_), step = cache_step()
    f = replay(step)
    slots = torch.tensor([0]).to(torch_xla.device())
    key = torch.ones(1, 1, 8).to(torch_xla.device())
    f(key, slots, cache)
    template = cache.clone()
    torch_xla.sync(wait=True)
    pending = cache.sum()
    wanted = template.cpu()
    f(key * 5, slots, cache)
    assert torch.equal(template.cpu(), wanted)
    assert pending.item() == wanted.sum()
    assert cache.cpu()[0, 0, 0, 0, 0] == 5


def test_a_cache_that_is_neither_argument_nor_state():
    (cache, other, _), step = cache_step()
    f = replay(lambda key, slots: step(key, slots, cache), state=[other])
    key = torch.ones(1, 1, 8).to(torch_xla.device())
    message = "must be one of its arguments or in its state, got another of shape"
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            f(key, torch.tensor([0]).to(torch_xla.device()))
        assert cache.cpu().abs().sum() == 0


def test_a_failed_trace_leaves_arguments_as_they_were():
    def f(x):
        x.add_(1)
        raise KeyError("on purpose")

    x = xla(1)
    for _ in range(2):
        with pytest.raises(KeyError, match="on purpose"):
            replay(f)(x)
        assert x.item() == 1


def test_a_failed_trace_whose_error_is_kept():
    """The next sync gave its argument's buffer away."""

    def f(x):
        x.add_(1)
        return x * 2, torch.ones(1)

    x = xla(1)
    with pytest.raises(ValueError, match="must be on an XLA device") as kept:
        replay(f)(x)
    torch_xla.sync(wait=True)
    assert x.item() == 1
    assert kept.tb


def test_weights_in_state_may_change():
    model = torch.nn.Linear(2, 2).to(torch_xla.device())
    model.requires_grad_(False)
    f = replay(lambda x: model(x), state=[model])
    x = torch.randn(3, 2)
    for _ in range(3):
        model.weight.copy_(torch.randn(2, 2))
        wanted = x @ model.weight.cpu().T + model.bias.cpu()
        torch.testing.assert_close(f(x.to(torch_xla.device())).cpu(), wanted)
    assert f.num_programs == 1


def test_random_numbers_are_new_in_each_call():
    f = replay(lambda x: torch.rand_like(x))
    x = xla(*range(100))
    f(x)  # a trace has a sync, which takes a number too
    xm.set_rng_state(7)
    first, second = f(x).tolist(), f(x).tolist()
    assert first != second
    xm.set_rng_state(7)
    assert [f(x).tolist(), f(x).tolist()] == [first, second]


def test_autocast_precision_and_gradients_are_part_of_the_signature():
    f, traces = counted(lambda x: x @ x)
    x = torch.eye(3).to(torch_xla.device())
    assert f(x).dtype == torch.float32
    with torch.autocast("xla", torch.bfloat16):
        assert f(x).dtype == torch.bfloat16
    assert f(x).dtype == torch.float32
    before = torch_xla._XLAC._xla_get_mat_mul_precision()
    torch_xla._XLAC._xla_set_mat_mul_precision("high")
    try:
        f(x)
    finally:
        torch_xla._XLAC._xla_set_mat_mul_precision(before)
    assert len(traces) == 3


def collide():
    """Two functions whose graphs torch_xla cannot tell apart (pytorch/xla#8353)."""
    return (
        lambda a, b, c: (a.T, b.T, c.T, a * b + c),
        lambda a, b, c: (a.T, b.T, c.T, a * c + b),
    )


def test_graphs_that_torch_xla_takes_for_one():
    args = [torch.randn(12, 12) for _ in range(3)]
    given_ = [a.to(torch_xla.device()) for a in args]
    hashes = [torch_xla._XLAC._get_graph_hash(list(f(*given_))) for f in collide()]
    assert hashes[0] == hashes[1]  # otherwise there is nothing to guard against
    functions = [replay(f) for f in collide()]
    for _ in range(2):
        for f, wanted in zip(functions, collide(), strict=True):
            result = f(*given_)
            torch.testing.assert_close(result[-1].cpu(), wanted(*args)[-1])


def test_a_graph_that_was_run_lazily_before():
    args = [torch.randn(11, 11) for _ in range(3)]
    given_ = [a.to(torch_xla.device()) for a in args]
    first, second = collide()
    lazily = first(*given_)
    torch_xla.sync(wait=True)
    torch.testing.assert_close(lazily[-1].cpu(), first(*args)[-1])
    result = replay(second)(*given_)
    torch.testing.assert_close(result[-1].cpu(), second(*args)[-1])


_EVICTED = """
import torch, torch_xla
from xla_ops.programs.replay import replay
programs = [replay(lambda x, n=n: x * n + x.sum()) for n in range(4)]
for _ in range(3):
    for n, f in enumerate(programs):
        assert f(torch.ones(2).to("xla")).tolist() == [n + 2, n + 2], n
print("right")
"""


def run_alone(code, **environ):
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_programs_that_torch_xla_has_dropped():
    assert run_alone(_EVICTED, XLA_COMPILATION_CACHE_SIZE="1") == "right"


_NOT_KEPT = """
import gc, weakref
import torch, torch_xla, xla_ops
from xla_ops.programs.replay import replay

def step(key, slots, cache):
    xla_ops.reshape_and_cache_flash(key, key * 2, *cache.unbind(0), slots)
    return cache.sum()

def run():
    device = torch_xla.device()
    given = [
        torch.ones(1, 1, 8).to(device),
        torch.tensor([0]).to(device),
        torch.zeros(2, 4, 2, 1, 8).to(device),
    ]
    f(*given)
    f(*given)
    return [weakref.ref(t) for t in given]

f = replay(step)
kept = run()
gc.collect()
assert [ref() for ref in kept] == [None] * 3, kept
print("right")
"""


def test_tensors_of_a_call_are_not_kept():
    assert run_alone(_NOT_KEPT) == "right"


def test_collectives_leave_nothing_behind(monkeypatch):
    """The next lazy graph once computed those of a trace again."""
    monkeypatch.setenv("XLA_ALWAYS_ALLREDUCE", "1")  # on one device too

    def summed(x):
        return xm.all_reduce(xm.REDUCE_SUM, x + 1)

    x = xla(1.0, 2.0)
    assert replay(summed)(x).tolist() == [2, 3]
    lazy = summed(x)
    hlo = torch_xla._XLAC._get_xla_tensors_hlo([lazy])
    torch_xla.sync()
    assert hlo.count(" all-reduce(") == 1
    assert lazy.tolist() == [2, 3]


def test_a_replayed_function_within_another():
    inner, inner_traces = counted(lambda x: x + 1)
    outer, _ = counted(lambda x: inner(x) * 2)
    for i in range(3):
        assert outer(xla(i)).tolist() == [2 * i + 2]
    assert len(inner_traces) == 1
    assert inner.num_programs == 0


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda f: f(torch.ones(2)),
            ValueError,
            "replay: tensor argument 0 must be on an XLA device, got cpu",
        ),
        (
            torch.enable_grad()(lambda f: f(xla(1.0).requires_grad_())),
            ValueError,
            "replay: tensor argument 0 must not require a gradient",
        ),
        (
            lambda f: f(xla(1), {1, 2}),
            TypeError,
            "replay: an argument must be .* that can be hashed or a tree .*, got set",
        ),
        (
            lambda f: replay(lambda x: x * x.item())(xla(3.0)),
            RuntimeError,
            "replay: the function must not read a tensor's value on the host",
        ),
        (
            lambda f: replay(lambda x: x.view(torch.int32))(xla(3.0)),
            RuntimeError,
            "operations that torch_xla runs on the host: .*view",
        ),
        (
            lambda f: replay(lambda x: torch.ones(2))(xla(1)),
            ValueError,
            "replay: a result must be on an XLA device, got a tensor on cpu",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(replay(lambda x, *rest: x * 2))


def test_as_a_decorator():
    @replay
    def double(x):
        """Twice x."""
        return x * 2

    @replay(state=[])
    def triple(x):
        return x * 3

    assert double.__name__ == "double" and double.__doc__ == "Twice x."
    assert double(xla(2)).item() == 4 and triple(xla(2)).item() == 6


OPERATIONS = [
    lambda a, b: a + b,
    lambda a, b: a * b,
    lambda a, b: a @ b,
    lambda a, b: a.T - b,
    lambda a, b: a.clone(),
    lambda a, b: a.view(-1).view(3, 3),
    lambda a, b: a.add_(b),
    lambda a, b: a.copy_(b),
    lambda a, b: a[0].mul_(0.5).expand(3, 3) + b,
]


@settings(max_examples=40, deadline=None)
@given(
    program=st.lists(
        st.tuples(
            st.integers(0, len(OPERATIONS) - 1), st.integers(0, 5), st.integers(0, 5)
        ),
        min_size=1,
        max_size=6,
    ),
    results=st.lists(st.integers(0, 8), min_size=1, max_size=4),
    same=st.booleans(),
)
def test_random_programs(program, results, same):
    """Two calls of a random program with updates and aliases do what torch does."""

    def f(*args):
        values = list(args)
        for operation, a, b in program:
            a, b = values[a % len(values)], values[b % len(values)]
            values.append(OPERATIONS[operation](a, b) * 1.0)
        return [values[i % len(values)] for i in results]

    replayed = replay(f)
    for seed in range(2):
        torch.manual_seed(seed)
        host = [torch.randn(3, 3) for _ in range(3)]
        device = [t.to(torch_xla.device()) for t in host]
        if same:
            host[2], device[2] = host[1], device[1]
        wanted = f(*host)
        got = replayed(*device)
        for w, g in zip([*wanted, *host], [*got, *device], strict=True):
            torch.testing.assert_close(g.cpu(), w, rtol=1e-4, atol=1e-4)
