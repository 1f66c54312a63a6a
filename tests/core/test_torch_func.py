"""Ops under torch.func's transforms, several of them too, and under make_fx."""

import warnings

import pytest
import torch
import torch_xla
from torch.autograd import forward_ad
from torch.func import functional_call, grad, grad_and_value, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import xla_ops
from support import Path

EAGER = pytest.mark.parametrize("path", ["cpu", "lazy"])
ONCE = "xla_ops.rms_norm_backward: has no gradient: grad requires one"
CACHE = (4, 4, 2, 8)


@pytest.fixture(autouse=True)
def _grad_mode():
    # Torch counts devices at the first backward of a process: XLA's must be there.
    torch_xla.device()
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        yield


def exact(x, w):
    """rms_norm, of which torch knows all derivatives."""
    x = x.double()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * w.double()


def close(got, wanted):
    torch.testing.assert_close(got.double(), wanted.double(), rtol=1e-4, atol=1e-5)


def rows(path, *shapes):
    return Path(path).put([torch.randn(shape) for shape in shapes])


@EAGER
@pytest.mark.parametrize(
    "second",
    [
        lambda f: grad(lambda x: grad(f)(x).sum()),
        lambda f: grad(lambda x: (grad(f)(x) * x).sum()),
        lambda f: lambda x: vjp(grad(f), x)[1](x)[0],
        lambda f: vmap(grad(lambda x: grad(f)(x).sum())),
    ],
    ids=["alone", "beside another term", "vjp", "of each in a batch"],
)
def test_a_second_derivative_raises(second, path):
    """It was zero, without a word: torch turned the outer level off in the inner."""
    x, w = rows(path, (3, 16), (16,))
    with pytest.raises(RuntimeError, match=ONCE):
        second(lambda x: xla_ops.rms_norm(x, w).pow(3).sum())(x)


@EAGER
def test_levels_are_differentiated_each_for_itself(path):
    """Each level by other arguments, so no second derivative is needed."""
    x, y, w = rows(path, (3, 16), (3, 16), (16,))

    def f(norm):
        def inner(a):
            return grad(lambda b: (norm(a * x, w) * b).sum())(y).square().sum()

        return grad(inner)(x)

    close(f(xla_ops.rms_norm), f(exact))


@EAGER
@pytest.mark.parametrize(
    "value",
    [
        lambda f, x: vjp(f, x)[0],
        lambda f, x: grad_and_value(f)(x)[1],
        lambda f, x: vmap(grad_and_value(f))(x)[1].sum(),
    ],
    ids=["vjp", "grad_and_value", "each of a batch"],
)
@pytest.mark.parametrize("outer", ["backward", "grad"])
def test_what_a_transform_returns_is_differentiable(outer, value, path):
    x, w = rows(path, (3, 16), (16,))

    def f(norm):
        def loss(x):
            return value(lambda x: norm(x, w).square().sum(), x)

        if outer == "grad":
            return grad(loss)(x)
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(loss(leaf), leaf)[0]

    close(f(xla_ops.rms_norm), f(exact))


@EAGER
def test_forward_mode_around_a_transform_raises(path):
    x, w = rows(path, (3, 16), (16,))
    text = "xla_ops.rms_norm: has no gradient: input has a tangent"
    with pytest.raises(RuntimeError, match=text):
        jvp(lambda x: vjp(lambda x: xla_ops.rms_norm(x, w), x)[0], (x,), (x,))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        with pytest.raises(RuntimeError, match=text):
            vjp(lambda x: xla_ops.rms_norm(x, w), dual)


@EAGER
def test_no_grad_inside_ends_the_inner_level_alone(path):
    x, w = rows(path, (3, 16), (16,))

    def f(norm):
        def inner(x):
            with torch.no_grad():
                return grad(lambda x: norm(x, w).square().sum())(x)

        return grad(lambda x: (inner(x) * x).sum())(x)

    close(f(xla_ops.rms_norm), f(exact))


def write_caches(row, caches):
    slots = torch.tensor([1, 5, 14], device=row.device)
    xla_ops.reshape_and_cache_flash(row, 2 * row, *caches, slots)


def copy_pages(row, caches):
    write_caches(row, caches)
    pairs = torch.tensor([[0, 2]], device=row.device)
    xla_ops.copy_blocks([caches[0]], [caches[1]], pairs)
    xla_ops.swap_blocks(caches[0], caches[1], pairs)


