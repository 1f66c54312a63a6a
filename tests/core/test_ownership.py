"""An update in place takes no buffer away from another tensor (core/ownership.py)."""

import threading

import pytest
import torch
import torch_xla
from hypothesis import given, settings
from hypothesis import strategies as st

import xla_ops
from shares import COPIES, WAYS
from support import Path, addresses
from xla_ops import _runtime
from xla_ops.core import ownership
from xla_ops.programs.replay import replay

SHAPE = (2, 6, 4, 2, 8)
STEPS = pytest.mark.parametrize("name", ["lazy", "compiled", "dispatched"])
SYNC = pytest.mark.parametrize("sync", [True, False], ids=["sync", "pending"])


def write(cache, rows, slots):
    key_cache, value_cache = cache.unbind(0)
    xla_ops.reshape_and_cache_flash(rows, rows, key_cache, value_cache, slots)
    return cache.sum()


class Case:
    """Caches on the XLA device, and one row a value that a step writes at slot 0."""

    def __init__(self, name):
        self.path = Path("lazy" if name == "replayed" else name)
        make = replay if name == "replayed" else self.path.function
        self.step = make(write)
        self.slots = self.path.put(torch.tensor([0, 1]))

    def put(self, t):
        return self.path.put(t)

    def write(self, cache, value, sync=True):
        rows = torch.full((2, 2, 8), float(value), device=cache.device)
        if sync:
            torch_xla.sync()
        return self.step(cache, rows, self.slots)

    @staticmethod
    def written(t, value):
        t = t.clone()
        t[:, 0, :2] = value
        return t


@pytest.mark.parametrize("stage", ["before", "between"])
@SYNC
@pytest.mark.parametrize("way", WAYS)
@STEPS
def test_a_template_keeps_its_values(name, way, sync, stage):
    case = Case(name)
    wanted = torch.randn(SHAPE)
    template, cache = case.put(wanted), case.put(torch.zeros(SHAPE))
    if stage == "between":
        case.write(cache, 1)
        case.path.wait()
    for value in (2, 3):  # the second reset meets a cache that was donated before
        cache = WAYS[way](cache, template)
        if sync:
            case.path.wait()
        case.write(cache, value)
        assert torch.equal(template.cpu(), wanted)
        assert torch.equal(cache.cpu(), case.written(wanted, value))


@SYNC
@pytest.mark.parametrize("way", WAYS)
@STEPS
def test_a_snapshot_keeps_its_values(name, way, sync):
    case = Case(name)
    cache = case.put(torch.zeros(SHAPE))
    case.write(cache, 1)
    snapshot = WAYS[way](case.put(torch.zeros(SHAPE)), cache)
    if sync:
        case.path.wait()
    case.write(cache, 2)
    assert torch.equal(snapshot.cpu(), case.written(torch.zeros(SHAPE), 1))
    assert torch.equal(cache.cpu(), case.written(torch.zeros(SHAPE), 2))


@STEPS
def test_caches_that_were_filled_from_one_template_and_outlive_it(name):
    case = Case(name)
    wanted = torch.randn(SHAPE)
    template = case.put(wanted)
    caches = [case.put(torch.zeros(SHAPE)) for _ in range(3)]
    for cache in caches:
        cache.copy_(template)
    case.path.wait()
    del template
    for value, cache in enumerate(caches):
        case.write(cache, value)
    for value, cache in enumerate(caches):
        assert torch.equal(cache.cpu(), case.written(wanted, value))


@STEPS
def test_a_read_that_waits_sees_the_old_value(name):
    case = Case(name)
    cache, other = case.put(torch.ones(SHAPE)), case.put(torch.ones(3))
    case.write(cache, 1)
    case.path.wait()
    read = cache[0, 1, 0].sum()
    case.write(cache, 5)
    other += 1
    torch_xla.sync()  # of an unrelated tensor
    assert other.tolist() == [2, 2, 2]
    assert read.item() == 16
    assert torch.equal(cache.cpu(), case.written(torch.ones(SHAPE), 5))


@pytest.mark.parametrize("name", ["compiled", "dispatched"])
def test_a_read_that_waits_beside_a_lazy_update_sees_the_old_value(name):
    """The step needs the update alone, which takes the buffer that the read needs."""
    case, lazy = Case(name), Case("lazy")
    cache = case.put(torch.ones(SHAPE))
    case.write(case.put(torch.zeros(SHAPE)), 1)  # compiles: what waits is computed
    read, copied = cache.sum(), cache * 1
    lazy.write(cache, 2, sync=False)
    case.write(cache, 3, sync=False)
    torch_xla.sync()
    assert read.item() == torch.ones(SHAPE).sum()
    assert torch.equal(copied.cpu(), torch.ones(SHAPE))
    assert torch.equal(cache.cpu(), case.written(torch.ones(SHAPE), 3))


