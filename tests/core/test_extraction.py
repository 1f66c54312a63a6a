"""A program that torch_xla extracts reads its arguments (core/extraction.py)."""

import pytest
import torch
import torch_xla
from torch_xla._dynamo import dynamo_bridge

import xla_ops
from support import Path, addresses
from xla_ops.core import extraction, ownership

WAYS = pytest.mark.parametrize("name", ["compiled", "dispatched"])
SIZE = 2 * 8  # of a page


def norm(x):
    return xla_ops.rms_norm(x, torch.ones_like(x[0]))


def write(rows, cache, slots):
    xla_ops.reshape_and_cache_flash(rows, rows, *cache.unbind(0), slots)


class Case:
    def __init__(self, name):
        self.path = Path(name)
        self.put = self.path.put
        self.slots = self.put(torch.tensor([0, 1]))

    def rows(self, value):
        return self.put(torch.full((2, 2, 8), float(value)))


@WAYS
@pytest.mark.parametrize("copies", [True, False], ids=["copies too", "writes"])
def test_two_backwards_have_each_its_own_saved_cache(name, copies):
    """What a backward keeps of the cache and the cache are one buffer for a while."""
    case = Case(name)
    ints = [[3, 5], [[0, 1], [2, 3]], [0, 1, 4], [0, 3, 1, 2]]
    context_lens, tables, starts, slots = case.put(
        [torch.tensor(t, dtype=torch.int32) for t in ints]
    )
    pairs = case.put(torch.tensor([[0, 2]]))

    def f(x, weight, key_cache, value_cache):
        qkv = torch.tanh(x @ weight.t()).view(4, 8, 8)
        query, key, value = qkv.split([4, 2, 2], 1)
        if copies:
            xla_ops.copy_blocks([key_cache], [value_cache], pairs)
        xla_ops.reshape_and_cache_flash(
            key.detach(), value.detach(), key_cache, value_cache, slots.long()
        )
        caches = [key_cache, value_cache]
        return xla_ops.paged_attention(
            query, caches, context_lens, tables, starts, 2, 0.3
        )

    inputs, weight, caches = case.put(
        (torch.randn(3, 4, 16), torch.randn(64, 16), torch.randn(2, 4, 4, 2, 8))
    )
    weight.requires_grad_()

    @torch.enable_grad()
    def grads(step, at_once):
        key_cache, value_cache = (case.put(t.cpu()) for t in caches)
        results, found = [], []
        for x in inputs:
            results.append(step(x, weight, key_cache, value_cache).sum())
            if at_once:
                found += torch.autograd.grad(results[-1], [weight])
        if not at_once:
            found = [torch.autograd.grad(t, [weight])[0] for t in results]
        return [t.cpu() for t in found]

    wanted = grads(f, at_once=True)
    for actual, one in zip(
        grads(case.path.function(f), at_once=False), wanted, strict=True
    ):
        torch.testing.assert_close(actual, one)


@WAYS
@pytest.mark.parametrize(
    "share",
    [
        lambda t: t.to(t.device, copy=True),
        lambda t: torch.zeros_like(t).copy_(t),
        lambda t: t.copy_(torch.full_like(t, 4)),
        lambda t: t.detach(),
        lambda t: t,
    ],
    ids=["to", "copy_", "filled", "detach", "itself"],
)
@pytest.mark.parametrize("sync", [True, False], ids=["sync", "pending"])
def test_arguments_that_share_a_buffer_at_the_first_call(name, share, sync):
    case = Case(name)
    step = case.path.function(lambda a, b: norm(a) * 0 + a * 10 + b)
    a = case.put(torch.full((2, 8), 3.0))
    b = share(a)
    if sync:
        torch_xla.sync()
    wanted = a.cpu() * 10 + b.cpu()
    assert torch.equal(step(a, b).cpu(), wanted)
    one, two = (case.put(torch.full((2, 8), value)) for value in (1.0, 2.0))
    assert step(one, two).unique().tolist() == [12]
    assert step(two, one).unique().tolist() == [21]


