"""Each op with a gradient, by each way that torch differentiates.

What the numbers must be is for the tests of the ops (tests/ops); here they must be
those of plain CPU tensors, whichever way.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
import torch.utils.checkpoint
import torch_xla
import torch_xla.utils.checkpoint
from torch.func import vjp
from torch_xla.experimental.scan import scan

import xla_ops
from support import Path, int32, same
from xla_ops.core.op import OPS

EAGER = ["cpu", "lazy"]
BACKENDS = [
    ("openxla", "lazy"),
    ("xla_ops", "lazy"),
    ("aot_eager", "cpu"),
    ("inductor", "cpu"),
]


@dataclass
class Case:
    """A call; the tensors of `wanted` require a gradient, and come first."""

    function: Callable
    wanted: list[torch.Tensor]
    others: list[torch.Tensor] = field(default_factory=list)

    def leaves(self, path: Path) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        wanted, others = path.put(([t.clone() for t in self.wanted], self.others))
        return [t.requires_grad_() for t in wanted], others

    def loss(self, *args: torch.Tensor) -> torch.Tensor:
        results = self.function(*args)
        results = results if isinstance(results, tuple) else (results,)
        return sum((r.float().sin() * (i + 1)).sum() for i, r in enumerate(results))

    def expected(self) -> list[torch.Tensor]:
        wanted, others = self.leaves(Path("cpu"))
        return list(torch.autograd.grad(self.loss(*wanted, *others), wanted))


def cases() -> dict[str, Case]:
    x, r, w, gated = (
        torch.randn(4, 16),
        torch.randn(4, 16),
        torch.randn(16),
        torch.randn(4, 32),
    )
    found = {
        name: Case(getattr(xla_ops, name), [gated])
        for name in (
            *("silu_and_mul", "mul_and_silu", "gelu_and_mul", "gelu_tanh_and_mul"),
            *("fatrelu_and_mul", "swigluoai_and_mul"),
            *("gelu_new", "gelu_fast", "gelu_quick"),
        )
    }
    q, k = torch.randn(4, 64), torch.randn(4, 32)
    table = torch.randn(9, 16)
    states = torch.randn(4, 2, 8), torch.randn(2, 4)
    return found | {
        "rms_norm": Case(xla_ops.rms_norm, [x, w]),
        "fused_add_rms_norm": Case(xla_ops.fused_add_rms_norm, [x, r, w]),
        "rotary_embedding": Case(
            lambda q, k, p, c: xla_ops.rotary_embedding(p, q, k, 16, c),
            [q, k],
            [torch.arange(4), table],
        ),
        "merge_attn_states": Case(
            xla_ops.merge_attn_states, [*states, *(t + 1 for t in states)]
        ),
        "linear": Case(xla_ops.linear, [x, torch.randn(8, 16), torch.randn(8)]),
        "grouped_matmul": Case(
            xla_ops.grouped_matmul,
            [x, torch.randn(2, 8, 16)],
            [int32(0, 1, 4)],
        ),
        "grouped_matmul_backward_weight": Case(
            torch.ops.xla_ops.grouped_matmul_backward_weight,
            [x, torch.randn(4, 8)],
            [int32(0, 1, 4)],
        ),
    }


torch.manual_seed(0)
CASES = cases()
each = pytest.mark.parametrize("name", CASES)
# Of several operands, of several results, and of one.
few = pytest.mark.parametrize(
    "name", ["rms_norm", "fused_add_rms_norm", "silu_and_mul"]
)
# Tested with their features, in tests/ops.
ELSEWHERE = {"flash_attn_varlen", "paged_attention", "fused_qk_norm_rope"}


def test_every_op_with_a_gradient_has_a_case():
    declared = {op.public_name for op in OPS.values() if op.gradient is not None}
    assert declared - ELSEWHERE == set(CASES)


@pytest.fixture(autouse=True)
def _grad_mode():
    # Torch counts devices at the first backward of a process: XLA's must be there.
    torch_xla.device()
    with torch.enable_grad(), warnings.catch_warnings():
        # Torch warns where it drops a gradient: nothing here may.
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        yield


def check(found, expected, atol=1e-5):
    assert len(found) == len(expected)
    for f, e in zip(found, expected, strict=True):
        assert f.dtype == e.dtype
        torch.testing.assert_close(f.cpu(), e, rtol=1e-4, atol=atol)


@each
@pytest.mark.parametrize("backend, path", [(None, "lazy"), *BACKENDS])
def test_lazily_and_compiled(name, backend, path):
    case = CASES[name]
    wanted, others = case.leaves(Path(path))
    function = case.loss
    if backend:
        function = torch.compile(function, backend=backend, fullgraph=True)
    function(*wanted, *others).backward()
    check([t.grad for t in wanted], case.expected())


@each
def test_a_backward_is_custom_calls_of_one_program(name):
    case = CASES[name]
    wanted, others = case.leaves(Path("lazy"))
    found = torch.autograd.grad(case.loss(*wanted, *others), wanted)
    text = torch_xla._XLAC._get_xla_tensors_hlo(list(found))
    calls = text.count('custom_call_target="xla_ops.')
    others = {"linear": 1}  # torch's products
    others |= dict.fromkeys(("grouped_matmul", "grouped_matmul_backward_weight"), 3)
    assert calls == others.get(name, 2), text


@each
@pytest.mark.parametrize("path", EAGER)
def test_a_second_derivative_raises_by_name(name, path):
    case = CASES[name]
    wanted, others = case.leaves(Path(path))
    loss = case.loss(*wanted, *others)
    found = torch.autograd.grad(loss, wanted, create_graph=True)
    total = sum(g.square().sum() for g in found)
    # Made of what is differentiable: their second derivatives are not refused.
    if name.startswith(("linear", "rotary_embedding", "grouped_matmul")):
        total.backward()
        return
    with pytest.raises(RuntimeError, match=r"xla_ops\.\w+_backward: has no gradient: "):
        total.backward()


@few
# torch_xla has the reentrant way only.
@pytest.mark.parametrize(
    "path, use_reentrant", [("cpu", False), ("cpu", True), ("lazy", True)]
)
def test_activation_checkpointing(name, path, use_reentrant):
    case = CASES[name]
    wanted, others = case.leaves(Path(path))
    checkpoint = torch.utils.checkpoint.checkpoint
    if path == "lazy":  # where torch's own asks for a module torch.xla
        checkpoint = torch_xla.utils.checkpoint.checkpoint
    loss = checkpoint(case.loss, *wanted, *others, use_reentrant=use_reentrant)
    loss.backward()
    check([t.grad for t in wanted], case.expected())


@each
@pytest.mark.parametrize(
    "path, way", [("cpu", "hooks"), ("lazy", "hooks"), ("cpu", "checkpoint")]
)
def test_a_leaf_keeps_its_hooks(name, path, way):
    """Where hooks take what is saved, torch drops a leaf's own with what they return.

    It was so from the first backward on, without a word.
    """
    case = CASES[name]
    wanted, others = case.leaves(Path(path))
    for t in wanted:
        t.register_hook(lambda grad: 3 * grad)
    expected = [3 * grad for grad in case.expected()]
    for _ in range(2):
        if way == "checkpoint":
            loss = torch.utils.checkpoint.checkpoint(
                case.loss, *wanted, *others, use_reentrant=False
            )
        else:
            same_tensor = lambda t: t  # noqa: E731
            with torch.autograd.graph.saved_tensors_hooks(same_tensor, same_tensor):
                loss = case.loss(*wanted, *others)
        loss.backward()
        check([t.grad for t in wanted], expected)
        for t in wanted:
            t.grad = None


@few
@pytest.mark.parametrize("path", EAGER)
def test_vjp(name, path):
    case = CASES[name]
    wanted, others = Path(path).put((case.wanted, case.others))
    loss, pull = vjp(lambda *args: case.loss(*args, *others), *wanted)
    check(pull(torch.ones_like(loss)), case.expected())


@pytest.mark.parametrize("backend, path", [(None, "cpu"), (None, "lazy"), *BACKENDS])
def test_autocast(backend, path):
    """Weights keep float32 gradients; what is between has autocast's dtype."""
    layer, w = torch.nn.Linear(16, 32), 1 + torch.randn(16) / 10
    x = torch.randn(4, 16)

    def step(x, w, layer):
        device = x.device.type
        with torch.autocast(device, dtype=torch.bfloat16):
            return xla_ops.silu_and_mul(layer(xla_ops.rms_norm(x.bfloat16(), w)))

    def by_hand(x, w, layer):
        y = xla_ops.rms_norm(x.bfloat16(), w.bfloat16())
        y = y @ layer.weight.bfloat16().t() + layer.bias.bfloat16()
        return xla_ops.silu_and_mul(y)

    by_hand(x, w.requires_grad_(), layer).float().sum().backward()
    expected = [w.grad.clone(), layer.weight.grad.clone(), layer.bias.grad.clone()]
    w, layer.weight.grad, layer.bias.grad = w.detach(), None, None
    x, w = Path(path).put((x, w))
    layer = layer.to(Path(path).device)
    function = torch.compile(step, backend=backend) if backend else step
    function(x, w.requires_grad_(), layer).float().sum().backward()
    for f, e in zip(
        (w.grad, layer.weight.grad, layer.bias.grad), expected, strict=True
    ):
        assert f.dtype == torch.float32
        torch.testing.assert_close(f.cpu(), e, rtol=0.05, atol=0.05)


