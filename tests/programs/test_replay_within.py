"""`replay` within what else traces or transforms, and what does so within it."""

import pytest
import torch
import torch_xla
import torch_xla.core.xla_model as xm
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import xla_ops
from support import addresses
from xla_ops.programs.replay import replay

BACKENDS = pytest.mark.parametrize("backend", ["openxla", "xla_ops"])


@pytest.fixture
def given_():
    """A cache, rows and slots."""
    device = torch_xla.device()
    tensors = torch.zeros(2, 4, 4, 2, 8), torch.ones(2, 2, 8), torch.tensor([1, 2])
    tensors = [t.to(device) for t in tensors]
    torch_xla.sync(wait=True)
    return tensors


def write(cache, rows, slots):
    xla_ops.reshape_and_cache_flash(rows, rows, *cache.unbind(0), slots)
    return cache.sum()


def check(step, given_):
    cache, rows, slots = given_
    before = addresses([cache])
    for factor in (1, 2, 3):
        assert step(cache, factor * rows, slots).item() == 64 * factor
    assert addresses([cache]) == before


@BACKENDS
@pytest.mark.parametrize("fullgraph", [False, True])
def test_in_a_compiled_function_it_is_a_part_of_that(backend, fullgraph, given_):
    replayed = replay(write)

    def step(*args):
        return replayed(*args) * 1

    with torch.no_grad():
        check(torch.compile(step, backend=backend, fullgraph=fullgraph), given_)
    assert replayed.num_programs == 0


@BACKENDS
@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_compiled_function_in_it_is_a_part_of_it(backend, fullgraph, given_):
    replayed = replay(torch.compile(write, backend=backend, fullgraph=fullgraph))
    with torch.no_grad():
        check(replayed, given_)
    assert replayed.num_programs == 1


def stepped(*args):
    with torch_xla.step():
        return write(*args)


def synced(*args):
    result = write(*args)
    torch_xla.sync()
    return result


def marked(*args):
    result = write(*args)
    xm.mark_step()
    return result


def of_torch(cache, rows, slots):
    cache.add_(1)
    torch_xla.sync()
    return cache.sum()


@pytest.mark.filterwarnings("ignore:Use torch_xla.sync instead")
@pytest.mark.parametrize(
    "step", [torch_xla.compile(write), stepped, synced, marked, of_torch]
)
def test_what_runs_lazy_graphs_is_refused_and_leaves_all_as_it_was(step, given_):
    replayed = replay(step)
    cache, rows, _ = given_
    for _ in range(2):
        with pytest.raises(RuntimeError) as error:
            replayed(*given_)
        assert str(error.value) == (
            "replay: the function must not run lazy graphs, by torch_xla.sync() or a"
            " compilation, got one that does"
        )
        assert (cache.sum().item(), rows.sum().item()) == (0, 32)
    check(replay(write), given_)


def dual(x):
    with forward_ad.dual_level():
        replay(lambda x: x * 2)(forward_ad.make_dual(x, x))


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def under_a_mode(x):
    with Mode():
        replay(lambda x: x * 2)(x)


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda x: torch.func.vmap(replay(lambda x: x * 2))(x), "a transform of torch"),
        (torch.func.grad(replay(lambda x: (x * 2).sum())), "a transform of torch.func"),
        (
            lambda x: torch.func.jvp(replay(lambda x: x * 2), (x,), (x,)),
            "a transform of torch.func",
        ),
        (dual, "tensor argument 0 must not have a tangent"),
        (under_a_mode, "must not be traced under a TorchDispatchMode"),
    ],
)
def test_what_would_look_into_it_is_refused(call, text):
    with torch.enable_grad(), pytest.raises(RuntimeError, match=f"^replay: .*{text}"):
        call(torch.ones(3).to(torch_xla.device()))


def test_a_gradient_may_be_replayed():
    x = torch.ones(3).to(torch_xla.device())
    slope = replay(torch.func.grad(lambda x: (x * x).sum()))
    assert slope(x).tolist() == slope(x).tolist() == [2, 2, 2]