@STEPS
def test_nothing_moves_where_nobody_shares(name):
    """Neither at the first step nor later, with reads and syncs between steps."""
    case = Case(name)
    caches = [case.put(torch.zeros(SHAPE)) for _ in range(8)]
    before = addresses(caches)
    for value in range(3):
        for cache in caches:
            case.write(cache, value)
        assert addresses(caches) == before
        for cache in caches:
            assert cache[0, 0, 0, 0, 0].item() == value
    case.path.wait()


@pytest.mark.parametrize("name", ["lazy", "compiled", "dispatched", "replayed"])
def test_nothing_moves_where_a_program_is_handed_over_late(name, monkeypatch):
    """As on a busy host: the next update looks while torch_xla holds the results."""
    monkeypatch.setattr(ownership, "_HANDOVER_S", 0)
    case = Case(name)
    caches = [case.put(torch.zeros(SHAPE)) for _ in range(8)]
    before = addresses(caches)
    for value in range(20):
        for cache in caches:
            case.write(cache, value)
    assert addresses(caches) == before
    assert [cache[0, 0, 0, 0, 0].item() for cache in caches] == [19] * 8
    case.path.wait()


@STEPS
def test_a_share_costs_one_copy(name):
    case = Case(name)
    template, cache = case.put(torch.randn(SHAPE)), case.put(torch.zeros(SHAPE))
    cache.copy_(template)
    case.path.wait()
    case.write(cache, 1)
    (moved,) = addresses([cache])
    for value in range(3):
        case.write(cache, value)
        assert addresses([cache]) == [moved]
    assert addresses([template]) != [moved]


