"""The gradient of fused_qk_norm_rope: against float64, in place, what it refuses."""

import pytest
import torch
import torch_xla
from hypothesis import given, settings
from hypothesis import strategies as st

import xla_ops
from differentiated import assert_gradients, gradients_of
from rows import DTYPES
from support import Path

EPS = 1e-5


def definition(qkv, q_weight, k_weight, cache, positions, q, k, v, is_neox):
    """In plain torch, in qkv's dtype."""
    dim = q_weight.shape[0]
    heads, values = qkv.view(len(qkv), q + k + v, dim).split([q + k, v], dim=1)
    weight = torch.cat([q_weight.expand(q, dim), k_weight.expand(k, dim)])
    scale = torch.rsqrt(heads.square().mean(-1, keepdim=True) + EPS)
    y = heads * scale * weight
    valid = (positions >= 0) & (positions < len(cache))
    row = cache[positions.clamp(0, len(cache) - 1)].to(qkv.dtype).unsqueeze(1)
    cos, sin = row.chunk(2, dim=-1)
    a, b = y.chunk(2, dim=-1) if is_neox else (y[..., ::2], y[..., 1::2])
    pair = (a * cos - b * sin, b * cos + a * sin)
    turned = torch.cat(pair, -1) if is_neox else torch.stack(pair, -1).flatten(-2)
    y = torch.where(valid[:, None, None], turned, y)
    return torch.cat([y, values], dim=1).reshape(qkv.shape)


def in_place(qkv, q_weight, k_weight, cache, positions, q, k, v, is_neox):
    """The op, on what a layer before it has computed: no leaf of a graph."""
    qkv = qkv * 1
    dim = q_weight.shape[0]
    xla_ops.fused_qk_norm_rope(
        qkv, q, k, v, dim, EPS, q_weight, k_weight, cache, is_neox, positions
    )
    return qkv


def batch(tokens, counts, dim, dtype, table=None):
    weights = [(1 + 0.3 * torch.randn(dim)).to(dtype) for _ in range(2)]
    qkv = (2 * torch.randn(tokens, sum(counts) * dim)).to(dtype)
    angles = torch.rand(9, dim // 2) * 6
    cache = torch.cat([angles.cos(), angles.sin()], dim=-1).to(table or dtype)
    positions = torch.randint(-2, 11, (tokens,))  # some of no row of the table
    return [qkv, *weights, cache, positions]


def check(path, tensors, counts, is_neox, wanted=(0, 1, 2)):
    rest = (*counts, is_neox)
    assert_gradients(
        path,
        lambda *tensors: in_place(*tensors, *rest),
        lambda *tensors: definition(*tensors, *rest),
        tensors,
        wanted=wanted,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize(
    "tokens, counts, dim", [(5, (3, 1, 2), 6), (7, (4, 2, 2), 64), (3, (2, 1, 0), 80)]
)
def test_gradients(path, tokens, counts, dim, is_neox, dtype):
    check(path, batch(tokens, counts, dim, dtype), counts, is_neox)


@settings(max_examples=50)
@given(
    tokens=st.integers(0, 9),
    counts=st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(0, 2)),
    half=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    is_wide=st.booleans(),
    is_neox=st.booleans(),
    wanted=st.sampled_from([(0,), (1,), (2,), (0, 2), (0, 1, 2)]),
    seed=st.random_module(),
)
def test_any_part_of_any_shape(
    tokens, counts, half, dtype, is_wide, is_neox, wanted, seed
):
    table = torch.float32 if is_wide else dtype
    tensors = batch(tokens, counts, 2 * half, dtype, table)
    check(Path("cpu"), tensors, counts, is_neox, wanted)


def test_a_view_of_what_requires_a_gradient(path):
    """The rest of the buffer keeps its own."""
    tensors = batch(4, (2, 1, 1), 8, torch.float32)
    tensors[0] = torch.randn(6, 48)

    def inside(op):
        def function(base, *rest):
            base = base * 1
            rows = base[1:5, 8:40]
            new = op(rows, *rest, 2, 1, 1, True)
            return base, new

        return function

    def call(rows, w, u, cache, positions, q, k, v, is_neox):
        xla_ops.fused_qk_norm_rope(
            rows, q, k, v, 8, EPS, w, u, cache, is_neox, positions
        )
        return rows * 2

    def plain(rows, *rest):
        rows.copy_(definition(rows.clone(), *rest))
        return rows * 2

    assert_gradients(path, inside(call), inside(plain), tensors, wanted=[0, 1, 2])


def test_the_value_is_the_one_without_a_gradient(path):
    tensors = batch(4, (2, 1, 1), 8, torch.bfloat16)
    expected, _ = path.run(lambda *t: in_place(*t, 2, 1, 1, True), *tensors)
    torch_xla.device()
    given = path.put([t.clone() for t in tensors])
    given[1].requires_grad_()
    with torch.enable_grad():
        found = in_place(*given, 2, 1, 1, True)
    assert found.requires_grad
    assert torch.equal(found.detach().cpu(), expected)


@pytest.mark.parametrize("backend", ["openxla", "xla_ops"])
def test_a_copy_of_what_another_backward_keeps(backend):
    """Openxla took the two for one, and mixed up the results that come after."""
    tensors = batch(4, (2, 1, 1), 8, torch.float32)
    scales = torch.randn(32)

    def function(op, qkv, w, u, cache, positions, scales):
        kept = torch.tanh(qkv)
        new = op(kept.clone(), w, u, cache, positions, 2, 1, 1, True)
        return (new.sin() * torch.sigmoid(qkv * scales)).sum()

    def gradients(op, path, call):
        leaves = path.put([t.clone() for t in (*tensors, scales)])
        wanted = [leaves[i].requires_grad_() for i in (0, 1, 2, 5)]
        with torch.enable_grad():
            found = torch.autograd.grad(call(function)(op, *leaves), wanted)
        return [grad.cpu() for grad in found]

    def overwrite(qkv, w, u, cache, positions, q, k, v, is_neox):
        args = (q, k, v, 8, EPS, w, u, cache, is_neox, positions)
        xla_ops.fused_qk_norm_rope(qkv, *args)
        return qkv

    found = gradients(
        overwrite, Path("lazy"), lambda f: torch.compile(f, backend=backend)
    )
    for got, wanted in zip(
        found, gradients(definition, Path("cpu"), lambda f: f), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_a_leaf_is_not_overwritten():
    qkv, w, u, cache, positions = batch(4, (2, 1, 1), 8, torch.float32)
    qkv.requires_grad_()
    with torch.enable_grad(), pytest.raises(RuntimeError, match="leaf Variable"):
        xla_ops.fused_qk_norm_rope(qkv, 2, 1, 1, 8, EPS, w, u, cache, True, positions)


def test_the_table_has_no_gradient():
    message = "fused_qk_norm_rope: has no gradient: cos_sin_cache requires one"
    tensors = batch(4, (2, 1, 1), 8, torch.float32)
    for wanted in ([3], [0, 3]):
        with pytest.raises(RuntimeError, match=message):
            gradients_of(
                Path("cpu"),
                lambda *t: in_place(*t, 2, 1, 1, True),
                tensors,
                [tensors[0]],
                wanted,
            )
