"""What an op does where torch asks for derivatives (core/gradients.py)."""

import warnings

import pytest
import torch
import torch.utils.checkpoint
import torch_xla
from torch.autograd import forward_ad
from torch.func import grad, jvp, vjp, vmap

import xla_ops
from support import Path, int32
from xla_ops.core import autocast, autograd, gradients, op
from xla_ops.core.custom_call import CustomCall
from xla_ops.core.hlo import Spec
from xla_ops.core.op import OPS
from xla_ops.programs.replay import replay

INPUT = (
    "xla_ops.rms_norm_backward: has no gradient: input requires one; use"
    " torch.no_grad()"
)
TANGENT = r"xla_ops\.rms_norm(_backward)?: has no gradient: input has a tangent"
EAGER = ["cpu", "lazy"]
BACKENDS = [
    ("openxla", "lazy"),
    ("xla_ops", "lazy"),
    ("aot_eager", "cpu"),
    ("inductor", "cpu"),
]


@pytest.fixture(autouse=True)
def _grad_mode():
    # Torch counts devices at the first backward of a process: XLA's must be there.
    torch_xla.device()
    with torch.enable_grad(), warnings.catch_warnings():
        # Torch warns where it drops a gradient: nothing here may.
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="There is a performance drop")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        yield


def norm(x, w):
    """An op that has no gradient, and looks like one that has."""
    ones = torch.ones_like(x)
    return torch.ops.xla_ops.rms_norm_backward_input(ones, x, w, None, 1e-6)


def inputs(path, *shapes, requires_grad=True):
    shapes = shapes or ((4, 16), (16,))
    return [
        t.requires_grad_(requires_grad)
        for t in Path(path).put([torch.randn(shape) for shape in shapes])
    ]


@pytest.mark.parametrize("path", EAGER)
def test_only_backward_raises(path):
    x, w = inputs(path)
    y = norm(x, w)
    assert y.requires_grad
    assert torch.equal(y, norm(x.detach(), w.detach()))
    with pytest.raises(RuntimeError, match=INPUT):
        (y.sum() + (2 * x).sum()).backward()
    assert x.grad is None and w.grad is None


@pytest.mark.parametrize("path", EAGER)
@pytest.mark.parametrize("which, name", [(0, "input"), (1, "weight")])
def test_names_the_argument_that_asks(path, which, name):
    args = [t.detach() for t in inputs(path)]
    args[which].requires_grad_()
    with pytest.raises(RuntimeError, match=rf"gradient: {name} requires one"):
        norm(*args).sum().backward()


@pytest.mark.parametrize("path", EAGER)
def test_ways_out(path):
    x, w = inputs(path)
    (norm(x.detach(), w.detach()).sum() + (2 * x).sum()).backward()
    assert torch.equal(x.grad, torch.full_like(x, 2))
    (norm(x, w).detach() * w).sum().backward()
    assert torch.equal(w.grad, norm(x, w).sum(0))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert not norm(x, w).requires_grad


@pytest.mark.parametrize("path", EAGER)
def test_results_require_a_gradient_where_torch_has_one_for_the_dtype(path):
    (x,) = inputs(path, (4, 16))
    codes, scale = xla_ops.dynamic_scaled_int8_quant(x)
    assert not codes.requires_grad and scale.requires_grad
    assert all(t.requires_grad for t in xla_ops.dynamic_scaled_fp8_quant(x))
    out, lse = xla_ops.merge_attn_states(
        *inputs(path, (3, 2, 8), (2, 3), requires_grad=False),
        *inputs(path, (3, 2, 8), (2, 3)),
    )
    assert out.requires_grad and lse.requires_grad


@pytest.mark.parametrize("path", EAGER)
@pytest.mark.parametrize("used", [0, 1])
def test_one_result_is_used(path, used):
    x, w = inputs(path)
    ones = torch.ones_like(x)
    # Of an op without a gradient.
    args = (ones, x, w, None, 1e-6, [1])
    result = torch.ops.xla_ops.rms_norm_backward(*args)[used]
    with pytest.raises(RuntimeError, match=INPUT):
        result.sum().backward()
    # And one with: nothing depends on the rest.
    x, residual, w = inputs(path, (4, 16), (4, 16), (16,))
    result = xla_ops.fused_add_rms_norm(x, residual, w)[used]
    result.sum().backward()
    assert torch.equal(x.grad, residual.grad)
    assert (w.grad == 0).all() == (used == 1)


