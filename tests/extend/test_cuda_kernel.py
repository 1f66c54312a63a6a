"""A user's CUDA kernel on every path to it; on a CPU by its reference."""

import doctest

import pytest
import torch
import torch_xla

import xla_ops
from support import Path, same
from user_kernels import make_both, make_scale, make_scale_in_place, op_of
from xla_ops.core.gradients import Gradient
from xla_ops.core.op import OPS
from xla_ops.core.sharding import Rule
from xla_ops.extend import cuda_kernels
from xla_ops.extend.cuda_kernels import pointed_types

pytestmark = pytest.mark.filterwarnings("ignore:.*its reference function runs")


@pytest.fixture(params=["cpu", "lazy", "compiled", "dispatched"])
def path(request):
    return Path(request.param)


def test_computes(path):
    scale = make_scale()
    x = torch.randn(3, 200)
    got, (after, _) = path.run(scale, x, 0.5)
    assert same(got, 0.5 * x) and same(after, x)
    got, _ = path.run(lambda x: scale(x) + scale(x, a=3.0), x)
    assert same(got, 2 * x + 3 * x)


def test_several_results_and_dtypes(path):
    both = make_both()
    for dtype in (torch.float32, torch.float16):
        x, y = torch.randn(2, 300).to(dtype)
        (total, difference), _ = path.run(both, x, y)
        assert same(total, x + y) and same(difference, x - y)
        assert total.dtype == dtype


def test_works_in_place(path):
    scale_ = make_scale_in_place()
    x = torch.randint(100, (3, 200)).float()  # XLA may round a product and sum once

    def update(x):
        old = x + 0
        scale_(0.5, x)
        scale_(x=x, a=3.0)
        return old, x + 1

    (old, new), (after,) = path.run(update, x)
    assert same(old, x)
    assert same(after, 3 * (0.5 * x)) and same(new, after + 1)


def test_works_in_place_in_a_view(path):
    scale_ = make_scale_in_place()
    x = torch.randn(4, 6)
    _, (after,) = path.run(lambda x: scale_(2.0, x[1:3]), x)
    wanted = x.clone()
    wanted[1:3] *= 2
    assert same(after, wanted)
    _, (after,) = path.run(lambda x: scale_(2.0, x[:, 1:3]), x)
    wanted = x.clone()
    wanted[:, 1:3] *= 2
    assert same(after, wanted)


def test_writes_several_and_returns(path):
    two = xla_ops.extend.cuda_kernel(
        """
        __global__ void two(const float* a, float* x, float* y, float* z) {
          x[threadIdx.x] += *a; y[threadIdx.x] -= *a;
          z[threadIdx.x] = x[threadIdx.x] * y[threadIdx.x];
        }""",
        "two",
        "(Tensor a, Tensor(a!) x, Tensor(b!) y) -> Tensor",
        results=lambda a, x, y: x,
        grid=1,
        block=lambda a, x, y: x.numel(),
        reference=lambda a, x, y: (x + a, y - a, (x + a) * (y - a)),
    )
    a, x, y = torch.tensor([2.0]), torch.randn(5), torch.randn(5)
    z, (_, new_x, new_y) = path.run(two, a, x, y)
    assert same(new_x, x + 2) and same(new_y, y - 2)
    assert same(z, (x + 2) * (y - 2))


def test_nothing_to_do(path):
    scale, scale_ = make_scale(), make_scale_in_place()
    got, _ = path.run(scale, torch.ones(0, 4))
    assert got.shape == (0, 4)
    _, (after,) = path.run(lambda x: scale_(2.0, x), torch.ones(0))
    assert after.shape == (0,)


def test_lowered_once_a_signature():
    scale = make_scale()
    op = op_of("scale")
    x = torch.ones(4, device=torch_xla.device())
    for a in (2.0, 2.0, 3.0):
        scale(x, a)
    assert len(op._plans) == 2


def test_dynamic_shapes():
    scale = make_scale()
    compiled = torch.compile(scale, backend="aot_eager", dynamic=True, fullgraph=True)
    for n in (3, 5, 700):
        x = torch.randn(n, 2)
        assert torch.equal(compiled(x), 2 * x)


def test_meta_tensors():
    both = make_both()
    x = torch.ones(3, 4, device="meta")
    total, _ = both(x, x)
    assert total.is_meta and total.shape == (3, 4)


