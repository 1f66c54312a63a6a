"""extend/torch_op.py: operators of torch inside XLA programs, on the CPU: aten's, and
some in the manner of vLLM's (torch_ops.py). test_torch_op_errors.py has what is
refused."""

from __future__ import annotations

import gc
import resource
from concurrent import futures

import pytest
import torch
import torch_xla

import torch_ops
from support import addresses, copies_of, programs_with, same
from xla_ops.extend import Gradient, torch_op
from xla_ops.programs import replay

DEVICE = torch_xla.device()
BACKENDS = ["lazy", "openxla", "xla_ops"]

OUTSIDE = torch_ops.load()
NAMES = ["a", 'b "c" |\n']


def on(backend, f):
    if backend == "lazy":
        return f
    torch._dynamo.reset()
    return torch.compile(f, backend=backend, fullgraph=True)


def xla(*tensors):
    return [t.to(DEVICE) for t in tensors]


def uses_handler(*results) -> bool:
    program = torch_xla._XLAC._get_xla_tensors_hlo(list(results))
    return 'custom_call_target="xla_ops.torch_op"' in program


@pytest.fixture
def ab():
    torch.manual_seed(0)
    return torch.randn(3, 4), torch.randn(3, 4)


# Each: the operator, its arguments but for a and b, and the same in plain torch.
FUNCTIONAL = {
    "aten::add.Tensor": (lambda f, a, b: f(a, b, alpha=2), lambda a, b: a + 2 * b),
    "aten::mm": (
        lambda f, a, b: f(a, b.reshape(4, 3)),
        lambda a, b: a @ b.reshape(4, 3),
    ),
    "aten::cat": (lambda f, a, b: f([a, b], 1), lambda a, b: torch.cat([a, b], 1)),
    "aten::topk": (lambda f, a, b: f(a, 2), lambda a, b: torch.topk(a, 2)),
    "aten::split.Tensor": (lambda f, a, b: f(a, 2), lambda a, b: torch.split(a, 2)),
    "aten::sum.dim_IntList": (
        lambda f, a, b: f(a, [0], True, dtype=torch.bfloat16),
        lambda a, b: a.sum(0, keepdim=True, dtype=torch.bfloat16),
    ),
    "aten::clamp.Tensor": (
        lambda f, a, b: f(a, None, b),
        lambda a, b: torch.clamp(a, max=b),
    ),
    "aten::index.Tensor": (
        lambda f, a, b: f(a, [None, (b[0] > 0).long()]),
        lambda a, b: a[:, (b[0] > 0).long()],
    ),
    "aten::zeros_like": (
        lambda f, a, b: f(a, dtype=torch.int64, device=a.device, layout=torch.strided),
        lambda a, b: torch.zeros_like(a, dtype=torch.int64),
    ),
    "aten::permute": (lambda f, a, b: f(a, [1, 0]), lambda a, b: a.permute(1, 0)),
    "aten::native_layer_norm": (
        lambda f, a, b: f(a, [4], b[0], None, 1e-5),
        lambda a, b: torch.native_layer_norm(a, [4], b[0], None, 1e-5),
    ),
}


def listed(results) -> list[torch.Tensor]:
    results = [results] if isinstance(results, torch.Tensor) else results
    return [t.cpu() for t in results]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FUNCTIONAL)
def test_functional(name, backend, ab):
    call, plain = FUNCTIONAL[name]
    f = torch_op(name)
    expected = listed(plain(*ab))
    results = on(backend, lambda a, b: call(f, a, b))(*xla(*ab))
    for result, wanted in zip(listed(results), expected, strict=True):
        assert same(result, wanted)
    for result, wanted in zip(listed(call(f, *ab)), expected, strict=True):
        assert same(result, wanted)  # CPU tensors go to the operator itself


