"""Ops of users' kernels: schemas, what the launcher is told, what is refused."""

import inspect
import struct

import pytest
import torch
import torch_xla

import user_kernels
import xla_ops
from user_kernels import make_both, make_scale, make_scale_in_place, op_of, pretend_gpu
from xla_ops.core.checks import Checker
from xla_ops.core.errors import Problem
from xla_ops.extend import cuda_kernel, kernel_op, launch
from xla_ops.extend.launch import Given

CHECK = Checker("scale")


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XLA_OPS_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize(
    "kind, value, word",
    [
        ("u64", Given((2,), torch.float32, 1), "a1"),
        ("u64", Given((2,), torch.float32, 0, True), "r0"),
        ("u64", None, "null"),
        ("u64", 7, "v0700000000000000"),
        ("u64", -1, "v" + "ff" * 8),
        ("u32", -2, "vfeffffff"),
        ("u32", 2**32 - 1, "vffffffff"),
        ("u32", True, "v01000000"),
        ("u16", 258, "v0201"),
        ("u8", True, "v01"),
        ("s8", -128, "v80"),
        ("f32", 0.5, "v" + struct.pack("<f", 0.5).hex()),
        ("f32", 3, "v" + struct.pack("<f", 3).hex()),
        ("f32", 1e39, "v" + struct.pack("<f", float("inf")).hex()),
        ("f64", 0.1, "v" + struct.pack("<d", 0.1).hex()),
    ],
)
def test_parameters_are_packed_by_the_kernels_types(kind, value, word):
    assert launch.pack(CHECK, "parameter 0", kind, value) == word


@pytest.mark.parametrize(
    "kind, value, text",
    [
        ("u32", 0.5, "be an int, as the kernel has u32, got 0.5"),
        ("u32", 2**32, "fit in 4 bytes, got 4294967296"),
        ("u32", -(2**31) - 1, "fit in 4 bytes, got -2147483649"),
        ("u8", 256, "fit in 1 bytes, got 256"),
        (
            "f32",
            Given((2,), torch.int8, 1),
            "be a number, as .* has f32, got operand 1",
        ),
        ("u32", None, "be a number, as the kernel has u32, got None"),
        ("b8[12]", 1, r"be a buffer, an int, a float or a double .*, got b8\[12\]"),
        ("u64", Given((2,), torch.int8), "be one of the arguments or results, got .*"),
        ("u64", "text", "be a buffer, a number or None, got 'text'"),
    ],
)
def test_parameters_that_do_not_fit(kind, value, text):
    with pytest.raises(ValueError, match=f"^scale: parameter 3 must {text}$"):
        launch.pack(CHECK, "parameter 3", kind, value)


def test_schema():
    signature = kernel_op.parse(
        "f", "(Tensor(a!) x, int n, float a=0.5, bool b=True) -> ()"
    )
    assert [a.name for a in signature.arguments] == ["x", "n", "a", "b"]
    assert [a.name for a in signature.written] == ["x"]
    assert [a.default for a in signature.arguments] == ["", "", "0.5", "True"]
    assert signature.num_results == 0
    assert kernel_op.parse("f", "(Tensor x) -> (Tensor, Tensor)").num_results == 2


@pytest.mark.parametrize(
    "schema, text",
    [
        (
            "(Tensor x) > Tensor",
            r"be one of torch's, as .*, got '\(Tensor x\) > Tensor'",
        ),
        (
            "(Tensor[] x) -> Tensor",
            r"be of Tensors, .* and bools, got List\[Tensor\] x",
        ),
        ("(Tensor x, str s) -> Tensor", "be of Tensors, .* and bools, got str s"),
        ("(Tensor(a!) x) -> Tensor(a!)", "return new Tensors, got .*"),
        ("(Tensor x) -> int", "return new Tensors, got .*"),
        ("(Tensor x) -> ()", "return or write a Tensor, got .*"),
        ("(int n) -> Tensor", "take a Tensor, got .*"),
    ],
)
def test_schema_that_no_kernel_can_have(schema, text):
    with pytest.raises(ValueError, match=f"^f: schema must {text}"):
        kernel_op.parse("f", schema)


