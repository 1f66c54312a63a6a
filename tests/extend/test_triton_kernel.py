"""A Triton kernel as an op: compiled here without a GPU, run by its reference."""

import pytest
import torch
import triton

import user_triton
from support import Path, same
from user_kernels import op_of, pretend_gpu
from xla_ops.core.errors import Problem
from xla_ops.extend import ceil_div, launch, timing, triton_kernel, triton_kernels

pytestmark = pytest.mark.filterwarnings("ignore:.*its reference function runs")


# One pointer in Triton 3.4, two later.
SCRATCH = "null" if triton.__version__.startswith("3.4") else "null null"


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XLA_OPS_CACHE_DIR", str(tmp_path))
    return tmp_path / "kernels"


@pytest.fixture
def compiled(monkeypatch):
    """The constants and options that were compiled for, and not taken from disk."""
    calls = []
    compile_ = triton_kernels._TritonKernel._compiled

    def record(self, special, choice, machine):
        calls.append((dict(special.constants), dict(choice.options)))
        return compile_(self, special, choice, machine)

    monkeypatch.setattr(triton_kernels._TritonKernel, "_compiled", record)
    return calls


def make_add(**options):
    given = {"constants": {"BLOCK": 256}} | options
    return triton_kernel(
        user_triton.add_kernel,
        "(Tensor x, Tensor y, float a) -> Tensor",
        parameters=lambda x, y, a, out: (x, y, out, x.numel(), a),
        grid=lambda x, y, a, meta: ceil_div(x.numel(), meta["BLOCK"]),
        reference=lambda x, y, a: x + a * y,
        name="add",
        **given,
    )


def make_tuned(**options):
    return triton_kernel(
        user_triton.tuned_kernel,
        "(Tensor(a!) x) -> ()",
        parameters=lambda x: (x, x.numel()),
        grid=lambda x, meta: ceil_div(x.numel(), meta["BLOCK"]),
        reference=lambda x: 2 * x,
        **options,
    )


def lowered(name, *args):
    return op_of(name).lowered(args).call


@pytest.mark.parametrize("name", ["cpu", "lazy", "compiled", "dispatched"])
def test_computes(name):
    path, add, double = Path(name), make_add(), make_tuned()
    x, y = torch.randint(9, (2, 300)).float()

    def program(x, y):
        double(x)
        return add(x, y, 0.5)

    got, (after, _) = path.run(program, x, y)
    assert same(after, 2 * x) and same(got, 2 * x + 0.5 * y)


def test_what_the_launcher_is_told(monkeypatch):
    codes = pretend_gpu(monkeypatch)
    make_add()
    x = torch.ones(600)
    call = lowered("add", x, x, 0.5)
    (code,) = codes
    assert code.image[:4] == b"\x7fELF"
    assert dict(call.attributes) == {
        "op": "add",
        "kernel": "add_kernel",
        "code": code.digest,
        "code_bytes": len(code.image),
        "grid": "3 1 1",
        "block": "128 1 1",
        "cluster": "1 1 1",
        "shared_bytes": 0,
        "alignment": 16,
        "guarded": "",
        # Behind the kernel's own stand scratch memory, its own and the profiler's.
        "parameters": f"a0 a1 r0 v58020000 v0000003f {SCRATCH}",
    }
    own = ("u64", "u64", "u64", "u32", "f32")
    assert code.parameters == (*own, *["u64"] * len(SCRATCH.split()))


def test_ints_are_specialised_as_triton_does(monkeypatch, compiled):
    pretend_gpu(monkeypatch)
    make_add()
    parameters = {}
    for n in (1, 5, 7, 16, 48):
        x = torch.ones(n)
        parameters[n] = lowered("add", x, x, 2.0).attributes["parameters"].split()[3]
    # 1 is part of the code; 5 and 7 share it, and so do multiples of 16.
    assert parameters == {
        1: "v00000040",
        5: "v05000000",
        7: "v07000000",
        16: "v10000000",
        48: "v30000000",
    }
    assert len(compiled) == 3


def test_long_ints_nulls_and_bools(monkeypatch):
    pretend_gpu(monkeypatch)
    special = make_special()
    types = lambda *values: [  # noqa: E731
        special._specialise(values, {"BLOCK": 256}).types[p.name]
        for p in special.fn.params
        if p.name != "BLOCK"
    ]
    x = launch.Given((4,), torch.bfloat16, 0)
    assert types(x, x, x, 2**31, 0.5) == ["*bf16", "*bf16", "*bf16", "i64", "fp32"]
    assert types(x, None, x, 2**63, True)[1:] == ["constexpr", "*bf16", "u64", "i1"]
    with pytest.raises(ValueError, match="^add: parameter n must fit in 8 bytes, got "):
        types(x, x, x, 2**64, 0.5)
    with pytest.raises(
        ValueError, match="^add: parameter a must be a buffer, a number "
    ):
        types(x, x, x, 4, "text")