def test_the_handler_is_what_runs(ab):
    assert uses_handler(torch_op("aten::add.Tensor")(*xla(*ab)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_out_takes_the_result_and_its_old_value_is_not_passed(backend, ab, hlo_dump):
    f = torch_op("aten::add.out")
    out = torch.full((3, 4), float("nan"), device=DEVICE)
    torch_xla.sync()

    def step(a, b, out):
        f(a, b, out=out)
        return out * 1

    assert same(on(backend, step)(*xla(*ab), out).cpu(), ab[0] + ab[1])
    assert same(out.cpu(), ab[0] + ab[1])


def test_out_is_returned(ab):
    out = torch.empty(3, 4, device=DEVICE)
    assert torch_op("aten::add.out")(*xla(*ab), out=out) is out


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_place(backend, ab):
    f = torch_op("aten::add_.Tensor")
    a, b = xla(*ab)

    def step(a, b):
        f(a, b)
        f(a, b, alpha=2)
        return a + 0

    assert torch.allclose(on(backend, step)(a, b).cpu(), ab[0] + 3 * ab[1])
    assert torch.allclose(a.cpu(), ab[0] + 3 * ab[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_view_is_written_through(backend, ab):
    f = torch_op("aten::add_.Tensor")
    a, b = xla(*ab)

    def step(a, b):
        f(a[1:, :2], b[1:, :2])
        return a + 0

    expected = ab[0].clone()
    expected[1:, :2] += ab[1][1:, :2]
    assert same(on(backend, step)(a, b).cpu(), expected)
    assert same(a.cpu(), expected)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("backend", [*BACKENDS, "replay"])
def test_two_caches_of_a_call_stay_where_they_are(backend, layers, order):
    f = torch_op(f"{OUTSIDE}::accumulate")
    caches = xla(*[torch.zeros(50, 100) for _ in range(2 * layers)])[::order]
    x = torch.ones(50, 100, device=DEVICE)
    before = addresses(caches)

    def step(x, *caches):
        for i in range(0, len(caches), 2):
            f(caches[i], caches[i + 1], x)
        return x[0] + 1  # XLA gives a donated buffer to any result of its shape

    step = replay.replay(step) if backend == "replay" else on(backend, step)
    for _ in range(3):
        step(x, *caches)
        assert addresses(caches) == before
    for i, cache in enumerate(caches):
        assert cache[0, 0].item() == (3, 6)[i % 2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_whole_buffer_is_updated_where_it_lies(backend, hlo_dump):
    """No copy of it in any program, and the same address after each step."""
    size = 70_000 + BACKENDS.index(backend)
    f = torch_op("aten::add_.Tensor")
    cache, x = torch.zeros(size, device=DEVICE), torch.ones(size, device=DEVICE)
    before = addresses([cache])

    def step(cache, x):
        f(cache, x)
        return x[:3] * 2

    step = on(backend, step)
    for _ in range(4):
        step(cache, x)
        assert addresses([cache]) == before
    assert cache[:3].tolist() == [4, 4, 4]
    programs = programs_with((size,), hlo_dump)
    assert programs
    assert [copies_of((size,), program) for program in programs] == [[]] * len(programs)


def test_all_kinds_of_arguments_arrive(ab):
    f = torch_op(f"{OUTSIDE}::scale", meta=lambda x, *rest: torch.empty_like(x))
    x = xla(ab[0])[0]
    for factor in (0.1, 3, float("inf"), float("-inf"), 1e30, 5e-324, -0.0):
        result = f(x, factor, NAMES, [3, -4], True, None)
        assert same(result.cpu(), ab[0] * factor), factor
    assert f(x, float("nan"), NAMES, [3, -4], True, None).isnan().all().item()


@pytest.mark.parametrize("backend", BACKENDS)
def test_meta_may_say_that_a_result_is_an_argument(backend, ab):
    f = torch_op(
        f"{OUTSIDE}::two",
        outputs=("result",),
        meta=_two,
    )
    out, x = torch.empty(3, 4, device=DEVICE), xla(ab[0])[0]

    def step(out, x):
        first, total = f(out, x)
        return first * 1, total

    first, total = on(backend, step)(out, x)
    assert same(out.cpu(), ab[0] + 1)
    assert same(first.cpu(), ab[0] + 1)
    assert torch.allclose(total.cpu(), ab[0].sum())


def _two(result, x):
    return [result, x.new_empty(())]


def test_values_that_python_holds_for_equal_are_told_apart(ab):
    """1, 1.0 and True; 0.0 and -0.0; a tensor twice, and two tensors."""
    f, a = torch_op("aten::mul.Scalar"), xla(ab[0].int())[0]
    dtypes = [f(a, value).dtype for value in (1, 1.0, True)]
    assert dtypes == [torch.int32, torch.float32, torch.int32]
    g = torch_op("aten::copysign.Scalar")
    for value in (0.0, -0.0):
        result = g(xla(ab[0])[0], value).cpu()
        assert same(result, torch.copysign(ab[0], value))
    add = torch_op("aten::add.out")
    for other in (0, 1):
        x = xla(*ab)
        add(x[0], x[other], out=x[0])
        assert same(x[0].cpu(), ab[0] + ab[other])


def test_foreach_writes_a_list(ab):
    tensors = xla(*ab)
    torch_op("aten::_foreach_add_.Scalar")(tensors, 2.5)
    for t, before in zip(tensors, ab, strict=True):
        assert same(t.cpu(), before + 2.5)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.bool,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.uint8,
        torch.float16,
        torch.float32,
        torch.float64,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    ],
)
def test_dtypes(dtype):
    x = torch.tensor([0, 1, 1, 0]).to(dtype)
    result = torch_op("aten::clone")(x.to(DEVICE)).cpu()
    assert result.dtype == dtype
    assert same(result.float(), x.float())


@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (2, 3, 4, 5)])
def test_shapes(shape):
    x = torch.ones(shape)
    assert same(torch_op("aten::clone")(x.to(DEVICE)).cpu(), x)


def test_replayed(ab):
    add, update = torch_op("aten::add.Tensor"), torch_op("aten::add_.Tensor")

    def step(total, x):
        update(total, x)
        return add(total, x, alpha=3)

    fast = replay.replay(step)
    total, x = torch.zeros(3, 4, device=DEVICE), xla(ab[0])[0]
    for n in range(1, 5):
        result = fast(total, x)
        assert torch.allclose(result.cpu(), (n + 3) * ab[0], rtol=1e-5)
        assert torch.allclose(total.cpu(), n * ab[0], rtol=1e-5)


@torch.enable_grad()
def test_backward_raises_by_name_or_is_what_was_declared(ab):
    a, b = (t.requires_grad_() for t in xla(*ab))
    result = torch_op("aten::sub.Tensor")(a, b)
    with pytest.raises(RuntimeError, match=r"aten::sub\.Tensor: has no gradient: self"):
        result.sum().backward()
    with pytest.raises(RuntimeError, match="aten_add_: has no gradient: self"):
        torch_op("aten::add_.Tensor")(a, b)

    def compute(backward):  # of other - alpha * self
        (grad,) = backward.grads
        return {"self": -grad * backward.args["alpha"], "other": grad}

    f = torch_op("aten::rsub.Tensor", gradient=Gradient(compute))
    f(a, b, alpha=3).sum().backward()
    assert a.grad.cpu().unique().tolist() == [-3]
    assert b.grad.cpu().unique().tolist() == [1]


def test_autocast_leaves_arguments_as_they_are(ab):
    with torch.autocast("xla", torch.bfloat16):
        result = torch_op("aten::mm")(*xla(ab[0], ab[1].t().contiguous()))
    assert result.dtype == torch.float32


def test_many_calls_take_no_memory(ab):
    f, update = torch_op("aten::mul.Tensor"), torch_op("aten::add_.Tensor")
    x, total = torch.ones(64, 1024, device=DEVICE), torch.zeros(64, 1024, device=DEVICE)

    def run(times):
        for _ in range(times):
            update(total, f(x, x))
            torch_xla.sync()

    run(200)
    torch_xla.sync(wait=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run(1000)
    torch_xla.sync(wait=True)
    gc.collect()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert total[0, 0].item() == 1200
    assert grown < 32 * 1024  # KiB; a leak of every result would be 250 MiB


def test_calls_from_many_threads(ab):
    f, accumulate = torch_op("aten::mm"), torch_op(f"{OUTSIDE}::accumulate")
    a, b = xla(ab[0], ab[1].reshape(4, 3))
    expected = ab[0] @ ab[1].reshape(4, 3)

    def work(number):
        for _ in range(20):
            total, twice = xla(torch.zeros(3, 3), torch.zeros(3, 3))
            accumulate(total, twice, f(a, b))
            assert torch.allclose(total.cpu(), expected, atol=1e-6)
            assert torch.allclose(twice.cpu(), 2 * expected, atol=1e-6)
        return number

    with futures.ThreadPoolExecutor(4) as threads:
        assert list(threads.map(work, range(8))) == list(range(8))


def test_modes_of_the_calling_thread_do_not_reach_the_operator(ab):
    """XLA may run a program on the thread that asks for it."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if any(t.device.type == "cpu" for t in args if isinstance(t, torch.Tensor)):
                seen.append(function)
            return function(*args, **(kwargs or {}))

    result = torch_op("aten::mul.Tensor")(*xla(*ab))
    with Mode():
        torch_xla.sync(wait=True)
    assert not seen
    assert same(result.cpu(), ab[0] * ab[1])