@pytest.mark.parametrize(
    "sizes, text",
    [
        ((0, 1, 1, 0), "grid must be one to three ints from 1 to .*, got 0"),
        (
            ((1, 65536), 1, 1, 0),
            r"grid must be .*\[2147483647, 65535, 65535\], got \(1, ",
        ),
        ((2**31, 1, 1, 0), "grid must be .*, got 2147483648"),
        ((1.5, 1, 1, 0), "grid must be .*, got 1.5"),
        (((1, 1, 1, 1), 1, 1, 0), "grid must be .*"),
        ((1, 1025, 1, 0), "block must be one to three ints .*, got 1025"),
        (
            (1, (512, 4), 1, 0),
            r"block must have at most 1024 threads, got \[512, 4, 1\]",
        ),
        ((6, 32, 4, 0), r"grid must be a multiple of the cluster \[4, 1, 1\], got "),
        ((16, 32, 32, 0), "cluster must be .*, got 32"),
        (((4, 8), 32, (4, 8), 0), "cluster must have at most 16 blocks, got "),
        (
            (1, 32, 1, 232449),
            "shared_bytes must be an int from 0 to 232448, got 232449",
        ),
        ((1, 32, 1, -1), "shared_bytes must be an int from 0 to 232448, got -1"),
    ],
)
def test_sizes_beyond_cudas_limits(sizes, text):
    with pytest.raises(ValueError, match=f"^scale: {text}"):
        launch.check_sizes(CHECK, *sizes)


def test_sizes():
    found = launch.check_sizes(CHECK, (4, 2), 128, 2, 1024)
    assert found == ((4, 2, 1), (128, 1, 1), (2, 1, 1), 1024)


def test_function_has_the_schemas_signature():
    scale = make_scale()
    assert str(inspect.signature(scale)) == "(x, a=2.0)"
    assert scale.__name__ == "scale"
    with pytest.raises(TypeError, match=r"^scale\(\) missing 1 required .*: 'x'"):
        scale()
    with pytest.raises(TypeError, match="^scale: x must be a tensor, got int"):
        scale(3)
    with pytest.raises(TypeError, match="^scale: a must be a float, got 'much' "):
        scale(torch.ones(2), "much")


def test_a_name_may_come_again():
    """A notebook's cell is run once more; an op of this package keeps its name."""
    first, second = make_scale(), make_scale()
    x = torch.ones(2)
    assert torch.equal(first(x, 3), second(x, 3))
    source = user_kernels.SCALE.replace("scale", "rms_norm")
    mine = cuda_kernel(
        source,
        "rms_norm",
        "(Tensor x) -> Tensor",
        grid=1,
        block=1,
        reference=lambda x: x + 7,
    )
    assert torch.equal(mine(x), x + 7)
    ours = torch.ops.xla_ops.rms_norm(torch.tensor([3.0, 4.0]), torch.ones(2), 1e-6)
    assert torch.allclose(ours, torch.tensor([0.8485, 1.1314]), atol=1e-4)


def test_what_the_launcher_is_told(monkeypatch):
    codes = pretend_gpu(monkeypatch)
    make_scale()
    call = op_of("scale").lowered((torch.ones(3, 200), 0.5)).call
    (code,) = codes
    assert call.target == "xla_ops.launch_kernel"
    assert dict(call.attributes) == {
        "op": "scale",
        "kernel": "scale",
        "code": code.digest,
        "code_bytes": len(code.image),
        "grid": "3 1 1",
        "block": "256 1 1",
        "cluster": "1 1 1",
        "shared_bytes": 0,
        "alignment": 1,
        "guarded": "",
        "parameters": "a0 v0000003f r0 v58020000",
    }
    assert call.operands == ("x",) and not call.aliases


def test_what_the_launcher_is_told_of_a_written_argument(monkeypatch):
    pretend_gpu(monkeypatch)
    make_scale_in_place()
    op = op_of("scale_")
    assert op.arguments == ("x", "a", "donor")
    call = op.lowered((torch.ones(600), 0.5, None)).call
    assert call.aliases == {0: "x"}
    assert call.attributes["parameters"] == "a0 v0000003f a0 v58020000"