def make_special():
    make_add()
    return op_of("add").lower.__self__.kernel


def test_shared_memory_and_warps_come_from_triton(monkeypatch):
    pretend_gpu(monkeypatch)
    triton_kernel(
        user_triton.product_kernel,
        "(Tensor x, Tensor y) -> Tensor",
        constants={"N": 64},
        grid=1,
        num_warps=8,
    )
    x = torch.ones(64, 64, dtype=torch.float16)
    attributes = lowered("product_kernel", x, x).attributes
    assert attributes["block"] == "256 1 1"
    assert attributes["shared_bytes"] >= 2 * x.nbytes


def test_clusters_multiply_the_grid(monkeypatch):
    pretend_gpu(monkeypatch)
    make_add(num_ctas=2)
    x = torch.ones(600)
    attributes = lowered("add", x, x, 2.0).attributes
    assert attributes["cluster"] == "2 1 1" and attributes["grid"] == "6 1 1"


def test_compiled_once_a_signature_and_kept(monkeypatch, compiled, folder):
    pretend_gpu(monkeypatch)
    x = torch.ones(600)
    for _ in range(2):
        make_add()
        lowered("add", x, x, 2.0)
    assert len(compiled) == 1
    make_add(constants={"BLOCK": 512})
    lowered("add", x, x, 2.0)
    make_add(num_warps=2)
    lowered("add", x, x, 2.0)
    make_add(num_stages=2)
    lowered("add", x, x, 2.0)
    lowered("add", x.half(), x.half(), 2.0)
    pretend_gpu(monkeypatch, (8, 0))
    lowered("add", x, x, 2.0)
    assert len(compiled) == 6
    for path in folder.glob("*.cubin"):
        path.write_bytes(b"cut")
    lowered("add", x, x, 2.0)
    assert len(compiled) == 7


def fake_times(monkeypatch, *times):
    """What timing a call's configurations gives; collects the calls."""
    calls = []

    def microseconds(check, launches, operands, results):
        calls.append((launches, operands, results))
        return list(times)

    monkeypatch.setattr(timing, "microseconds", microseconds)
    return calls


@pytest.mark.parametrize(
    "times, grid",
    [((5.0, 3.0), "3 1 1"), ((2.0, 3.0), "12 1 1"), ((None, 9.0), "3 1 1")],
)
def test_the_fastest_configuration_is_taken_and_kept(monkeypatch, times, grid):
    pretend_gpu(monkeypatch)
    calls = fake_times(monkeypatch, *times)
    x = torch.ones(3000)
    for _ in range(2):
        make_tuned()
        call = lowered("tuned_kernel", x, None)
        assert call.attributes["grid"] == grid
        assert call.attributes["parameters"] == f"a0 vb80b0000 {SCRATCH}"
    ((launches, operands, results),) = calls
    assert [one.block[0] for one in launches] == [64, 256]
    assert [tuple(spec.shape) for spec in operands] == [(3000,)]
    assert [tuple(spec.shape) for spec in results] == [(0,)]
    # Other shapes are another choice.
    lowered("tuned_kernel", torch.ones(4000), None)
    assert len(calls) == 2


def test_configurations_that_do_not_compile_are_left_out(monkeypatch):
    pretend_gpu(monkeypatch)
    calls = fake_times(monkeypatch, 1.0)
    configs = [
        triton.Config({"BLOCK": n}) for n in (300, 512)
    ]  # a power of two must be
    make_add(constants={}, configs=configs)
    x = torch.ones(600)
    assert lowered("add", x, x, 2.0).attributes["grid"] == "2 1 1"
    assert len(calls[0][0]) == 1
    assert [tuple(spec.shape) for spec in calls[0][2]] == [(600,)]
    make_add(constants={}, configs=configs[:1] * 2)
    with pytest.raises(ValueError, match="^add: fn must compile for .* 9.0 with "):
        lowered("add", x, x, 2.0)


def test_no_configuration_that_can_be_launched(monkeypatch):
    pretend_gpu(monkeypatch)
    fake_times(monkeypatch, None, None)
    make_tuned()
    with pytest.raises(
        ValueError, match="^tuned_kernel: configs must have one that can"
    ):
        lowered("tuned_kernel", torch.ones(9), None)


def test_a_kernel_that_does_not_compile(monkeypatch):
    pretend_gpu(monkeypatch)
    triton_kernel(
        user_triton.broken_kernel,
        "(Tensor(a!) x) -> ()",
        constants={"N": 16},
        grid=1,
    )
    text = r"(?s)^broken_kernel: fn must compile for compute capability 9.0 .*undefined"
    with pytest.raises(ValueError, match=text):
        lowered("broken_kernel", torch.ones(16), None)