@WAYS
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "dropped"])
def test_an_argument_of_which_a_snapshot_was_read(name, kept):
    case = Case(name)
    step = case.path.function(lambda a: norm(a) * 0 + a)
    a = case.put(torch.full((2, 8), 3.0))
    snapshot = a.clone()
    assert snapshot.unique().tolist() == [3]
    if not kept:
        del snapshot
    for value in (3, 1, 2):
        assert step(a.fill_(value)).unique().tolist() == [value]


@WAYS
@pytest.mark.parametrize("before", [True, False], ids=["updated before", "new"])
@pytest.mark.parametrize("detach", [True, False], ids=["detached", "as it is"])
@pytest.mark.parametrize("clone", [torch.clone, lambda t: t * 1], ids=["clone", "read"])
def test_the_old_values_of_a_view_that_was_made_outside(name, before, detach, clone):
    """Torch reads the view's base, which is no argument."""
    case = Case(name)

    def f(rows, key_cache, value_cache):
        old = clone(key_cache.detach() if detach else key_cache)
        xla_ops.reshape_and_cache_flash(rows, rows, key_cache, value_cache, case.slots)
        return old

    step, cache = case.path.function(f), case.put(torch.zeros(2, 3, 1, 2, 8))
    if before:
        write(case.rows(1), cache, case.slots)
        torch_xla.sync()
    last = float(before)
    view, other = cache[0], case.put(torch.zeros(3, 1, 2, 8))
    for value in (2, 3, 5):
        old = step(case.rows(value), view, other)
        assert old[:2].unique().tolist() == [last]
        assert cache[0, :2].unique().tolist() == [value]
        last = value


@WAYS
def test_results_that_are_a_tensor_and_its_clone(name):
    """torch_xla took them for one, and later results came in the places of others."""
    case = Case(name)

    def f(a):
        b = norm(a)
        return b, b.clone(), a + 1, a + 2

    step = case.path.function(f)
    for value in (1, 2):
        b, clone, one, two = step(case.put(torch.full((2, 8), float(value))))
        torch.testing.assert_close(b.cpu(), clone.cpu())
        assert (one - value).unique().tolist() == [1]
        assert (two - value).unique().tolist() == [2]


@WAYS
def test_nothing_of_the_first_call_is_kept(name):
    """A cache that the program held would be copied at each update."""
    case = Case(name)

    def f(rows, cache):
        write(rows, cache, case.slots)
        return cache.sum()

    step, cache = case.path.function(f), case.put(torch.zeros(2, 3, 1, 2, 8))
    before = addresses([cache])
    for value in (1, 2, 3):
        step(case.rows(value), cache)
        assert addresses([cache]) == before
        data, _ = ownership._holders([ownership._value(cache)])[0]
        assert data == 1


@WAYS
def test_a_cache_that_is_read_beside_its_update_stays(name):
    """openxla's program is given it twice, once as a tensor that is protected."""
    case = Case(name)
    pairs = case.put(torch.tensor([[0, 1]]))
    step = case.path.function(lambda c: xla_ops.swap_blocks(*c.unbind(0), pairs))
    cache = case.put(torch.arange(2 * 3 * SIZE).float().reshape(2, 3, 1, 2, 8))
    wanted = cache.cpu()
    before = addresses([cache])
    for _ in range(2):
        step(cache)
        wanted[1, 1] = wanted[0, 0]
        assert addresses([cache]) == before
        assert torch.equal(cache.cpu(), wanted)


def test_an_alias_of_an_argument_that_the_program_takes_is_a_copy():
    case = Case("compiled")
    extraction.install()
    a, wanted = case.put(torch.arange(8.0)), torch.arange(8.0)
    # Flagged before, as by a call in the graph that updates it.
    torch_xla._XLAC._set_buffer_donation(a, True)
    module = torch.fx.symbolic_trace(
        lambda a: (torch.ops.aten.detach.default(a), a + 1)
    )
    step = dynamo_bridge.extract_compiled_graph(module, (a,))
    old, new = step(a)
    assert torch.equal(new.cpu(), wanted + 1)
    assert torch.equal(old.cpu(), wanted)
