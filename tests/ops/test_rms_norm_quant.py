"""RMSNorm with a quantised result: codes and scales, in place, shapes, errors."""

import pytest
import torch

import xla_ops
from rows import any_rows, each_shape_and_dtype, residual_inputs
from support import Path, assert_close_to_exact
from xla_ops.ops import rms_norm_quant

EPS = 1e-5
E4M3 = torch.float8_e4m3fn
# How far two roundings and, in fp32, a sum in another order move a result.
STEPS = {torch.float32: 2**-19, torch.float16: 2**-9, torch.bfloat16: 2**-6}
OPS = torch.ops.xla_ops


def exact_norm(x, w):
    """Of float64 rows, without rounding."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * w.double()


def quantised(y, quant_dtype, scale=None):
    """The definition in plain torch, without a bound; y is rounded to its dtype."""
    largest = 127 if quant_dtype == torch.int8 else 448
    y = y.reshape(-1, y.shape[-1]).float()
    if scale is None:
        scale = y.abs().amax(-1, keepdim=True) / largest
    codes = (y / scale).clamp(-largest, largest)
    return (codes.round() if quant_dtype == torch.int8 else codes).to(
        quant_dtype
    ), scale


def check_error(out, scale, exact, normed, dynamic=False):
    """The project's accuracy rule for what the codes stand for.

    Args:
        out, scale: what the op gave.
        exact: the norm in float64.
        normed: the same in plain torch, rounded to the op's dtype.
        dynamic: whether the op chose the scales.
    """
    codes, plain_scale = quantised(normed, out.dtype, None if dynamic else scale)
    exact = exact.reshape(codes.shape)
    if not dynamic:
        exact = exact.clamp(-448 * scale.double(), 448 * scale.double())
    assert_close_to_exact(
        out.reshape(codes.shape).float().double() * scale.double(),
        codes.float().double() * plain_scale.double(),
        exact,
    )


def two_roundings(x, w):
    """Of rows in their dtype or, where the sum is not rounded, in float32."""
    x = x.float()
    s = torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
    return (x * s).to(w.dtype) * w


def check_codes(out, y, scale, dtype, quant_dtype=E4M3):
    """Codes are nearest to y / scale, but for the two roundings of y to its dtype."""
    assert out.dtype == quant_dtype
    assert out.shape == y.shape
    codes = out.double() if quant_dtype == torch.int8 else out.float().double()
    y = y.reshape(-1, y.shape[-1])
    codes = codes.reshape(y.shape)
    wanted = y / scale.double()
    y_error = wanted.abs() * STEPS[dtype]
    if quant_dtype == torch.int8:
        wanted, step = wanted.clamp(-128, 127), torch.tensor(0.5)
    else:
        wanted = wanted.clamp(-448, 448)
        step = wanted.abs().clamp(min=2**-6) * 2**-4
    assert ((codes - wanted).abs() <= step * 1.07 + y_error).all()


@each_shape_and_dtype
def test_static(path, shape, dtype):
    x, r, w = residual_inputs(shape, dtype)
    scale = torch.tensor([0.0123])
    out, _ = path.run(
        lambda x, w, s: xla_ops.rms_norm_static_fp8_quant(x, w, s, EPS), x, w, scale
    )
    exact = exact_norm(x.double(), w)
    check_codes(out, exact, scale, dtype)
    check_error(out, scale, exact, two_roundings(x, w))
    (out, z), _ = path.run(
        lambda *args: xla_ops.fused_add_rms_norm_static_fp8_quant(*args, EPS),
        *(x, r, w, scale),
    )
    assert torch.equal(z, x + r)
    exact = exact_norm(z.double(), w)
    check_codes(out, exact, scale, dtype)
    check_error(out, scale, exact, two_roundings(z, w))


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("quant_dtype", [E4M3, torch.int8])
@each_shape_and_dtype
def test_dynamic(path, shape, dtype, quant_dtype, residual):
    x, r, w = residual_inputs(shape, dtype)

    def run(x, w, r):
        return xla_ops.rms_norm_dynamic_per_token_quant(
            x, w, quant_dtype, EPS, residual=r
        )

    (out, scale, *rest), _ = path.run(run, x, w, r if residual else None)
    exact = x.double() + r.double() if residual else x.double()
    y = exact_norm(exact, w)
    largest = y.reshape(-1, shape[-1]).abs().amax(-1, keepdim=True)
    wanted = largest / (127 if quant_dtype == torch.int8 else 448)
    assert scale.dtype == torch.float32
    assert scale.shape == wanted.shape
    assert ((scale.double() - wanted).abs() <= wanted * STEPS[dtype]).all()
    check_codes(out, y, scale, dtype, quant_dtype)
    z = x.float() + r.float() if residual else x
    check_error(out, scale, y, two_roundings(z, w), dynamic=True)
    if residual:
        assert torch.equal(rest[0], x + r)


def test_same_as_the_two_ops(path):
    """But for codes that the order of the sum moves."""
    x, r, w = residual_inputs((5, 100), torch.bfloat16)
    scale = torch.tensor([0.02])
    out, _ = path.run(
        lambda x, w, s: xla_ops.rms_norm_static_fp8_quant(x, w, s, EPS), x, w, scale
    )
    two = xla_ops.static_scaled_fp8_quant(xla_ops.rms_norm(x, w, EPS), scale)
    assert (out.float() == two.float()).float().mean() > 0.99
    (out, _), _ = path.run(
        lambda *args: xla_ops.fused_add_rms_norm_static_fp8_quant(*args, EPS),
        *(x, r, w, scale),
    )
    y, _ = xla_ops.fused_add_rms_norm(x, r, w, EPS)
    two = xla_ops.static_scaled_fp8_quant(y, scale)
    assert (out.float() == two.float()).float().mean() > 0.99


@pytest.mark.parametrize(
    "dtype, r0, step", [(torch.float16, 0.12, 0.25), (torch.bfloat16, 0.9883, 2.0)]
)
def test_the_dynamic_sum_is_not_rounded(path, dtype, r0, step):
    """256 + r0 rounds to 256, which would be less than the root mean square here."""
    x = torch.full((1, 64), 256.0, dtype=dtype)
    r = torch.zeros(1, 64, dtype=dtype)
    r[0, 0], r[0, 1:26] = r0, step
    w = torch.full((64,), 0.5, dtype=dtype)
    w[0] = 1  # the first element decides the scale
    (_, scale, z), _ = path.run(
        lambda x, w, r: xla_ops.rms_norm_dynamic_per_token_quant(
            x, w, torch.int8, EPS, residual=r
        ),
        *(x, w, r),
    )
    assert torch.equal(z, x + r)
    assert z[0, 0] == 256
    assert scale.item() == (torch.tensor(1.0) / 127).item()


def test_scale_ub(path):
    x, _, w = residual_inputs((4, 64), torch.float32)
    bound = torch.tensor([1.5])
    (out, scale), _ = path.run(
        lambda x, w, b: xla_ops.rms_norm_dynamic_per_token_quant(x, w, E4M3, EPS, b),
        *(x, w, bound),
    )
    assert (scale == torch.tensor(1.5) / 448).all()
    assert (out.float().abs() == 448).any()
    check_codes(out, exact_norm(x.double(), w), scale, torch.float32)


@pytest.mark.parametrize("quant_dtype", [E4M3, torch.int8])
def test_zeros_and_non_finite(path, quant_dtype):
    x, _, w = residual_inputs((4, 32), torch.float32)
    x[0] = 0
    x[1, 3] = torch.nan
    x[2, 5] = torch.inf
    (out, scale), _ = path.run(
        lambda x, w: xla_ops.rms_norm_dynamic_per_token_quant(x, w, quant_dtype, EPS),
        *(x, w),
    )
    smallest = 2**-23 if quant_dtype == torch.int8 else 1 / (448 * 512)
    nan_code = 0 if quant_dtype == torch.int8 else 448
    # inf * 0 is NaN, the rest of its row 0.
    assert (scale[:3] == torch.tensor(smallest)).all()
    codes = out.float()
    assert (codes[0] == 0).all()
    assert (codes[1] == nan_code).all()
    assert codes[2, 5] == nan_code
    assert (codes[2, :5] == 0).all()
    clean = xla_ops.rms_norm_dynamic_per_token_quant(x[3:], w, quant_dtype, EPS)
    assert torch.equal(codes[3], clean[0][0].float())


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 8)])
def test_no_elements(path, shape):
    x, r, w = torch.empty(shape), torch.empty(shape), torch.ones(shape[-1])
    one = torch.ones(1)
    out, _ = path.run(xla_ops.rms_norm_static_fp8_quant, x, w, one)
    assert out.shape == x.shape
    (out, z), _ = path.run(xla_ops.fused_add_rms_norm_static_fp8_quant, x, r, w, one)
    assert out.shape == z.shape == x.shape
    for residual in (None, r):
        (out, scale, *_), _ = path.run(
            lambda x, w, r: xla_ops.rms_norm_dynamic_per_token_quant(
                x, w, torch.int8, residual=r
            ),
            *(x, w, residual),
        )
        assert out.shape == x.shape
        assert scale.tolist() == [[2**-23]] * (3 if shape == (3, 0) else 0)


def test_mutable_forms(path):
    x, r, w = residual_inputs((5, 40), torch.float16)
    scale = torch.tensor([0.02])
    result = torch.full((5, 40), 3.0).to(E4M3)

    def static(result, x, w, s):
        OPS.rms_norm_static_fp8_quant(result, x, w, s, EPS)

    _, (got, *_) = path.run(static, result, x, w, scale)
    wanted = xla_ops.rms_norm_static_fp8_quant(x, w, scale, EPS)
    assert torch.equal(got.float(), wanted.float())

    def fused(result, x, r, w, s):
        OPS.fused_add_rms_norm_static_fp8_quant(result, x, r, w, s, EPS)

    _, (got, x_after, z, *_) = path.run(fused, result, x, r, w, scale)
    wanted, _ = xla_ops.fused_add_rms_norm_static_fp8_quant(x, r, w, scale, EPS)
    assert torch.equal(got.float(), wanted.float())
    assert torch.equal(x_after, x)
    assert torch.equal(z, x + r)

    def dynamic(result, x, w, scales, r):
        OPS.rms_norm_dynamic_per_token_quant(result, x, w, scales, EPS, None, r)

    for dtype in (E4M3, torch.int8):
        for residual in (None, r):
            for shape in ((5, 1), (5,)):
                _, (got, _, _, scales, z) = path.run(
                    dynamic,
                    result.float().to(dtype),
                    x,
                    w,
                    torch.zeros(shape),
                    residual,
                )
                wanted, wanted_scales, *_ = xla_ops.rms_norm_dynamic_per_token_quant(
                    x, w, dtype, EPS, residual=residual
                )
                assert torch.equal(got.float(), wanted.float())
                assert torch.equal(scales, wanted_scales.reshape(shape))
                assert residual is None or torch.equal(z, x + r)


@any_rows()
def test_any_shape(rows, hidden, dtype, magnitude, seed):
    """Handler and reference differ by the order of the sum only."""
    x, r, w = residual_inputs((rows, hidden), dtype, magnitude)
    scale = torch.tensor([0.02])
    bound = torch.tensor(2.0)
    for op, args in (
        (rms_norm_quant._static, (x, w, scale, EPS)),
        (rms_norm_quant._fused_static, (x, r, w, scale, EPS)),
        (rms_norm_quant._dynamic, (x, w, E4M3, EPS, bound)),
        (rms_norm_quant._fused_dynamic, (x, r, w, E4M3, EPS, None)),
        (rms_norm_quant._fused_dynamic, (x, r, w, torch.int8, EPS, None)),
    ):
        got, _ = Path("cpu").run(op, *args)
        wanted = op.reference(*args)
        got = got if isinstance(got, tuple) else (got,)
        wanted = wanted if isinstance(wanted, tuple) else (wanted,)
        for g, w_ in zip(got, wanted, strict=True):
            assert g.shape == w_.shape
            assert g.dtype == w_.dtype
            # A step of codes; scales follow the largest element, rounded to dtype.
            rtol, atol = {
                E4M3: (1 / 8, 2**-9),
                torch.int8: (0, 1),
                torch.float32: (STEPS[dtype], 0),
            }.get(g.dtype, (0, 0))
            assert torch.allclose(g.float(), w_.float(), rtol=rtol, atol=atol)


X = torch.ones(2, 8)
W = torch.ones(8)
ONE = torch.ones(1)


@pytest.mark.parametrize(
    "args, message",
    [
        ((X.int(), W, ONE), "input must be float32, float16 or bfloat16, got int32"),
        ((X[0, 0], W, ONE), "input must have rank 1 or more, got shape []"),
        ((X, W.half(), ONE), "weight must be float32, got float16"),
        ((X, W[:7], ONE), "weight must have shape [8], got [7]"),
        ((X, W, ONE.half()), "scale must be float32, got float16"),
        ((X, W, W), "scale must have 1 element, got shape [8]"),
        ((X, W, ONE, 0.0), "eps must be positive and finite, got 0"),
    ],
)
def test_static_errors(path, args, message):
    with pytest.raises(Exception) as error:
        path.run(xla_ops.rms_norm_static_fp8_quant, *args)
    assert f"rms_norm_static_fp8_quant: {message}" in str(error.value)
    args = (args[0], args[0], *args[1:])
    with pytest.raises(Exception) as error:
        path.run(xla_ops.fused_add_rms_norm_static_fp8_quant, *args)
    assert f"fused_add_rms_norm_static_fp8_quant: {message}" in str(error.value)


@pytest.mark.parametrize(
    "dtype, bound, residual, message",
    [
        (
            torch.uint8,
            None,
            None,
            "quant_dtype must be float8_e4m3fn or int8, got uint8",
        ),
        (E4M3, W, None, "scale_ub must have 1 element, got shape [8]"),
        (E4M3, ONE.half(), None, "scale_ub must be float32, got float16"),
        (torch.int8, ONE, None, "scale_ub must be left out for int8, got a tensor"),
        (E4M3, None, X.half(), "residual must be float32, got float16"),
        (E4M3, None, X[:1], "residual must have shape [2, 8], got [1, 8]"),
    ],
)
def test_dynamic_errors(path, dtype, bound, residual, message):
    def run(x, w, bound, residual):
        return xla_ops.rms_norm_dynamic_per_token_quant(
            x, w, dtype, EPS, bound, residual
        )

    with pytest.raises(Exception) as error:
        path.run(run, X, W, bound, residual)
    assert f"rms_norm_dynamic_per_token_quant: {message}" in str(error.value)


def test_mutable_error():
    with pytest.raises(ValueError, match="result must be float8_e4m3fn or int8"):
        OPS.rms_norm_dynamic_per_token_quant(X, X, W, ONE, EPS, None, None)