def test_results_come_after_what_is_written(monkeypatch):
    pretend_gpu(monkeypatch)
    cuda_kernel(
        "__global__ void f(float* x, const int* n, float* y, double* sum) {}",
        "f",
        "(Tensor n, Tensor(a!) x, Tensor(b!) y) -> Tensor",
        parameters=lambda n, x, y, total: (x, n, y, total),
        results=lambda n, x, y: x.like([4], torch.float64),
        grid=1,
        block=1,
    )
    op = op_of("f")
    args = {"x": torch.ones(2), "y": torch.ones(3), "n": torch.ones(1).int()}
    assert op.arguments == tuple(args)
    call = op.lowered(tuple(args.values())).call
    assert call.operands == ("x", "y", "n") and call.aliases == {0: "x", 1: "y"}
    assert [tuple(spec.shape) for spec in call.results] == [(2,), (3,), (4,)]
    assert call.results[2].dtype == torch.float64
    assert call.attributes["parameters"] == "a0 a2 a1 r2"


def test_debug_mode_has_results_computed_between_guards(monkeypatch, debug_mode):
    pretend_gpu(monkeypatch)
    make_both()
    x = torch.ones(5, 100, dtype=torch.float16)
    call = op_of("both").lowered((x, x)).call
    assert call.attributes["guarded"] == "0:2 1:3"
    assert [tuple(spec.shape) for spec in call.scratch] == [(1512,), (1512,)]
    assert call.attributes["parameters"].split()[2:4] == ["r0", "r1"]
    # What is written lies where it lies.
    make_scale_in_place()
    call = op_of("scale_").lowered((torch.ones(600), 0.5, None)).call
    assert call.attributes["guarded"] == "" and call.scratch == ()


def test_debug_mode_makes_plans_of_its_own():
    scale = make_scale()
    op, x = op_of("scale"), torch.ones(3, device="xla")
    scale(x)
    (first,) = op._plans.values()
    xla_ops.set_debug(True)
    try:
        scale(x)
    finally:
        xla_ops.set_debug(False)
    (second,) = op._plans.values()
    assert second is not first
    scale(x)
    (third,) = op._plans.values()
    scale(x)
    assert list(op._plans.values()) == [third] and third is not second


@pytest.mark.parametrize(
    "capability, most", [((9, 0), 232448), ((8, 6), 101376), ((7, 5), 65536)]
)
def test_shared_memory_of_the_machine(monkeypatch, capability, most):
    pretend_gpu(monkeypatch, capability)
    make = lambda n: make_scale(shared_bytes=lambda x, a: n)  # noqa: E731
    make(most)
    assert op_of("scale").lowered((torch.ones(3), 1.0)).call.attributes[
        "shared_bytes"
    ] == (most)
    make(most + 1)
    with pytest.raises(
        ValueError, match=f"^scale: shared_bytes must be .* to {most}, "
    ):
        op_of("scale").lowered((torch.ones(3), 1.0))


def test_count_of_parameters(monkeypatch):
    pretend_gpu(monkeypatch)
    cuda_kernel(user_kernels.SCALE, "scale", "(Tensor x) -> Tensor", grid=1, block=1)
    text = (
        r"scale: parameters must be the 4 that the kernel takes, got 2: \['operand 0', "
        r"'result 0'\]"
    )
    with pytest.raises(ValueError, match=text):
        op_of("scale").lowered((torch.ones(3),))


def test_bad_source_raises_where_the_call_is_traced(monkeypatch):
    pretend_gpu(monkeypatch)
    source = "__global__ void broken(float* x) { x[0] = y; }"
    cuda_kernel(source, "broken", "(Tensor(a!) x) -> ()", grid=1, block=1)
    with pytest.raises(ValueError, match=r'(?s)^broken: source .*"y" is undefined'):
        op_of("broken").lowered((torch.ones(3), None))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.uint16])
