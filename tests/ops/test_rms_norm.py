"""xla_ops.rms_norm: numerics against float64, shapes, errors."""

import pytest
import torch

import xla_ops
from rows import any_rows, each_shape_and_dtype
from support import Path, assert_close_to_exact

EPS = 1e-5


def exact(x, w):
    x, w = x.double(), w.double()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * w


def two_roundings(x, w):
    y = x.float()
    scale = torch.rsqrt(y.square().mean(-1, keepdim=True) + EPS)
    return (y * scale).to(x.dtype) * w


@each_shape_and_dtype
def test_numerics(path, shape, dtype):
    x = torch.randn(shape, dtype=torch.float32).to(dtype)
    w = (1 + 0.1 * torch.randn(shape[-1])).to(dtype)
    out, _ = path.run(lambda x, w: xla_ops.rms_norm(x, w, EPS), x, w)
    assert out.dtype == dtype
    assert_close_to_exact(out, two_roundings(x, w), exact(x, w))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounds_before_the_weight(path, dtype):
    x = torch.randn(64, 256).to(dtype)
    w = torch.randn(256).to(dtype)
    out, _ = path.run(lambda x, w: xla_ops.rms_norm(x, w, EPS), x, w)
    # Sums differ in order only, which moves a rounding now and then, never many.
    different = (out != two_roundings(x, w)).float().mean().item()
    assert different < 0.01


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8)])
def test_no_tokens(path, shape):
    out, _ = path.run(xla_ops.rms_norm, torch.empty(shape), torch.ones(8))
    assert out.shape == torch.Size(shape)


def test_non_finite_rows_stay_in_their_row(path):
    x = torch.randn(4, 32)
    x[1, 3] = torch.nan
    x[2, 5] = torch.inf
    out, _ = path.run(xla_ops.rms_norm, x, torch.ones(32))
    assert out[1].isnan().all()
    assert out[2, 5].isnan()
    assert out[[0, 3]].isfinite().all()


def test_strided_input(path):
    x = torch.randn(6, 96)
    w = torch.ones(32)
    out, _ = path.run(lambda x, w: xla_ops.rms_norm(x[:, 32:64], w, EPS), x, w)
    assert_close_to_exact(out, two_roundings(x[:, 32:64], w), exact(x[:, 32:64], w))


@any_rows()
def test_any_shape(rows, hidden, dtype, magnitude, seed):
    x = (torch.randn(rows, hidden) * magnitude).to(dtype)
    w = torch.randn(hidden).to(dtype)
    out, _ = Path("cpu").run(lambda x, w: xla_ops.rms_norm(x, w, EPS), x, w)
    assert_close_to_exact(out, two_roundings(x, w), exact(x, w))


@pytest.mark.parametrize(
    "x, w, eps, message",
    [
        (
            torch.ones(2, 8, dtype=torch.int32),
            torch.ones(8),
            1e-6,
            "rms_norm: input must be float32, float16 or bfloat16, got int32",
        ),
        (
            torch.ones(()),
            torch.ones(8),
            1e-6,
            "rms_norm: input must have rank 1 or more, got shape []",
        ),
        (
            torch.ones(2, 8).half(),
            torch.ones(8),
            1e-6,
            "rms_norm: weight must be float16, got float32",
        ),
        (
            torch.ones(2, 8),
            torch.ones(7),
            1e-6,
            "rms_norm: weight must have shape [8], got [7]",
        ),
        (
            torch.ones(2, 8),
            torch.ones(8),
            0.0,
            "rms_norm: eps must be positive and finite, got 0",
        ),
        (
            torch.ones(2, 8),
            torch.ones(8),
            float("nan"),
            "rms_norm: eps must be positive and finite, got nan",
        ),
        (
            torch.ones(2, 8),
            torch.ones(8),
            1e39,  # of no float32
            "rms_norm: eps must be positive and finite, got inf",
        ),
        (
            torch.ones(2, 8),
            torch.ones(8),
            1e-50,
            "rms_norm: eps must be positive and finite, got 0",
        ),
    ],
)
def test_errors(path, x, w, eps, message):
    with pytest.raises(Exception) as error:
        path.run(lambda x, w: xla_ops.rms_norm(x, w, eps), x, w)
    assert message in str(error.value)


def test_wrong_type():
    with pytest.raises(TypeError, match="rms_norm: weight must be a tensor, got list"):
        xla_ops.rms_norm(torch.ones(2), [1.0, 1.0])


def test_two_devices():
    x = torch.ones(2, 8, device=Path("lazy").device)
    message = "rms_norm: weight must be on input's device"
    with pytest.raises(ValueError, match=message):
        xla_ops.rms_norm(x, torch.ones(8))