@pytest.mark.parametrize("path", EAGER)
def test_no_result_is_used(path):
    x, w = inputs(path)
    (0 * x.sum() + norm(x, w).detach().sum()).backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("path", EAGER)
def test_the_public_names_of_attention(path):
    """Of what it has no gradient for: a cache."""
    (q, kv) = inputs(path, (4, 2, 8), (2, 1, 4, 2, 8))
    ends, table = Path(path).put((int32(0, 4), int32([0]).reshape(1, 1)))
    out, _ = xla_ops.flash_attn_varlen(
        q.detach(), kv[0], kv[1], ends, ends, 4, 4, block_table=table
    )
    with pytest.raises(RuntimeError, match=r"flash_attn_varlen: .* k requires one"):
        out.sum().backward()


@pytest.mark.parametrize("path", EAGER)
def test_double_backward(path):
    x, w = inputs(path)
    with pytest.raises(RuntimeError, match=INPUT):
        torch.autograd.grad(norm(x, w).sum(), x, create_graph=True)
    y = xla_ops.rms_norm(x, w).square().sum()
    (g,) = torch.autograd.grad(y, x, create_graph=True)
    assert g.requires_grad
    with pytest.raises(RuntimeError, match="rms_norm_backward: has no gradient: grad"):
        g.sum().backward()
    (g,) = torch.autograd.grad((x**3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=INPUT):
        norm(g, w.detach()).sum().backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant):
    x, w = inputs("cpu")
    y = torch.utils.checkpoint.checkpoint(norm, x, w, use_reentrant=use_reentrant)
    assert y.requires_grad
    with pytest.raises(RuntimeError, match=INPUT):
        y.sum().backward()


@pytest.mark.parametrize("path", EAGER)
def test_functional_transforms(path):
    x, w = inputs(path, requires_grad=False)
    y, pull = vjp(lambda x: norm(x, w), x)
    assert torch.equal(y, norm(x, w))
    with pytest.raises(RuntimeError, match=INPUT):
        pull(y)
    total = lambda x: norm(x, w).sum()  # noqa: E731
    for transformed in (
        grad(total),
        vmap(grad(total)),
        grad(lambda x: vmap(total)(x).sum()),
        grad(lambda x: grad(total)(x).sum()),
    ):
        with pytest.raises(RuntimeError, match=INPUT):
            transformed(x)
    assert torch.equal(vmap(lambda x: norm(x, w))(x), norm(x, w))
    assert torch.equal(
        grad(lambda w: (norm(x, x[0]) * w).sum())(w), norm(x, x[0]).sum(0)
    )


@pytest.mark.parametrize("path", EAGER)
def test_forward_mode(path):
    x, w = inputs(path, requires_grad=False)
    with pytest.raises(RuntimeError, match=TANGENT):
        jvp(lambda x: norm(x, w), (x,), (x,))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        with pytest.raises(RuntimeError, match=TANGENT):
            norm(dual, w)
        with pytest.raises(RuntimeError, match=TANGENT):
            torch.ops.xla_ops.rms_norm(torch.empty_like(x), dual, w, 1e-6)
        assert torch.equal(norm(x, w), norm(x, w))
    assert torch.equal(
        jvp(lambda x: 2 * x + norm(w, w), (x,), (x,))[1],
        2 * x,
    )


@pytest.mark.parametrize("backend, path", BACKENDS)
def test_compiled_only_backward_raises(backend, path):
    x, w = inputs(path)
    compiled = torch.compile(
        lambda x, w: norm(x, w) + 2 * x, backend=backend, fullgraph=True
    )
    y = compiled(x, w)
    assert y.requires_grad
    assert torch.allclose(y, norm(x, w) + 2 * x, atol=1e-5)
    with pytest.raises(RuntimeError, match=INPUT):
        y.sum().backward()
    assert x.grad is None


