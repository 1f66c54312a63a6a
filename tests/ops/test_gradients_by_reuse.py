"""Gradients that are other ops: fused_add_rms_norm's, rotary_embedding's, linear's."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import xla_ops
from differentiated import assert_gradients, gradients_of
from rows import DTYPES, any_rows, each_shape_and_dtype, residual_inputs
from support import Path
from xla_ops.ops import rms_norm_backward

EPS = 1e-5


def fused(x, r, w):
    return xla_ops.fused_add_rms_norm(x, r, w, EPS)


def exact_fused(x, r, w):
    # The sum that is normalised is rounded: the derivative is taken there.
    z = x + r
    rounded = z + ((x.to(DTYPE[0]) + r.to(DTYPE[0])).to(z.dtype) - z).detach()
    scale = torch.rsqrt(rounded.square().mean(-1, keepdim=True) + EPS)
    return rounded * scale * w, rounded


DTYPE = [torch.float32]  # of the operands


def same_fused(x, r, w):
    z = x + r
    scale = torch.rsqrt(z.float().square().mean(-1, keepdim=True) + EPS)
    return (z.float() * scale).to(x.dtype) * w, z


@each_shape_and_dtype
def test_fused_add_rms_norm(path, shape, dtype):
    DTYPE[0] = dtype
    tensors = residual_inputs(shape, dtype)
    assert_gradients(path, fused, exact_fused, tensors, same=same_fused)


@any_rows(used=st.sampled_from([0, 1]), wanted=st.sampled_from([[0], [1], [2], [0, 2]]))
def test_any_part_of_fused_add_rms_norm(
    rows, hidden, dtype, magnitude, seed, used, wanted
):
    DTYPE[0] = dtype
    shape = (rows, hidden)
    grads = [torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)]
    if used == 0 or 2 not in wanted:
        grads[1 - used] = None
    tensors = residual_inputs(shape, dtype, magnitude)
    assert_gradients(
        Path("cpu"),
        fused,
        exact_fused,
        tensors,
        same=same_fused,
        grads=grads,
        wanted=wanted,
    )


def test_a_sum_alone_needs_no_kernel(monkeypatch):
    monkeypatch.setattr(rms_norm_backward, "_both", None)
    monkeypatch.setattr(rms_norm_backward, "_input", None)
    x, r, w = residual_inputs((3, 8), torch.float32)
    g = torch.randn(3, 8)
    found = gradients_of(Path("cpu"), fused, [x, r, w], [None, g], [0, 1, 2])
    assert torch.equal(found[0], g) and torch.equal(found[1], g)
    assert not found[2].any()


def rotated(positions, heads, head_size, cache, is_neox):
    """The definition in plain torch, in heads' dtype."""
    valid = (positions >= 0) & (positions < cache.shape[0])
    row = cache[positions.clamp(0, cache.shape[0] - 1)].unsqueeze(-2)
    cos, sin = row.to(heads.dtype).chunk(2, dim=-1)
    split = heads.reshape(*positions.shape, -1, head_size)
    rotary, rest = split[..., : cache.shape[1]], split[..., cache.shape[1] :]
    if is_neox:
        x, y = rotary.chunk(2, dim=-1)
        turned = torch.cat([x * cos - y * sin, y * cos + x * sin], dim=-1)
    else:
        x, y = rotary[..., ::2], rotary[..., 1::2]
        turned = torch.stack([x * cos - y * sin, y * cos + x * sin], -1).flatten(-2)
    turned = torch.where(valid[..., None, None], turned, rotary)
    return torch.cat([turned, rest], dim=-1).reshape(heads.shape)


def table(rotary_dim, dtype):
    return torch.rand(9, rotary_dim).mul(2).sub(1).to(dtype)


def check_rotary(path, tokens, size, rotary, is_neox, dtype, **more):
    positions = torch.randint(-2, 11, tokens)  # some of no row of the table
    q = torch.randn(*tokens, 4 * size).to(dtype)
    k = torch.randn(*tokens, 2, size).to(dtype)

    def op(q, k, p, c):
        return xla_ops.rotary_embedding(p, q, k, size, c, is_neox)

    def plain(q, k, p, c):
        return (rotated(p, q, size, c, is_neox), rotated(p, k, size, c, is_neox))

    tensors = [q, k, positions, table(rotary, dtype)]
    assert_gradients(path, op, plain, tensors, **{"wanted": [0, 1], **more})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize(
    "tokens, size, rotary", [((5,), 10, 4), ((2, 3), 64, 64), ((7,), 80, 32)]
)
def test_rotary_embedding(path, tokens, size, rotary, is_neox, dtype):
    check_rotary(path, tokens, size, rotary, is_neox, dtype)


@pytest.mark.parametrize("wanted", [[0], [1]])
def test_part_of_rotary_embedding(path, wanted):
    check_rotary(path, (5,), 8, 8, True, torch.float32, wanted=wanted)
    g = torch.randn(5, 32)
    q, k = torch.randn(5, 32), torch.randn(5, 2, 8)
    positions, cache = torch.arange(5), table(8, torch.float32)

    def op(q, k, p, c):
        return xla_ops.rotary_embedding(p, q, k, 8, c)

    args = [q, k, positions, cache]
    found = gradients_of(path, op, args, [g, None], [0, 1])
    assert found[0].any() and not found[1].any()


def test_rotary_embedding_of_queries_alone(path):
    q, positions, cache = torch.randn(5, 32), torch.arange(5), table(8, torch.float32)
    assert_gradients(
        path,
        lambda q, p, c: xla_ops.rotary_embedding(p, q, None, 8, c)[0],
        lambda q, p, c: rotated(p, q, 8, c, True),
        [q, positions, cache],
        wanted=[0],
    )


def test_the_table_has_no_gradient():
    q, cache = torch.randn(5, 32), table(8, torch.float32)
    message = "rotary_embedding: has no gradient: cos_sin_cache requires one"
    with pytest.raises(RuntimeError, match=message):
        gradients_of(
            Path("cpu"),
            lambda q, c: xla_ops.rotary_embedding(torch.arange(5), q, None, 8, c)[0],
            [q, cache],
            [q],
            [0, 1],
        )


@settings(max_examples=30)
@given(
    rows=st.integers(0, 40),
    columns=st.integers(0, 30),
    depth=st.integers(0, 40),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    seed=st.random_module(),
)
def test_linear(rows, columns, depth, dtype, bias, seed):
    sizes = [(rows, depth), (columns, depth)] + [(columns,)] * bias
    tensors = [torch.randn(size).to(dtype) for size in sizes]
    plain = torch.nn.functional.linear
    assert_gradients(Path("cpu"), xla_ops.linear, plain, tensors)