def test_dtype_that_no_call_carries(dtype):
    rule = "be of a dtype that XLA's calls carry, got "
    with pytest.raises(ValueError, match=f"^scale: x must {rule}{str(dtype)[6:]}"):
        make_scale()(torch.ones(2, dtype=dtype))


@pytest.mark.parametrize(
    "results, got",
    [
        (lambda x, a: None, "None"),
        (lambda x, a: (x, x), "2: "),
        (lambda x, a: [2, 3], "2: "),
        (lambda x, a: [], "0: "),
    ],
)
def test_results_that_are_none(results, got):
    scale = make_scale(results=results)
    rule = "give 1 of a shape and a dtype, as the arguments are"
    with pytest.raises(ValueError, match=f"^scale: results must {rule}, got {got}"):
        scale(torch.ones(2))


def test_reference_that_gives_something_else():
    both = make_both()
    x = torch.ones(2)
    assert len(both(x, x)) == 2
    wrong = cuda_kernel(
        user_kernels.SCALE,
        "scale",
        "(Tensor x) -> Tensor",
        grid=1,
        block=1,
        reference=lambda x: x.double(),
    )
    rule = r"give float32 \[2\], got float64 \[2\]"
    with pytest.raises(ValueError, match=f"^scale: reference must {rule}"):
        wrong(x)


def test_reference_that_gives_a_tensor_of_another_device():
    scale = make_scale(reference=lambda x, a: x.cpu())
    rule = r"give float32 \[2\], got float32 \[2\] on cpu"
    with pytest.raises(ValueError, match=f"^scale: reference must {rule}$"):
        scale(torch.ones(2, device=torch_xla.device()))


@pytest.mark.parametrize("device", ["cpu", "xla"])
@pytest.mark.parametrize(
    "reference",
    [lambda x, y: (x, y), lambda x, y: (x[:], x.detach()), lambda x, y: (y * 1,) * 2],
    ids=["arguments", "views of one", "one twice"],
)
def test_results_of_a_reference_are_tensors_of_their_own(reference, device):
    both = make_both(reference=reference)
    given = [t.to(device) for t in (torch.ones(2), torch.ones(2))]
    results = both(*given)
    for t in (*given, *results):
        t.add_(1)
    assert all(t.tolist() == [2, 2] for t in (*given, *results))


@pytest.mark.parametrize("argument", ["parameters", "results", "reference"])
def test_what_must_be_a_function(argument):
    rule = r"be a function or None, got \(1, 2\)"
    with pytest.raises(ValueError, match=f"^scale: {argument} must {rule}"):
        make_scale(**{argument: (1, 2)})


def test_schema_that_is_no_text():
    with pytest.raises(ValueError, match=r"^scale: schema must be a str, got NoneType"):
        cuda_kernel(user_kernels.SCALE, "scale", None, grid=1, block=1)


def test_no_gpu_and_no_reference():
    scale = cuda_kernel(
        user_kernels.SCALE, "scale", "(Tensor x) -> Tensor", grid=1, block=1
    )
    with pytest.raises(Problem) as error:
        scale(torch.ones(2))
    assert "reference must be given where no GPU runs the kernel" in error.value.what
    assert "pass reference=" in error.value.fix
    with pytest.raises(Problem):
        scale(torch.ones(2, device="xla"))


def test_says_once_that_the_reference_runs(recwarn):
    kernel_op._tell_of_reference.cache_clear()
    scale = make_scale()
    for _ in range(2):
        scale(torch.ones(2))
        scale(torch.ones(2, device="xla"))
    texts = [str(w.message) for w in recwarn if "reference" in str(w.message)]
    assert texts == [
        "scale: its reference function runs, because the device is the CPU"
    ]
    (warning,) = [w for w in recwarn if "reference" in str(w.message)]
    assert warning.filename == __file__


def test_gradient_of_what_is_written_is_refused():
    from xla_ops.core.gradients import Gradient

    with pytest.raises(ValueError, match="^scale_: gradient must be absent where an "):
        make_scale_in_place(gradient=Gradient(lambda _: {}))