@pytest.mark.parametrize("backend, path", BACKENDS)
def test_compiled_detached(backend, path):
    x, w = inputs(path)
    compiled = torch.compile(
        lambda x, w: (norm(x, w).detach() * w + 2 * x).sum(),
        backend=backend,
        fullgraph=True,
    )
    compiled(x, w).backward()
    assert torch.allclose(x.grad, torch.full_like(x, 2))
    assert torch.allclose(w.grad, norm(x, w).sum(0), atol=1e-5)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_with_symbolic_sizes(backend):
    _, w = inputs("cpu")
    compiled = torch.compile(norm, backend=backend, fullgraph=True, dynamic=True)
    for rows in (3, 7):
        (x,) = inputs("cpu", (rows, 16))
        with pytest.raises(RuntimeError, match=INPUT):
            compiled(x, w).sum().backward()


def fronts() -> list[torch._ops.OpOverload]:
    """The ops that write into their arguments."""
    twins = {f"xla_ops::{name}_" for name in OPS}  # which a front calls
    names = [
        name
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith(("xla_ops::", "xla_gpu::", "xla::flash"))
        and name not in twins
    ]
    overloads = []
    for name in names:
        packet, _, overload = name.partition(".")
        namespace, _, packet = packet.partition("::")
        op = getattr(getattr(torch.ops, namespace), packet)
        overloads.append(getattr(op, overload or "default"))
    return [op for op in overloads if op._schema.is_mutable]


def any_value(argument: torch._C.Argument):
    kind = str(argument.type)
    if "List" in kind:
        return [torch.ones(2)]
    values = {"Tensor": torch.ones(2), "float": 1.0, "str": "auto", "bool": False}
    return None if "Optional" in kind else values.get(kind, 1)


# Those that are differentiated after all, in these arguments.
DIFFERENTIABLE = {"xla_ops::fused_qk_norm_rope": {"qkv", "q_weight", "k_weight"}}


@pytest.mark.parametrize("front", fronts(), ids=str)
def test_fronts_refuse_at_the_call(front):
    """Each tensor argument, before anything else is looked at."""
    arguments = front._schema.arguments
    plain = {a.name: any_value(a) for a in arguments}
    asked = 0
    for a in arguments:
        served = DIFFERENTIABLE.get(front._schema.name, ())
        if "Tensor" not in str(a.type) or a.name in served:
            continue
        t = torch.ones(2, requires_grad=True)
        is_list = "List" in str(a.type)
        label = f"{a.name}[0]" if is_list else a.name
        name = front._schema.name.partition("::")[2]
        wanted = f"xla_ops.{name}: has no gradient: {label} requires one; use torch.no"
        with pytest.raises(RuntimeError) as error:
            front(**{**plain, a.name: [t] if is_list else t})
        assert wanted in str(error.value)
        asked += 1
    assert asked


def test_fronts_refuse_nothing_without_grad_mode():
    x, w = inputs("cpu")
    result = torch.zeros_like(x).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.ops.xla_ops.rms_norm(result, x, w, 1e-6)
        assert torch.equal(result, xla_ops.rms_norm(x, w))
        result.zero_()


def write(k, kv, slots):
    xla_ops.reshape_and_cache_flash(k, k, *kv.unbind(0), slots)
    return kv.sum()


@pytest.mark.parametrize("backend, path", [(None, "cpu"), (None, "lazy"), *BACKENDS])
def test_cache_is_written_with_keys_of_a_layer(backend, path):
    linear = torch.nn.Linear(8, 8)
    x, kv, slots = torch.randn(2, 2, 8), torch.zeros(2, 6, 4, 2, 8), torch.arange(2)
    wanted = 2 * linear(x).sum().detach()
    linear = linear.to(Path(path).device)
    x, kv, slots = Path(path).put((x, kv, slots))

    def attached(x, kv, slots):
        return write(linear(x), kv, slots)

    def detached(x, kv, slots):
        return write(linear(x).detach(), kv, slots)

    if backend:
        attached, detached = (
            torch.compile(f, backend=backend, fullgraph=True)
            for f in (attached, detached)
        )
    with pytest.raises(RuntimeError) as error:
        attached(x, kv, slots)
    assert (
        "xla_ops.reshape_and_cache_flash: has no gradient: key requires one; use"
        " torch.no_grad() for inference, or pass key.detach()" in str(error.value)
    )
    assert kv.sum() == 0
    assert torch.allclose(detached(x, kv, slots).cpu(), wanted, atol=1e-4)
    with torch.no_grad():
        assert torch.allclose(attached(x, kv, slots).cpu(), wanted, atol=1e-4)