def test_scan_over_layers():
    """torch_xla's loop, whose body is traced once, backward too."""
    weights, x = torch.randn(3, 16).abs(), torch.randn(4, 16)

    def layer(x, w):
        y = x + xla_ops.rms_norm(x, w)
        return y, y.sum()

    leaves = [t.clone().requires_grad_() for t in (x, weights)]
    last = leaves[0]
    for w in leaves[1]:
        last, _ = layer(last, w)
    last.sin().sum().backward()
    expected = [t.grad for t in leaves]

    x, weights = (t.requires_grad_() for t in Path("lazy").put([x, weights]))
    last, _ = scan(layer, x, weights)
    last.sin().sum().backward()
    check([x.grad, weights.grad], expected)


@pytest.mark.parametrize("path", EAGER)
def test_equal_runs(path):
    """To the bit, with no switch: sums have a fixed order."""
    case = Case(xla_ops.rms_norm, [torch.randn(2000, 64), torch.randn(64)])
    runs = []
    for _ in range(3):
        wanted, _ = case.leaves(Path(path))
        case.loss(*wanted).backward()
        runs.append([t.grad.cpu() for t in wanted])
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[2], strict=True))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_symbolic_sizes(backend):
    w = torch.randn(16, requires_grad=True)
    compiled = torch.compile(
        lambda x, w: xla_ops.rms_norm(x, w).sin().sum(),
        backend=backend,
        fullgraph=True,
        dynamic=True,
    )
    for rows in (3, 7, 600):
        x = torch.randn(rows, 16)
        leaves = [x.clone().requires_grad_(), w]
        found = torch.autograd.grad(compiled(*leaves), leaves)
        check(found, Case(xla_ops.rms_norm, [x, w.detach()]).expected(), atol=1e-4)