def test_wrong_constants_and_parameters():
    x = torch.ones(4)
    rule = r"constants must be those of the kernel, \['BLOCK'\], got "
    with pytest.raises(ValueError, match=rf"^add: {rule}\[\]"):
        make_add(constants=None)(x, x, 1.0)
    with pytest.raises(ValueError, match=rf"^add: {rule}\['BLOCK', 'block'\]"):
        make_add(constants=lambda x, y, a: {"BLOCK": 4, "block": 4})(x, x, 1.0)
    wrong = triton_kernel(
        user_triton.add_kernel,
        "(Tensor x) -> Tensor",
        constants={"BLOCK": 4},
        grid=1,
        reference=lambda x: x + 1,
    )
    names = r"\['x', 'y', 'out', 'n', 'a'\]"
    rule = f"parameters must be those of the kernel, {names}, got 2"
    with pytest.raises(ValueError, match=f"^add_kernel: {rule}"):
        wrong(x)


@pytest.mark.parametrize("num_warps", [64, 3000])
def test_too_many_warps(num_warps):
    x = torch.ones(4)
    with pytest.raises(ValueError, match="^add: block must be .*, got"):
        make_add(num_warps=num_warps)(x, x, 1.0)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"name": 3}, "name must be a str, got 3"),
        ({"name": "a b"}, "name must be one of Python's, of ASCII, got 'a b'"),
        ({"num_warps": 0}, "num_warps must be a positive int, got 0"),
        ({"num_warps": "4"}, "num_warps must be a positive int, got '4'"),
        ({"num_stages": -1}, "num_stages must be a positive int, got -1"),
        ({"num_ctas": 2.0}, "num_ctas must be a positive int, got 2.0"),
        ({"configs": 3}, "configs must be a list of triton.Config, got 3"),
        ({"configs": [3]}, "configs must be a list of triton.Config, got 3"),
        ({"constants": 3}, "constants must be a dict, a function or None, got 3"),
    ],
)
def test_wrong_declarations_are_named(given, message):
    declared = {"schema": "(Tensor x) -> Tensor", "grid": 1}
    with pytest.raises(ValueError, match=message):
        triton_kernel(user_triton.add_kernel, **declared | given)


def test_constants_that_a_function_gives_are_a_dict():
    x = torch.ones(4)
    wrong = make_add(constants=lambda x, y, a: None)
    with pytest.raises(ValueError, match="^add: constants must give a dict, got None"):
        wrong(x, x, 1.0)


def test_grid_takes_the_constants_too():
    rule = r"take 4 arguments \(x, y, a, meta\), got a function of \(x, y, a\)"
    with pytest.raises(ValueError, match=f"^add: grid must {rule}"):
        triton_kernel(
            user_triton.add_kernel,
            "(Tensor x, Tensor y, float a) -> Tensor",
            grid=lambda x, y, a: 1,
            name="add",
        )


def test_functions_that_are_no_kernels():
    rule = "fn must be a function by triton.jit, or by triton.autotune over one"
    with pytest.raises(ValueError, match=rf"^pre_hook: {rule}, got function"):
        triton_kernel(user_triton.pre_hook, "(Tensor x) -> Tensor", grid=1)
    heuristics = triton.heuristics({"BLOCK": lambda args: 4})(user_triton.add_kernel)
    with pytest.raises(ValueError, match=rf"{rule}, got Heuristics"):
        triton_kernel(heuristics, "(Tensor x) -> Tensor", grid=1)
    with pytest.raises(
        ValueError, match="configs must be absent where fn is autotuned"
    ):
        make_tuned(configs=[triton.Config({"BLOCK": 4})])
    hooked = triton.Config({"BLOCK": 4}, pre_hook=user_triton.pre_hook)
    with pytest.raises(ValueError, match="^add: configs must have no pre_hook, got "):
        make_add(constants={}, configs=[hooked])


@pytest.mark.parametrize("version", ["3.3.1", "3.7.0", "4.0.0"])
def test_another_triton_is_refused_by_name(monkeypatch, version):
    pretend_gpu(monkeypatch)
    monkeypatch.setattr(triton, "__version__", version)
    make_add()
    with pytest.raises(Problem, match=f"must be 3.4 or 3.5 or 3.6, got {version}"):
        lowered("add", torch.ones(4), torch.ones(4), 1.0)


def test_other_parameters_than_known_are_refused(monkeypatch):
    pretend_gpu(monkeypatch)
    versions = dict.fromkeys(triton_kernels._VERSIONS, 4)
    monkeypatch.setattr(triton_kernels, "_VERSIONS", versions)
    make_add()
    with pytest.raises(
        Problem, match="its kernel [67] parameters, of which 9 are known"
    ):
        lowered("add", torch.ones(4), torch.ones(4), 2.0)
