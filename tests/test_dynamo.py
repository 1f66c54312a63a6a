"""The Dynamo backend "xla_ops": openxla's results in all cases, with fewer copies.

tests/test_in_place.py runs through it too, as the path "dispatched".
"""

import sys
from pathlib import Path as File

import pytest
import torch
import torch_xla
import torch_xla.debug.metrics as met
import xla_ops

sys.path.insert(0, str(File(__file__).resolve().parents[1] / "benchmarks"))

BACKENDS = pytest.mark.parametrize("backend", ["openxla", "xla_ops"])


def xla(*values) -> torch.Tensor:
    tensor = torch.tensor(values, dtype=torch.float32).to(torch_xla.device())
    torch_xla.sync(wait=True)
    return tensor


def compiled(f, backend="xla_ops", **options):
    return torch.compile(f, backend=backend, **{"fullgraph": True, **options})


@BACKENDS
def test_old_value_is_read_before_the_update(backend):
    def f(t):
        old = t[0] + 0
        t.add_(1)
        return old, t * 2

    f, t = compiled(f, backend), xla(1, 2)
    for i in range(3):
        old, double = f(t)
        assert old.item() == 1 + i
        assert double.tolist() == [4 + 2 * i, 6 + 2 * i]
        assert t.tolist() == [2 + i, 3 + i]


@BACKENDS
def test_views_see_an_update(backend):
    t = xla([1, 2], [3, 4])
    row, flat = t[1], t.view(-1)
    f = compiled(lambda t: t.mul_(10), backend)
    for i in (1, 2):
        f(t)
        assert row.tolist() == [3 * 10**i, 4 * 10**i]
        assert flat[0].item() == 10**i
    row.add_(1)  # and the other way round
    assert t.tolist() == [[100, 200], [301, 401]]


@BACKENDS
def test_an_input_that_is_a_view_updates_its_base(backend):
    t = xla([1, 2], [3, 4])
    f = compiled(lambda row: row.add_(1), backend)
    for i in (1, 2, 3):
        f(t[1])
        assert t.tolist() == [[1, 2], [3 + i, 4 + i]]


@BACKENDS
def test_results_that_are_inputs_constants_or_twice_the_same(backend):
    def f(a, b):
        c = a + b
        return c, None, a, 7, c, b * 1, torch.full((1,), 3.0, device=a.device)

    f, a, b = compiled(f, backend), xla(1), xla(2)
    for _ in range(2):
        c, none, first, seven, same, second, three = f(a, b)
        assert (c.item(), none, first.item(), seven, same.item()) == (3, None, 1, 7, 3)
        assert (second.item(), three.item()) == (2, 3)


@BACKENDS
def test_one_tensor_as_two_inputs(backend):
    f, a, b = compiled(lambda a, b: a - 2 * b, backend), xla(3), xla(1)
    assert [f(a, b).item(), f(a, a).item(), f(b, a).item()] == [1, -3, -5]


def test_pending_arguments_are_computed_first():
    f, a = compiled(lambda a, b: a.add_(b)), xla(1)
    b = xla(1)
    f(a, b)
    for i in range(1, 4):
        a.mul_(2)  # lazily
        f(a, b * i)  # both arguments are pending
        assert a.item() == [None, 5, 12, 27][i]


@BACKENDS
def test_random_numbers_differ_from_call_to_call(backend):
    f, a = compiled(lambda a: a + torch.rand_like(a), backend), xla(*range(16))
    first, second = f(a).cpu(), f(a).cpu()
    assert not torch.equal(first, second)
    assert (first - torch.arange(16)).min() >= 0


@BACKENDS
def test_symbolic_sizes(backend):
    def f(t):
        t.add_(1)
        return t.sum() * t.shape[0]

    f = compiled(f, backend, dynamic=True)
    for size in (3, 4, 5, 3):
        t = xla(*range(size))
        assert f(t).item() == size * sum(range(1, size + 1))
        assert t.tolist() == list(range(1, size + 1))


@BACKENDS
def test_gradients(backend):
    weight = xla(2, 3).requires_grad_()
    f, x = compiled(lambda w, x: (w * w * x).sum(), backend), xla(1, 10)
    for i in range(1, 3):
        with torch.enable_grad():
            f(weight, x).backward()
        assert weight.grad.tolist() == [4 * i, 60 * i]


@BACKENDS
def test_ops_without_a_lowering_fall_back_to_the_cpu(backend):
    def f(t):
        bins = torch.histc(t * 1, bins=2, min=0, max=10)
        t.add_(1)
        return bins + 1

    met.clear_all()
    f, t = compiled(f, backend), xla(1, 2, 9)
    assert [f(t).tolist() for _ in range(2)] == [[3, 2], [3, 2]]
    assert t.tolist() == [3, 4, 11]
    assert any("histc" in name for name in met.executed_fallback_ops())


@BACKENDS
def test_a_failing_handler_raises_and_later_calls_go_on(backend):
    """The handler refuses what tracing could not see."""
    f = compiled(lambda t: xla_ops.rms_norm(t, t[0], 1e-6), backend)
    with pytest.raises(Exception, match="rms_norm: weight must have"):
        f(xla([1, 2], [3, 4]).half().unsqueeze(0))
    t = xla([1, 1], [1, 1])
    assert torch.allclose(f(t).cpu(), torch.ones(2, 2))


def test_an_update_adds_nothing_to_the_lazy_graph():
    def add(t):
        t.add_(1)

    f, t = compiled(add), xla(1)
    f(t), f(t)
    copies = met.counter_value("xla::_copy_from") or 0
    for _ in range(5):
        f(t)
    assert (met.counter_value("xla::_copy_from") or 0) == copies
    assert t.item() == 8


@pytest.mark.parametrize("name", ["openxla", "xla_ops"])
def test_a_thousand_steps_trace_and_compile_nothing(name):
    """Of a decode step of 4 layers; nor does a cache move."""
    from step import measure

    row = measure(name, layers=4, steps=1000)
    assert row["retraces_and_recompilations"] == 0
    assert row["cache_bytes_moved"] == 0
    assert row["cache_tensors"] == 8


def test_compilations_are_counted():
    """What the test above wants to be zero."""
    from step import compilations

    before = compilations()
    compiled(lambda t: t * 3)(xla(1))
    assert compilations() >= before + 2  # traced, and compiled
