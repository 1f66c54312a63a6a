"""The Dynamo backend "xla_ops": openxla's results in all cases, with fewer copies.

tests/core/test_in_place.py runs through it too, as the path "dispatched".
"""

import gc
import os
import subprocess
import sys
import threading
import time
import traceback
import weakref

import pytest
import torch
import torch_xla
import torch_xla.debug.metrics as met
from torch_xla._dynamo import dynamo_bridge

import xla_ops
from xla_ops.core import extraction
from xla_ops.extend import torch_op
from xla_ops.programs import backend as backend_module
from xla_ops.programs.replay import replay

BACKENDS = pytest.mark.parametrize("backend", ["openxla", "xla_ops"])


@pytest.fixture(autouse=True, scope="module")
def _extraction():
    """As the first custom call that is traced has it."""
    extraction.install()


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


@pytest.mark.parametrize("sync", [True, False], ids=["sync", "pending"])
@pytest.mark.parametrize(
    "share",
    [
        lambda t: t.to(t.device, copy=True),
        lambda t: torch.zeros_like(t).copy_(t),
        lambda t: t.copy_(xla(5, 7)),
    ],
    ids=["to", "copy_ from it", "copy_ to it"],
)
def test_an_input_that_shares_its_buffer_at_the_first_call(share, sync):
    """openxla makes it a constant of the program."""
    f, t = compiled(lambda t: t.mul_(2).sum()), xla(1, 2)
    other = share(t)
    if sync:
        torch_xla.sync()
    wanted = t.cpu()
    for i in (2, 4, 8):
        assert f(t).item() == i * wanted.sum()
        assert torch.equal(t.cpu(), i * wanted)
    if other is not t:
        assert torch.equal(other.cpu(), wanted)


def test_inputs_that_share_a_buffer_at_the_first_call_of_a_size():
    """Each size has a program of its own."""
    f = compiled(lambda a, b: a * 10 + b, dynamic=True)
    for size in (2, 3, 4, 3):
        a, b = xla(*[1] * size), xla(*[0] * size)
        b.copy_(a)
        torch_xla.sync()
        assert f(a, b).tolist() == [11] * size
        one, two = xla(*[1] * size), xla(*[2] * size)
        assert f(one, two).tolist() == [12] * size
        assert f(two, one).tolist() == [21] * size


WAYS = pytest.mark.parametrize("way", [compiled, replay], ids=["xla_ops", "replay"])


@WAYS
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "dropped"])
def test_an_input_of_which_a_snapshot_was_read_is_an_input(way, kept):
    """torch_xla knows the buffer by the snapshot's number."""
    t, other = xla(1, 2), xla(3, 4)
    snapshot = t.clone()
    assert snapshot.tolist() == [1, 2]
    assert (snapshot + 1).tolist() == [2, 3]
    if not kept:
        del snapshot
    f = way(lambda t: t * 10)
    assert f(t).tolist() == [10, 20]
    assert f(other).tolist() == [30, 40]
    assert f(t).tolist() == [10, 20]


@WAYS
@pytest.mark.parametrize("sync", [True, False], ids=["sync", "pending"])
def test_an_input_whose_buffer_has_the_number_of_another_input(way, sync):
    t, source = xla(1, 2), xla(5, 6)
    snapshot = t.clone()
    assert (snapshot.tolist(), (snapshot + 1).tolist()) == ([1, 2], [2, 3])
    snapshot.copy_(source)
    if sync:
        torch_xla.sync(wait=True)
    f = way(lambda a, b: a * 10 + b)
    assert f(t, snapshot).tolist() == [15, 26]
    assert f(source, t).tolist() == [51, 62]
    assert f(snapshot, source).tolist() == [55, 66]


@BACKENDS
def test_one_tensor_as_two_inputs(backend):
    f, a, b = compiled(lambda a, b: a - 2 * b, backend), xla(3), xla(1)
    assert [f(a, b).item(), f(a, a).item(), f(b, a).item()] == [1, -3, -5]


def rotate(a, b, c):
    first = a.clone()
    a.copy_(b)
    b.copy_(c)
    c.copy_(first)


def double_into(a, b, x):
    double = x * 2
    a.copy_(double)
    b.copy_(double)
    x.add_(1)
    return double, x * 3


