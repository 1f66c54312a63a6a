"""The gradients of rms_norm: numerics against float64, what is computed, errors."""

import pytest
import torch

import xla_ops
from differentiated import assert_gradients, gradients_of
from rows import any_rows, each_shape_and_dtype, numbers, weights
from support import Path
from xla_ops.core import handlers
from xla_ops.core.foreign import Foreign
from xla_ops.ops import rms_norm_backward

EPS = 1e-5
OP = torch.ops.xla_ops


def norm(x, w):
    return xla_ops.rms_norm(x, w, EPS)


def exact(x, w):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * w


def two_roundings(x, w):
    y = x.float()
    scale = torch.rsqrt(y.square().mean(-1, keepdim=True) + EPS)
    return (y * scale).to(x.dtype) * w


@each_shape_and_dtype
def test_numerics(path, shape, dtype):
    tensors = [numbers(shape, dtype), weights(shape, dtype)]
    assert_gradients(path, norm, exact, tensors, same=two_roundings)


@any_rows()
def test_any_shape(rows, hidden, dtype, magnitude, seed):
    tensors = [numbers((rows, hidden), dtype, magnitude), numbers((hidden,), dtype)]
    assert_gradients(Path("cpu"), norm, exact, tensors, same=two_roundings)


@pytest.mark.parametrize("wanted", [[0], [1]])
def test_only_what_is_asked_for(path, wanted):
    tensors = [torch.randn(5, 32), torch.randn(32)]
    assert_gradients(path, norm, exact, tensors, wanted=wanted)


def test_a_frozen_weight_costs_no_parts(monkeypatch):
    monkeypatch.setattr(rms_norm_backward, "_both", None)
    grads = [torch.randn(5, 32)]
    gradients_of(Path("cpu"), norm, [torch.randn(5, 32), torch.randn(32)], grads, [0])


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8)])
def test_no_tokens(path, shape):
    grads = [torch.empty(shape)]
    tensors = [torch.empty(shape), torch.ones(8)]
    dx, dw = gradients_of(path, norm, tensors, grads, [0, 1])
    assert dx.shape == torch.Size(shape)
    assert torch.equal(dw, torch.zeros(8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_runs(path, dtype):
    shape = (1000, 72)
    tensors, grads = (
        [numbers(shape, dtype), weights(shape, dtype)],
        [numbers(shape, dtype)],
    )
    first = gradients_of(path, norm, tensors, grads, [0, 1])
    for _ in range(3):
        again = gradients_of(path, norm, tensors, grads, [0, 1])
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("parts", [1, 3, 70, 100])
def test_any_number_of_parts(path, parts):
    g, x, more = torch.randn(3, 70, 24).unbind(0)
    w = torch.randn(24)
    (dx, sums), _ = path.run(
        lambda *a: OP.rms_norm_backward(*a, EPS, [parts]), g, x, w, more
    )
    want, total = rms_norm_backward._reference_both(g, x, w, more, EPS, [1])
    assert sums.shape == (parts, 24)
    torch.testing.assert_close(dx, want)
    torch.testing.assert_close(sums.sum(0), total[0], rtol=1e-5, atol=1e-5)


def test_strided_gradients(path):
    x, w = torch.randn(6, 32), torch.randn(32)
    assert_gradients(path, norm, exact, [x, w], grads=[torch.randn(6, 96)[:, 32:64]])
    assert_gradients(path, norm, exact, [x, w], grads=[torch.ones(1).expand(6, 32)])


def test_non_finite_rows_stay_in_their_row(path):
    x = torch.randn(4, 32)
    x[1, 3], x[2, 5] = torch.nan, torch.inf
    dx, _ = gradients_of(path, norm, [x, torch.ones(32)], [torch.ones(4, 32)], [0, 1])
    assert dx[1].isnan().all()
    assert dx[[0, 3]].isfinite().all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"grad": torch.ones(2, 8).half()}, "grad must be float32, got float16"),
        ({"grad": torch.ones(2, 7)}, "grad must have shape [2, 8], got [2, 7]"),
        ({"weight": torch.ones(7)}, "weight must have shape [8], got [7]"),
        ({"added": torch.ones(8)}, "added must have shape [2, 8], got [8]"),
        ({"eps": 0.0}, "eps must be positive and finite, got 0"),
        ({"parts": []}, "parts must have 1 elements, got []"),
    ],
)
def test_errors(change, message):
    x = torch.ones(2, 8)
    args = {"grad": x, "input": x, "weight": x[0], "added": x, "eps": EPS, "parts": [1]}
    with pytest.raises(ValueError) as error:
        OP.rms_norm_backward(*{**args, **change}.values())
    assert str(error.value) == f"rms_norm_backward: {message}"


@pytest.mark.parametrize(
    "leading, parts",
    [
        *[([], []), ([0], [0]), ([7], [7]), ([16384], [480]), ([8, 2048], [8, 64])],
        *[([3, 2, 4096], [3, 2, 80]), ([4096, 32], [480, 1]), ([200, 32], [200, 2])],
    ],
)
def test_number_of_parts(leading, parts):
    assert rms_norm_backward._parts(leading, one=False) == parts
    assert rms_norm_backward._parts(leading, one=True) == [min(n, 1) for n in leading]


@pytest.mark.parametrize(
    "shape, parts, blocks",
    [
        *[((16384, 4096), [1], 480), ((2, 300, 4096), [1, 1], 480)],
        *[((16384, 1024), [1], 1920), ((16384, 32768), [1], 264), ((7, 64), [1], 7)],
        *[((1, 64), [1], 0), ((64,), [], 0), ((0, 64), [0], 0), ((600, 64), [480], 0)],
    ],
)
def test_number_of_blocks(shape, parts, blocks, monkeypatch):
    x = torch.empty(shape, device="meta")
    assert rms_norm_backward._num_blocks(x, parts) == 0
    monkeypatch.setattr(handlers, "platform_of", lambda device: handlers.CUDA)
    assert rms_norm_backward._num_blocks(x, parts) == blocks


def test_one_part_on_one_gpu(monkeypatch):
    x = torch.ones(2, 8)
    assert not rms_norm_backward._adds_up(x)
    monkeypatch.setattr(handlers, "platform_of", lambda device: handlers.CUDA)
    assert rms_norm_backward._adds_up(x)

    class Array(Foreign):
        device = x.device

    assert not rms_norm_backward._adds_up(Array())
    monkeypatch.setattr(handlers, "is_spmd", lambda: True)
    assert not rms_norm_backward._adds_up(x)


@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8), (8,), (0, 8)])
def test_one_part_gives_the_gradient(shape, monkeypatch):
    x, w = torch.randn(shape), torch.randn(8)
    args = (torch.ones_like(x), x, w, None, EPS, ("input", "weight"))
    want = rms_norm_backward.gradients(*args)
    monkeypatch.setattr(rms_norm_backward, "_adds_up", lambda input: True)
    got = rms_norm_backward.gradients(*args)
    torch.testing.assert_close(got, want)
