"""xla_ops.fused_add_rms_norm: numerics against float64, in place, shapes, errors."""

import pytest
import torch

import xla_ops
from rows import DTYPES, any_rows, each_shape_and_dtype, residual_inputs
from support import Path, assert_close_to_exact, same

EPS = 1e-5


def functional(x, r, w):
    return xla_ops.fused_add_rms_norm(x, r, w, EPS)


def in_place(x, r, w):
    torch.ops.xla_ops.fused_add_rms_norm(x, r, w, EPS)


def exact(x, r, w):
    z = (x + r).double()  # the rounding of the sum is part of the meaning
    return z * torch.rsqrt(z.square().mean(-1, keepdim=True) + EPS) * w.double()


def same_dtype(x, r, w):
    z = (x + r).float()
    scale = torch.rsqrt(z.square().mean(-1, keepdim=True) + EPS)
    return (z * scale).to(x.dtype) * w


@each_shape_and_dtype
def test_numerics(path, shape, dtype):
    x, r, w = residual_inputs(shape, dtype)
    (out, z), (x_after, r_after, _) = path.run(functional, x, r, w)
    assert out.dtype == z.dtype == dtype
    assert torch.equal(z, x + r)
    assert_close_to_exact(out, same_dtype(x, r, w), exact(x, r, w))
    assert torch.equal(x_after, x)
    assert torch.equal(r_after, r)


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place(path, dtype):
    x, r, w = residual_inputs((5, 72), dtype)
    out, z = functional(x, r, w)
    _, (x_after, r_after, w_after) = path.run(in_place, x, r, w)
    assert same(x_after, out)
    assert same(r_after, z)
    assert same(w_after, w)


def test_in_place_twice_as_layers_do(path):
    x, r, w = residual_inputs((3, 40), torch.float32)

    def layers(x, r, w):
        in_place(x, r, w)
        y = x * 2
        in_place(y, r, w)
        return y

    first, z = functional(x, r, w)
    wanted, z = functional(first * 2, z, w)
    y, (_, r_after, _) = path.run(layers, x, r, w)
    assert same(y, wanted)
    assert same(r_after, z)


@pytest.mark.parametrize("dtype, r", [(torch.float16, 0.12), (torch.bfloat16, 0.9883)])
def test_the_mean_is_of_the_rounded_sum(path, dtype, r):
    """256 + r rounds to 256; the mean of the fp32 sums would give less than one."""
    x = torch.full((1, 64), 256.0, dtype=dtype)
    r = torch.full((1, 64), r, dtype=dtype)
    (out, z), _ = path.run(functional, x, r, torch.ones(64, dtype=dtype))
    assert torch.equal(z, x)
    assert torch.equal(out, torch.ones_like(x))


def test_strided_arguments(path):
    base = torch.randn(6, 96)
    r, w = torch.randn(6, 32), torch.ones(32)

    def strided(base, r, w):
        in_place(base[:, 32:64], r, w)

    out, z = functional(base[:, 32:64], r, w)
    _, (after, r_after, _) = path.run(strided, base, r, w)
    assert same(after[:, 32:64], out)
    assert same(after[:, :32], base[:, :32])
    assert same(after[:, 64:], base[:, 64:])
    assert same(r_after, z)


def test_input_is_the_residual(path):
    """The later result wins, as on a tensor that is written twice."""
    x, _, w = residual_inputs((4, 16), torch.float32)
    (out, z), _ = path.run(lambda x, w: functional(x, x, w), x, w)
    assert torch.equal(z, 2 * x)
    assert_close_to_exact(out, same_dtype(x, x, w), exact(x, x, w))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (2, 0)])
def test_no_elements(path, shape):
    x = torch.empty(shape)
    (out, z), _ = path.run(functional, x, x, torch.ones(shape[-1]))
    assert out.shape == z.shape == torch.Size(shape)
    path.run(in_place, x, x.clone(), torch.ones(shape[-1]))


def test_non_finite_rows_stay_in_their_row(path):
    x, r, w = residual_inputs((4, 32), torch.float32)
    x[1, 3] = torch.nan
    r[2, 5] = torch.inf
    (out, z), _ = path.run(functional, x, r, w)
    assert out[1].isnan().all()
    assert out[2, 5].isnan()
    assert z[1].isnan().sum() == 1
    assert out[[0, 3]].isfinite().all()


@any_rows()
def test_any_shape(rows, hidden, dtype, magnitude, seed):
    x, r, w = residual_inputs((rows, hidden), dtype, magnitude)
    (out, z), _ = Path("cpu").run(functional, x, r, w)
    assert torch.equal(z, x + r)
    assert_close_to_exact(out, same_dtype(x, r, w), exact(x, r, w))


X = torch.ones(2, 8)


@pytest.mark.parametrize(
    "x, r, w, eps, message",
    [
        (
            X.int(),
            X,
            X[0],
            1e-6,
            "input must be float32, float16 or bfloat16, got int32",
        ),
        (X[0, 0], X, X[0], 1e-6, "input must have rank 1 or more, got shape []"),
        (X.half(), X, X[0], 1e-6, "residual must be float16, got float32"),
        (X, X[:1], X[0], 1e-6, "residual must have shape [2, 8], got [1, 8]"),
        (X, X, X[0].half(), 1e-6, "weight must be float32, got float16"),
        (X, X, X[0, :7], 1e-6, "weight must have shape [8], got [7]"),
        (X, X, X[0], 0.0, "eps must be positive and finite, got 0"),
    ],
)
def test_errors(path, x, r, w, eps, message):
    for call in (xla_ops.fused_add_rms_norm, torch.ops.xla_ops.fused_add_rms_norm):
        with pytest.raises(Exception) as error:
            path.run(lambda x, r, w, call=call: call(x, r, w, eps), x, r, w)
        assert f"fused_add_rms_norm: {message}" in str(error.value)


def test_wrong_type():
    with pytest.raises(TypeError, match="residual must be a tensor, got float"):
        xla_ops.fused_add_rms_norm(X, 1.0, X[0])