def copy_and_go_on(a, b, c):
    out = torch.empty_like(a)
    out.copy_(a)
    a.copy_(b)
    c.add_(1)
    return out, c * 2, b + 1


def copy_to_itself(a, b, c):
    a.copy_(a)
    return b + c


@pytest.mark.parametrize("f", [rotate, double_into, copy_and_go_on, copy_to_itself])
def test_values_that_are_the_same_or_an_input_s(f):
    """torch_xla's openxla refuses these, or gives a later result an earlier's value."""
    wanted = [torch.tensor([float(i)]) for i in (1, 10, 100)]
    tensors = [xla(i) for i in (1, 10, 100)]
    call = compiled(f)
    for _ in range(3):
        wanted_results, results = f(*wanted), call(*tensors)
        assert [t.item() for t in tensors] == [t.item() for t in wanted]
        if wanted_results is not None:
            assert [t.item() for t in results] == [t.item() for t in wanted_results]


def update_and_alias(w, x):
    old, new = x * 1, x.detach()
    x.mul_(2)
    return w.detach(), old, new, x + w.detach()


@pytest.mark.parametrize(
    "f",
    [
        lambda w, x: w.detach(),
        lambda w, x: (x * w.detach(), w.data, w, w.detach()),
        lambda w, x: (torch.ops.aten.alias(x), w.detach().view(1, 2), w * x),
        update_and_alias,
    ],
    ids=["alone", "several", "of views", "of what is updated"],
)
@pytest.mark.parametrize("requires_grad", [True, False], ids=["trained", "inference"])
@BACKENDS
def test_results_that_are_aliases_of_inputs(backend, f, requires_grad):
    """torch_xla's bridge waits for them among the program's results."""
    call, x = compiled(f, backend), xla(5, 7)
    w = xla(2, 3).requires_grad_(requires_grad)
    wanted_w, wanted_x = w.detach().cpu(), x.cpu()
    with torch.set_grad_enabled(requires_grad):
        for _ in range(2):
            results, wanted = call(w, x), f(wanted_w, wanted_x)
            if isinstance(wanted, torch.Tensor):
                results, wanted = (results,), (wanted,)
            assert [t.tolist() for t in results] == [t.tolist() for t in wanted]
            assert x.tolist() == wanted_x.tolist()


@BACKENDS
def test_a_backward_keeps_an_alias_of_an_input(backend):
    """As of a weight that is not trained."""
    f = compiled(lambda x, w: (x * w.detach()).sin().sum(), backend)
    x, w = xla(1, 2).requires_grad_(), xla(3, 4).requires_grad_()
    with torch.enable_grad():
        f(x, w).backward()
    wanted = torch.tensor([3.0, 4.0]) * torch.tensor([3.0, 8.0]).cos()
    torch.testing.assert_close(x.grad.cpu(), wanted)
    assert w.grad is None


def test_a_returned_clone_of_a_cache_outlives_the_next_call():
    def f(cache, key, slots):
        xla_ops.reshape_and_cache_flash(key, key, *cache.unbind(0), slots)
        return cache.clone()

    device = torch_xla.device()
    cache = torch.zeros(2, 4, 16, 2, 32, device=device)
    key = torch.ones(1, 2, 32, device=device)
    slots = torch.tensor([16]).to(device)
    torch_xla.sync(wait=True)
    f = compiled(f)
    sums = [f(cache, key * i, slots).sum() for i in (1, 2)]
    assert [s.item() for s in sums] == [128, 256]


def test_arguments_of_the_first_call_are_freed():
    f = compiled(lambda cache, x: cache.add_(x) * 2)
    for _ in range(2):
        cache, x = xla(1), xla(2)
        f(cache, x)
        alive = [weakref.ref(t) for t in (cache, x)]
        del cache, x
        gc.collect()
        assert [r() for r in alive] == [None, None]