@pytest.mark.parametrize("path", EAGER)
def test_inference_goes_past_autograd(path, monkeypatch):
    """No kernel in Python runs where nothing asks for a gradient."""
    x, w = inputs(path)
    assert not autograd.is_untracked((x, w, 1e-6))
    with torch.no_grad():
        assert autograd.is_untracked((x, w, 1e-6))
    assert autograd.is_untracked((x.detach(), [1, 2], None, "auto", w.detach()))
    assert not vmap(lambda x: torch.tensor(autograd.is_untracked((x,))))(x).any()


@pytest.fixture(scope="module")
def scaled():
    """An op with a gradient for one of its two arguments: input * scale + offset."""
    seen = []

    def compute(backward):
        seen.append(backward)
        return {"input": backward.grads[0] * backward.args["scale"]}

    yield (
        op.Op(
            "test_gradients_scaled",
            "(Tensor input, Tensor offset, float scale) -> (Tensor, Tensor)",
            lambda input, offset, scale: CustomCall(
                "xla_ops.test_gradients_scaled",
                ("input", "offset"),
                (Spec.of(input), Spec.of(input)),
                {"scale": scale},
            ),
            lambda input, offset, scale: (input * scale + offset, input * 0),
            autocast=autocast.unchanged,
            gradient=gradients.Gradient(compute, ("offset",), (0,)),
        ),
        seen,
    )
    del op.OPS["test_gradients_scaled"]


def test_declared_gradient(scaled):
    """Its function runs, and is told what is asked for."""
    scaled, seen = scaled
    x, offset = inputs("cpu", (3,), (3,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the op has no handler
        result, _ = scaled(x, offset.detach(), 3.0)
        result.sum().backward()
        assert torch.equal(x.grad, torch.full_like(x, 3))
        backward = seen[-1]
        assert backward.wanted == ("input",)
        assert set(backward.args) == {"offset", "scale"}
        assert torch.equal(backward.results[0], result)
        assert backward.grads[1] is None
        result, _ = scaled(x, offset, 3.0)
        with pytest.raises(RuntimeError, match="gradient: offset requires one"):
            result.sum().backward()
        assert seen[-1].wanted == ("input", "offset")
        compiled = torch.compile(
            lambda x, o: scaled(x, o, 3.0)[0], backend="aot_eager", fullgraph=True
        )
        x.grad = None
        compiled(x, offset.detach()).sum().backward()
        assert torch.equal(x.grad, torch.full_like(x, 3))


STEPS = [*BACKENDS, (None, "cpu"), (None, "lazy"), ("replay", "lazy")]


@pytest.mark.parametrize("backend, path", STEPS)
@pytest.mark.parametrize(
    "write",
    [
        lambda t, x: torch.ops.xla_ops.rms_norm(t, x, x[0], 1e-6),
        lambda t, x: xla_ops.copy_blocks([t], [x], torch.ones_like(x[:1, :2]).long()),
        lambda t, x: torch.ops.xla_ops.rms_norm(t[:2], x[:2], x[0], 1e-6),
    ],
    ids=["result", "list", "view"],
)
def test_a_backward_of_another_op_sees_what_was_written(backend, path, write):
    """Torch keeps a tensor for the backward, and knows an old value by a count."""
    t, x, kept = inputs(path, (4, 16), (4, 16), (4, 16), requires_grad=False)
    weight = torch.ones_like(t).requires_grad_()
    before, after = (weight * t).sum(), (weight * kept).sum()

    def step(t, x):
        write(t, x)

    if backend == "replay":
        step = replay(step)
    elif backend is not None:
        step = torch.compile(step, backend=backend)
    with torch.no_grad():
        step(t, x)
    after.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        before.backward()


@pytest.mark.parametrize("path", EAGER)
def test_tensors_of_inference_mode_are_not_counted(path):
    with torch.inference_mode():
        t, x = Path(path).put([torch.zeros(4, 16), torch.ones(4, 16)])
        torch.ops.xla_ops.rms_norm(t, x, x[0], 1e-6)
        assert torch.allclose(t, x)