@pytest.mark.parametrize("path", EAGER)
def test_an_argument_that_was_written_is_noticed(path):
    """Torch counts writes; a backward of old values raises."""
    x, w = Path(path).put([torch.randn(4, 16), torch.randn(16)])
    w.requires_grad_()
    loss = xla_ops.rms_norm(x, w).sum()
    with torch.no_grad():
        torch.ops.xla_ops.rms_norm(x, x.clone(), w, 1e-6)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backend, path", BACKENDS)
@pytest.mark.parametrize("is_view", [False, True], ids=["whole", "view"])
def test_an_argument_that_the_graph_writes_is_noticed(backend, path, is_view):
    """A backward is traced with its forward, run or not: only one that runs raises."""
    x, r, w = Path(path).put([torch.randn(4, 16), torch.randn(4, 16), torch.randn(16)])
    w.requires_grad_()

    def step(x, r, w):
        part = x[1:] if is_view else x
        loss = xla_ops.rms_norm(x, w).sum()
        torch.ops.xla_ops.rms_norm(part, r[: part.shape[0]], r[0], 1e-6)
        return loss

    loss = torch.compile(step, backend=backend)(x, r, w)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()

    def fine(x, r, w):
        torch.ops.xla_ops.rms_norm(x, r, r[0], 1e-6)
        return xla_ops.rms_norm(x, w).sum()

    (expected,) = torch.autograd.grad(fine(x.clone(), r, w), w)
    found = torch.autograd.grad(torch.compile(fine, backend=backend)(x, r, w), w)
    check(found, [expected.cpu()])


def test_same_on_the_same_device():
    """Lazy and compiled backwards are the same program."""
    x, w = Path("lazy").put([torch.randn(64, 16), torch.randn(16)])
    runs = []
    for backend in (None, "openxla", "xla_ops"):
        leaves = [t.clone().requires_grad_() for t in (x, w)]
        function = CASES["rms_norm"].loss
        if backend:
            function = torch.compile(function, backend=backend)
        function(*leaves).backward()
        runs.append([t.grad.cpu() for t in leaves])
    for other in runs[1:]:
        assert all(same(a, b) for a, b in zip(runs[0], other, strict=True))