def norm_in_place(row, caches):
    key_cache, value_cache = caches
    weight = torch.ones(8, device=row.device)
    torch.ops.xla_ops.fused_add_rms_norm(key_cache, value_cache, weight, 1e-6)
    torch.ops.xla_ops.rms_norm.out(value_cache[1:], key_cache[1:], weight, 1e-6)


def rotate_in_place(row, caches):
    places = torch.arange(16, device=row.device)
    table = torch.linspace(-1, 1, 16 * 8, device=row.device).view(16, 8)
    query, key = (t.view(16, 16) for t in caches)
    torch.ops.xla_ops.rotary_embedding(places, query, key, 8, table, True)


def penalise(row, caches):
    logits = caches[0].view(16, 16)
    mask = logits > 0
    penalties = torch.full((16,), 2.0, device=row.device)
    xla_ops.apply_repetition_penalties_(logits, mask, mask, penalties)


UPDATES = pytest.mark.parametrize(
    "update", [write_caches, copy_pages, norm_in_place, rotate_in_place, penalise]
)


@EAGER
@UPDATES
@pytest.mark.parametrize("where", ["made inside", "one stacked", "made outside"])
@pytest.mark.parametrize("transform", ["grad", "jvp", "grad of grad"])
def test_updates_inside_a_transform(transform, where, update, path):
    """As outside; rows that ask for a derivative are refused, so those here do not."""
    (row,) = rows(path, (3, 2, 8))
    wanted = [torch.ones(CACHE, device=row.device) for _ in range(2)]
    update(row, wanted)
    outside = [torch.ones(CACHE, device=row.device) for _ in range(2)]

    def f(x):
        if where == "made inside":
            caches = [x.new_ones(CACHE) for _ in range(2)]
        elif where == "one stacked":
            caches = x.new_ones(2, *CACHE).unbind(0)
        else:
            caches = outside
        level = x.detach() if transform != "jvp" else row
        update(level, caches)
        total = sum((i + 1) * t.sum() for i, t in enumerate(caches))
        return (total * x).sum()

    total = sum((i + 1) * t.sum() for i, t in enumerate(wanted))
    if transform == "jvp":
        close(jvp(f, (row,), (torch.ones_like(row),))[1], total * row.numel())
    elif transform == "grad":
        close(grad(f)(row), total.expand(row.shape))
    elif where != "made outside":
        twice = grad(lambda y: (grad(f)(row) * y.square()).sum())(row)
        close(twice, 2 * total * row)
    else:  # as torch says of its own operations
        with pytest.raises(RuntimeError, match="would mutate a captured Tensor"):
            grad(lambda y: (grad(f)(row) * y.square()).sum())(row)
        wanted = [torch.ones_like(t) for t in outside]
    if where == "made outside":
        for got, value in zip(outside, wanted, strict=True):
            close(got, value)


def test_functional_call_with_a_cache_as_buffer():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("kv", torch.zeros(2, *CACHE))
            self.weight = torch.nn.Parameter(torch.ones(8))

        def forward(self, row):
            normed = xla_ops.rms_norm(row, self.weight)
            write_caches(normed.detach(), self.kv.unbind(0))
            return (normed * self.kv[0].sum()).sum()

    layer = Layer()
    row = torch.randn(3, 2, 8)
    layer(row).backward()
    kv = torch.zeros(2, *CACHE)
    weights = {"weight": torch.ones(8)}
    call = lambda w: functional_call(layer, {**w, "kv": kv}, (row,))  # noqa: E731
    close(grad(call)(weights)["weight"], layer.weight.grad)
    close(kv, layer.kv)


@UPDATES
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("form", ["whole", "stacked"])
def test_make_fx_takes_down_what_is_written(form, mode, update):
    """Of CPU tensors, whose memory is written where nobody looks on."""

    def f(row, *caches):
        caches = caches[0].unbind(0) if form == "stacked" else caches
        update(row, caches)
        return caches[0].sum() + 2 * caches[1].sum()

    row = torch.randn(3, 2, 8)
    shapes = [(2, *CACHE)] if form == "stacked" else [CACHE, CACHE]
    copies = lambda: [torch.ones(shape) for shape in shapes]  # noqa: E731
    graph = make_fx(f, tracing_mode=mode, _allow_non_fake_inputs=True)(row, *copies())
    wanted, got = copies(), copies()
    close(graph(2 * row, *got), f(2 * row, *wanted))
    assert all(map(torch.equal, got, wanted))
