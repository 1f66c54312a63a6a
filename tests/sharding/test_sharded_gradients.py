"""Backwards of sharded tensors: split as the forward is, right, and little is sent."""

import pytest
import torch
import torch_xla

import xla_ops
from sharded import compiled, put, tiles_of

TOKENS, HIDDEN = 8, 32


@pytest.fixture(autouse=True)
def _grad_mode(spmd):
    torch_xla.device()  # before the first backward of the process
    with torch.enable_grad():
        yield


def check(found, expected):
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f.cpu(), e, rtol=1e-4, atol=1e-5)


def gradients_of(function, leaves):
    leaves = [t.requires_grad_() for t in leaves]
    results = function(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    total = sum((r.float().sin() * (i + 1)).sum() for i, r in enumerate(results))
    return torch.autograd.grad(total, leaves)


def fused(x, r, w):
    return xla_ops.fused_add_rms_norm(x, r, w)


def merge(p, pl, s, sl):
    return xla_ops.merge_attn_states(p, pl, s, sl)


def rotate(q, k):
    positions = torch.arange(TOKENS, device=q.device)
    table = torch.linspace(-1, 1, 16 * TOKENS, device=q.device).view(TOKENS, 16)
    return xla_ops.rotary_embedding(positions, q, k, 16, table)


def normalise(qkv, q_weight, k_weight):
    positions = torch.arange(TOKENS, device=qkv.device)
    table = torch.linspace(-1, 1, 16 * TOKENS, device=qkv.device).view(TOKENS, 16)
    return torch.ops.xla_ops.fused_qk_norm_rope_functional(
        qkv, 2, 1, 1, 16, 1e-6, q_weight, k_weight, table, True, positions, None
    )


def project(weight):
    x = torch.linspace(-1, 1, TOKENS * HIDDEN, device=weight.device)
    offsets = torch.tensor([0, 1, 6, 8], dtype=torch.int32, device=weight.device)
    return xla_ops.grouped_matmul(x.view(TOKENS, HIDDEN), weight, offsets)


def randn(*shapes):
    return [torch.randn(shape) for shape in shapes]


ROWS = (TOKENS, HIDDEN)
STATES = ((TOKENS, 4, 16), (4, TOKENS))
# name -> function, shapes, and the splits of each operand to try.
CASES: dict[str, tuple] = {
    "rms_norm": (
        xla_ops.rms_norm,
        (ROWS, (HIDDEN,)),
        [(("tp", None), None)],
    ),
    "rms_norm of 3 dimensions": (
        xla_ops.rms_norm,
        ((4, 8, HIDDEN), (HIDDEN,)),
        [(("tp", None, None), None), ((None, "tp", None), None)],
    ),
    "fused_add_rms_norm": (
        fused,
        (ROWS, ROWS, (HIDDEN,)),
        [(("tp", None), ("tp", None), None)],
    ),
    "silu_and_mul": (xla_ops.silu_and_mul, (ROWS,), [(("tp", None),)]),
    "swigluoai_and_mul": (
        xla_ops.swigluoai_and_mul,
        (ROWS,),
        [(("tp", None),), ((None, "tp"),)],
    ),
    "gelu_new": (xla_ops.gelu_new, (ROWS,), [(("tp", None),), ((None, "tp"),)]),
    "merge_attn_states": (
        merge,
        STATES * 2,
        [
            (("tp", None, None), (None, "tp")) * 2,
            ((None, "tp", None), ("tp", None)) * 2,
        ],
    ),
    "grouped_matmul": (project, ((3, 16, HIDDEN),), [((None, "tp", None),)]),
    "rotary_embedding": (
        rotate,
        ((TOKENS, 4, 16), (TOKENS, 4, 16)),
        [((None, "tp", None),) * 2],
    ),
}


@pytest.mark.parametrize("how", ["lazy", "openxla"])
@pytest.mark.parametrize(
    "name, number", [(n, i) for n, case in CASES.items() for i in range(len(case[2]))]
)
def test_gradients(name, number, how, mesh):
    function, shapes, splits = CASES[name]
    tensors = randn(*shapes)
    expected = gradients_of(function, [t.clone() for t in tensors])
    given = [
        put(t, mesh, spec) for t, spec in zip(tensors, splits[number], strict=True)
    ]
    if how != "lazy":
        function = torch.compile(function, backend=how, fullgraph=True)
    check(gradients_of(function, given), expected)


def test_a_sum_over_split_columns_raises(mesh):
    x, w = randn(ROWS, (3, 16, HIDDEN))
    leaves = [put(x), put(w, mesh, (None, "tp", None))]
    offsets = put(torch.tensor([0, 1, 6, 8], dtype=torch.int32))

    def grouped(x, w):
        return xla_ops.grouped_matmul(x, w, offsets)

    message = r"grouped_matmul: input must be whole in dimension 1 \(depth\)"
    with pytest.raises(ValueError, match=message):
        gradients_of(grouped, leaves)


def test_a_weight_is_summed_over_devices_and_nothing_else_is_sent(mesh, hlo_dump):
    x, w, g = randn((64, HIDDEN), (HIDDEN,), (64, HIDDEN))
    leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
    expected = torch.autograd.grad(xla_ops.rms_norm(*leaves), leaves, g)
    leaves = [put(x, mesh, ("tp", None)), put(w)]
    leaves = [t.requires_grad_() for t in leaves]
    grad = put(g, mesh, ("tp", None))
    with compiled(hlo_dump) as programs:
        found = torch.autograd.grad(xla_ops.rms_norm(*leaves), leaves, grad)
        assert tiles_of(found[0]) == [4, 1]
    assert programs.collectives == {"all-reduce": 1}
    assert programs.bytes_moved == 4 * HIDDEN
    check(found, expected)


def test_what_was_declared_holds_in_the_backward(mesh):
    """It runs after the `with`, and on another thread."""
    x, w = randn(ROWS, (HIDDEN,))
    expected = gradients_of(lambda x, w: xla_ops.rms_norm(x * 2, w), [x, w])
    expected = [t.detach() for t in expected]
    x, w = put(x.detach(), mesh, ("tp", None)), put(w.detach())
    leaves = [t.requires_grad_() for t in (x, w)]
    with xla_ops.sharding(mesh, tokens="tp"):
        y = xla_ops.rms_norm(leaves[0] * 2, leaves[1])
    check(torch.autograd.grad(y.sin().sum(), leaves), expected)


def test_queries_and_keys_of_one_projection(mesh):
    """Parts of a gradient say nothing: what was declared does."""
    tensors = randn((TOKENS, 64), (16,), (16,))
    expected = gradients_of(normalise, [t.clone() for t in tensors])
    qkv, *weights = tensors
    given = [put(qkv, mesh, ("tp", None)), *map(put, weights)]
    with xla_ops.sharding(mesh, tokens="tp", heads=None):
        found = gradients_of(normalise, given)
    check(found, expected)
    with pytest.raises(ValueError, match="query must say how it is split"):
        gradients_of(normalise, [put(qkv, mesh, ("tp", None)), *map(put, weights)])


def test_a_block_of_a_model(grid):
    """Data parallel by tokens, tensor parallel by columns."""
    x, norm, up, down = randn(ROWS, (HIDDEN,), (HIDDEN, 64), (64, HIDDEN))

    def block(x, norm, up, down):
        y, total = xla_ops.fused_add_rms_norm(x, x * 0.5, norm)
        return xla_ops.gelu_quick(y @ up / 8) @ down / 8 + total

    expected = gradients_of(block, [t.clone() for t in (x, norm, up, down)])
    given = [
        put(x, grid, ("dp", None)),
        put(norm),
        put(up, grid, (None, "tp")),
        put(down, grid, ("tp", None)),
    ]
    with xla_ops.sharding(grid, tokens="dp", columns="tp"):
        found = gradients_of(block, given)
    check(found, expected)