def test_gradient():
    compute = lambda b: {"x": scale(b.grads[0], b.args["a"])}  # noqa: E731
    scale = make_scale(gradient=Gradient(compute))
    x = torch.randn(5, requires_grad=True)
    with torch.enable_grad():
        scale(x, 3.0).sum().backward()
    assert torch.equal(x.grad, torch.full((5,), 3.0))
    with (
        torch.enable_grad(),
        pytest.raises(RuntimeError, match="scale: has no gradient"),
    ):
        make_scale()(torch.ones(2, requires_grad=True)).sum().backward()


def test_splits_are_the_ops():
    rule = Rule({"x": "tokens columns"}, ("tokens columns",))
    make_scale(splits=rule)
    assert op_of("scale").splits is rule


def test_autocast():
    as_bf16 = lambda args, dtype: {"x": torch.float32}  # noqa: E731
    scale = make_scale(rule=as_bf16)
    with torch.autocast("cpu"):
        got = scale(torch.ones(3, dtype=torch.bfloat16))
    assert got.dtype == torch.float32


def test_dtype_that_the_source_does_not_have(path):
    scale = make_scale()
    rule = r"parameter 0 must be float32, as the kernel has float\*, got float64"
    error = (
        torch._dynamo.exc.TorchRuntimeError
        if path.name
        in (
            "compiled",
            "dispatched",
        )
        else ValueError
    )
    with pytest.raises(error, match=f"scale: {rule}"):
        path.run(scale, torch.ones(2).double())


@pytest.mark.parametrize(
    "text, types",
    [
        ("const float* x, float* y", ["float", "float"]),
        ("float const *x, volatile int *const __restrict__ y", ["float", "int"]),
        (
            "const unsigned char *x, int n, long long* y",
            ["unsigned char", "", "long long"],
        ),
        ("const T* x, void* y, __half *z", ["", "", "__half"]),
        ("const __nv_bfloat16* __restrict__ x", ["__nv_bfloat16"]),
        ("float** x, float x[4], Params p", ["", "", ""]),
        ("", [""]),
    ],
)
def test_types_are_read_from_plain_declarations(text, types):
    source = f"""
    // __global__ void f(double* commented) {{
    __device__ float g(int* y) {{ return 1; }}
    template <typename T>
    __global__ void __launch_bounds__(256) f(/* first */ {text}) {{ }}
    """
    assert pointed_types(source, "f") == types
    assert pointed_types(source, "g") == []


def test_ops_are_there_by_name():
    make_scale()
    name = op_of("scale").name
    assert name in OPS
    got = getattr(torch.ops.xla_ops, name)(torch.ones(2), 3.0)
    assert torch.equal(got, torch.full((2,), 3.0))


@pytest.mark.parametrize(
    "argument, names",
    [
        ("grid", "x, a"),
        ("block", "x, a"),
        ("results", "x, a"),
        ("shared_bytes", "x, a"),
        ("reference", "x, a"),
        ("parameters", "x, a, result0"),
    ],
)
def test_functions_take_the_schemas_arguments(argument, names):
    given = {"grid": 1, "block": 1, argument: lambda one: 1}
    count = len(names.split(", "))
    rule = rf"take {count} arguments \({names}\), got a function of \(one\)"
    with pytest.raises(ValueError, match=f"^scale: {argument} must {rule}"):
        xla_ops.extend.cuda_kernel(
            "__global__", "scale", "(Tensor x, float a) -> Tensor", **given
        )


def test_example_of_the_docstring():
    found = doctest.DocTestFinder(recurse=False).find(
        cuda_kernels.cuda_kernel, globs={"torch": torch, **vars(xla_ops.extend)}
    )
    result = doctest.DocTestRunner().run(found[0])
    assert result.attempted == 2 and result.failed == 0


def test_name_and_source():
    with pytest.raises(ValueError, match="^cuda_kernel: name must be given where"):
        xla_ops.extend.cuda_kernel("__global__", "f<int>", "", grid=1, block=1)
    with pytest.raises(ValueError, match="^f: source must have a __global__ function"):
        xla_ops.extend.cuda_kernel("kernel.cu", "f", "", grid=1, block=1)