def test_other_releases_of_torch_are_named(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.10.0+cpu")
    with pytest.raises(RuntimeError, match=r"torch must be 2\.9\.0 .* got 2\.10\.0"):
        ownership._load.__wrapped__()


# ------------------------------------------------------------- random programs


PATHS = ["lazy", "compiled", "dispatched", "replayed"]
STEP = st.tuples(
    st.sampled_from(PATHS),
    st.integers(0, 1),
    st.sampled_from(["nothing", "look at it", "look at the other", "sync"]),
)


@settings(max_examples=60)
@given(
    way=st.sampled_from(sorted(COPIES)), steps=st.lists(STEP, min_size=1, max_size=6)
)
def test_a_cache_and_its_snapshot_live_through_any_steps(way, steps):
    """Each step writes one; then one is looked at, or all is computed."""
    cases = {name: Case(name) for name in PATHS}
    wanted = [torch.randn(SHAPE)] * 2
    cache, other = cases["lazy"].put([wanted[0], torch.zeros(SHAPE)])
    pair = [cache, COPIES[way](other, cache)]
    for number, (name, which, then) in enumerate(steps):
        cases[name].write(pair[which], number, sync=False)
        wanted[which] = Case.written(wanted[which], number)
        if then == "sync":
            torch_xla.sync()
        elif then != "nothing":
            seen = which if then == "look at it" else 1 - which
            assert torch.equal(pair[seen].cpu(), wanted[seen])
    torch_xla.sync()
    for got, expected in zip(pair, wanted, strict=True):
        assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize(
    "function", ["buffer_holders", "lazy_tensor_id", "is_copied", "readers"]
)
def test_another_tensor_is_no_xla_tensor(function):
    """Of a wrapper with an XLA device nothing is read, as of a tensor of the CPU."""
    error = "must be one of torch_xla's own"
    xla = torch.zeros(2, device=torch_xla.device())
    ownership.protect([xla], finish_reads=True)  # loads

    def ask(tensor):
        address = tensor._cdata
        if function == "is_copied":
            return _runtime.is_copied(address, [])
        if function == "readers":
            return _runtime.is_copied(ownership._value(xla)._cdata, [address])
        argument = [address] if function == "buffer_holders" else address
        return getattr(_runtime, function)(argument)

    ask(ownership._value(xla))
    assert torch._is_functional_tensor(xla)
    for other in (torch.zeros(2), xla):
        with pytest.raises(TypeError, match=error):
            ask(other)

    def inside(batched):
        assert batched.device.type == "xla"
        with pytest.raises(TypeError, match=error):
            ask(batched)
        return batched

    torch.vmap(inside)(xla)


def norm(cache, rows, slots):
    torch.ops.xla_ops.rms_norm(cache, cache, rows[0, 0] + 1, 1e-6)


@pytest.mark.parametrize("before", ["compiled", "lazy", "nothing"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("update", [write, norm])
@SYNC
def test_a_template_outlives_lazy_updates(update, way, sync, before):
    """Updates give away what they overwrite, and a copy_ may wait in their graph."""
    case = Case("lazy" if before == "nothing" else before)
    values, rows = torch.randn(SHAPE), torch.ones(2, 2, 8)
    template, cache, rows = case.put([values, torch.zeros(SHAPE), rows])
    if before != "nothing":
        case.write(cache, 1)
    cache, wanted = WAYS[way](cache, template), values.clone()
    for _ in range(2):
        if sync:
            torch_xla.sync()
        update(cache, rows, case.slots)
        update(wanted, rows.cpu(), case.slots.cpu())
    more = template + 1
    torch_xla.sync()
    assert torch.equal(template.cpu(), values)
    assert torch.equal(more.cpu(), values + 1)
    assert torch.allclose(cache.cpu(), wanted)


@pytest.mark.parametrize("update", [write, norm])
@pytest.mark.parametrize("way", WAYS)
def test_a_copy_that_is_read_before_the_update_runs_is_kept(way, update):
    """Before it is computed a copy is the cache's buffer, which the update writes."""
    case = Case("lazy")
    values, rows = torch.randn(SHAPE), torch.ones(2, 2, 8)
    cache, other, rows = case.put([values, torch.zeros(SHAPE), rows])
    snapshot, wanted = WAYS[way](other, cache), values.clone()
    update(cache, rows, case.slots)
    update(wanted, rows.cpu(), case.slots.cpu())
    for _ in range(2):
        assert torch.equal(snapshot.cpu(), values)
        torch_xla.sync()
    assert torch.allclose(cache.cpu(), wanted)


def test_reads_that_wait_beside_an_update_are_no_copies():
    """Such as those of views, before it: the cache stays where it is."""
    case = Case("lazy")
    cache = case.put(torch.ones(SHAPE))
    before = addresses([cache])
    for value in range(3):
        view, read = cache[1], cache[0, 0] * 2
        case.write(cache, value, sync=False)
        del view
        assert addresses([cache]) == before
        assert read[0, 0, 0].item() == (2 if value == 0 else 2 * (value - 1))


@pytest.mark.parametrize("name", ["compiled", "dispatched"])
def test_a_kept_view_written_lazily_between_compiled_steps(name):
    """A step has the view computed alone, while its base waits for the same graph."""

    def double(row, weight):
        torch.ops.xla_ops.rms_norm(row, row, weight, 1e-6)
        return row.sum()

    path = Path(name)
    step = path.function(double)
    base = torch.randn(3, 8, 3)
    weight = torch.full((8,), 2.0)
    wanted = base.clone()
    base, weight = path.put([base, weight])
    view = base.select(2, 0)
    for f in (step, double, step):
        double(wanted.select(2, 0), weight.cpu())
        f(view, weight)
        if f is step:
            torch_xla.sync()
    assert torch.allclose(base.cpu(), wanted)


@pytest.mark.parametrize("name", ["compiled", "dispatched"])
def test_a_copy_of_a_detached_cache_that_is_compiled_after_an_update(name):
    """As of a Parameter; the program once held the values of when it was compiled."""

    def function(cache, rows, slots):
        before = cache.detach().clone()
        write(cache, rows, slots)
        return before

    case = Case(name)
    wanted = torch.randn(SHAPE)
    cache = torch.nn.Parameter(case.put(wanted).detach(), requires_grad=False)
    with torch.no_grad():
        case.write(cache, 1.0)
        wanted = case.written(wanted, 1.0)
        case.step = case.path.function(function)
        for value in (2.0, 3.0, 4.0):
            before = case.write(cache, value)
            torch_xla.sync()
            torch.testing.assert_close(before.cpu(), wanted)
            wanted = case.written(wanted, value)
    torch.testing.assert_close(cache.detach().cpu(), wanted)


@torch.enable_grad()
def test_a_thread_of_autograd_moves_no_cache_once_its_backward_has_run():
    """Whatever else is pending may be computed beside it."""
    case = Case("lazy")
    cache = case.put(torch.zeros(SHAPE))
    x = torch.ones(2, device=cache.device, requires_grad=True)
    threads = []
    x.register_hook(lambda grad: threads.append(threading.current_thread()))
    x.sum().backward()
    assert threads[0] in threading.enumerate()
    step = torch.compile(write, backend="xla_ops")
    rows = case.put([torch.full((2, 2, 8), float(value)) for value in (1, 2)])
    before, last = addresses([cache]), torch.zeros(SHAPE)
    for value in (1, 2):
        old = cache.sum()
        with torch.no_grad():
            step(cache, rows[value - 1], case.slots)
        assert addresses([cache]) == before
        assert old.item() == last.sum()
        last = case.written(last, value)