def test_threads_extract_a_program_once(monkeypatch):
    extractions = []

    def extract(module, args):
        extractions.append(module)
        time.sleep(0.2)  # the other thread arrives
        return lambda t: (module(t),)

    monkeypatch.setattr(backend_module, "_extract_program", extract)
    module = torch.fx.symbolic_trace(lambda t: (t + 1,))
    forward, results = backend_module._compile(module, None), []
    threads = [
        threading.Thread(target=lambda: results.append(forward([torch.ones(1)])))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2
    assert len(extractions) == 1


def test_torch_xlas_own_functions_stay_as_they_are():
    """openxla may compile in another thread meanwhile."""
    before = dict(vars(dynamo_bridge))
    seen = []

    def probe(module, args):
        seen.append({n for n, v in vars(dynamo_bridge).items() if before[n] is not v})
        return extract(module, args)

    extract = backend_module._extract_program
    backend_module._extract_program = probe
    try:
        assert compiled(lambda t: t + 1)(xla(1)).item() == 2
    finally:
        backend_module._extract_program = extract
    assert seen == [set()]
    assert vars(dynamo_bridge) == before


@pytest.mark.parametrize("step", ["_xla_warm_up_cache", "_run_cached_graph"])
def test_an_interrupted_first_call_loses_nothing(monkeypatch, step):
    """It flags the caches that the program overwrites: not for programs after it."""

    def write(kv, rows, slots):
        xla_ops.reshape_and_cache_flash(rows, rows, *kv.unbind(0), slots)

    def interrupt(*_):
        monkeypatch.undo()
        raise KeyboardInterrupt

    f, double = compiled(write), compiled(lambda t: t * 2)
    values = torch.randn(2, 3, 2, 1, 4)
    rows, slots = torch.ones(1, 1, 4), torch.tensor([0])
    kv, rows, slots = (t.to(torch_xla.device()) for t in (values, rows, slots))
    torch_xla.sync(wait=True)
    monkeypatch.setattr(torch_xla._XLAC, step, interrupt)
    with pytest.raises(KeyboardInterrupt):
        f(kv, rows, slots)
    for _ in range(2):
        assert torch.equal(double(kv).cpu(), values * 2)
        assert torch.equal(kv.cpu(), values)
    f(kv, rows, slots)
    values[:, 0, 0] = 1
    assert torch.equal(kv.cpu(), values)


def test_without_functionalization_values_are_copied():
    """torch_xla's XLA_DISABLE_FUNCTIONALIZATION leaves no wrapper to give a value."""
    code = """
import torch, torch_xla

def f(t):
    t.add_(1)
    return t * 2

f, t = torch.compile(f, backend="xla_ops"), torch.ones(1, device=torch_xla.device())
assert [f(t).item(), f(t).item(), t.item()] == [4, 6, 3]
"""
    # On the CPU: a GPU's memory may all be this process's.
    env = {**os.environ, "XLA_DISABLE_FUNCTIONALIZATION": "1", "PJRT_DEVICE": "CPU"}
    subprocess.run([sys.executable, "-c", code], env=env, check=True)


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


@WAYS
def test_a_tensor_that_is_lost_with_a_failed_program_is_named(way):
    look_up = torch_op("aten::embedding")
    ids = [torch.tensor([i]).to(torch_xla.device()) for i in (1, 9)]

    def step(t, ids):
        t.add_(1)
        return look_up(t, ids, -1, False, False).sum()

    f, t = way(step), xla([1, 2], [3, 4])
    assert f(t, ids[0]).item() == 9
    result = f(t, ids[1])
    with pytest.raises(RuntimeError, match="aten::embedding failed: index out of"):
        result.item()
    text = r"an argument must have a value, got one .* failed, of shape \[2, 2\];"
    for _ in range(2):
        with pytest.raises(RuntimeError, match=text):
            f(t, ids[0])
    t = xla([1, 2], [3, 4])
    assert f(t, ids[0]).item() == 9
    assert t.tolist() == [[2, 3], [4, 5]]


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


def test_backwards_of_a_long_life(monkeypatch):
    """Torch's own backends wrap their compiler of backwards once more at each use."""
    depths = []
    compile_graph = backend_module._compile

    def watched(*args):
        depths.append(len(traceback.extract_stack()))
        return compile_graph(*args)

    monkeypatch.setattr(backend_module, "_compile", watched)
    for i in range(8):
        x = torch.ones(i + 2, device="xla", requires_grad=True)
        with torch.enable_grad():
            compiled(lambda t: (t * t).sum())(x).backward()
        torch._dynamo.reset()
    forwards, backwards = depths[::2], depths[1::2]
    assert len(backwards) == 8
    assert len(set(forwards[1:])) == len(set(backwards[1:])) == 1, depths
