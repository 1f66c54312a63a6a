"""The int8 quantisations: codes against the definition, scales, zero points, errors."""

import pytest
import torch
from hypothesis import strategies as st

import xla_ops
from rows import DTYPES, SHAPES, any_rows, each_shape_and_dtype, numbers
from support import Path, int32
from xla_ops.ops import int8_quant

OPS = torch.ops.xla_ops


def check_codes(out, x, scale, azp=0):
    """Each code is the nearest integer to x / scale + azp, in exact arithmetic."""
    assert out.dtype == torch.int8
    assert out.shape == x.shape
    wanted = x.double() / scale.double() + azp
    error = (out.double() - wanted.clamp(-128, 127)).abs()
    assert (error <= 0.5 + 1e-4).all()


@pytest.mark.parametrize("azp", [None, -17, 300])
@each_shape_and_dtype
def test_static(path, shape, dtype, azp):
    x, scale = numbers(shape, dtype), torch.tensor(0.027)
    zero_point = None if azp is None else int32(azp)
    out, _ = path.run(xla_ops.static_scaled_int8_quant, x, scale, zero_point)
    check_codes(out, x, scale, azp or 0)


@each_shape_and_dtype
def test_dynamic(path, shape, dtype):
    x = numbers(shape, dtype)
    (out, scale), _ = path.run(xla_ops.dynamic_scaled_int8_quant, x)
    rows = x.reshape(-1, shape[-1]).float()
    assert torch.equal(scale, rows.abs().amax(-1, keepdim=True) / 127)
    check_codes(out.reshape(rows.shape), rows, scale)


@pytest.mark.parametrize("offset", [0.0, 5.0, -40.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [s for s in SHAPES if s != (1, 1)])
def test_dynamic_with_zero_points(path, shape, dtype, offset):
    x = numbers(shape, dtype, offset=offset)
    (out, scale, azp), _ = path.run(
        lambda x: xla_ops.dynamic_scaled_int8_quant(x, symmetric=False), x
    )
    rows = x.reshape(-1, shape[-1]).float()
    low, high = rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)
    assert torch.equal(scale, (high - low) / 255)
    assert azp.dtype == torch.int32
    exact = -128 - low.double() / scale.double()
    assert ((azp.double() - exact).abs() <= 0.5 + 1e-3).all()
    check_codes(out.reshape(rows.shape), rows, scale, azp)
    # The whole range of codes is in use.
    assert (out.reshape(rows.shape).amin(-1) <= -127).all()
    assert (out.reshape(rows.shape).amax(-1) >= 126).all()


def test_ties_go_to_even(path):
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, -128.5]])
    wanted = [[0, 2, 2, 0, -2, 126, 127, -128]]
    out, _ = path.run(xla_ops.static_scaled_int8_quant, x, torch.ones(1))
    assert out.tolist() == wanted
    out, _ = path.run(xla_ops.static_scaled_int8_quant, x, torch.ones(1), int32(0))
    assert out.tolist() == wanted


def test_static_divides_or_multiplies_as_vllm_does(path):
    scale = torch.tensor([0.3])
    x = (torch.arange(-127, 127) + 0.5)[None] * scale  # ties, or just off them
    out, _ = path.run(xla_ops.static_scaled_int8_quant, x, scale)
    divided = (x / scale).round().clamp(-128, 127)
    multiplied = (x * (1 / scale)).round().clamp(-128, 127)
    assert not torch.equal(divided, multiplied)
    assert torch.equal(out.float(), divided)
    out, _ = path.run(xla_ops.static_scaled_int8_quant, x, scale, int32(0))
    assert torch.equal(out.float(), multiplied)


def test_dynamic_factor_is_rounded_once():
    """127 / absmax, not 127 * (1 / absmax): handler and reference, as in vLLM."""
    x = torch.arange(1.0, 257.0).repeat(256, 1).tril().bfloat16()  # absmax 1 to 256
    rows, abs_max = x.float(), torch.arange(1.0, 257.0)[:, None]
    once = (rows * torch.full_like(abs_max, 127).div(abs_max)).round()
    twice = (rows * (127 * abs_max.reciprocal())).round()
    assert not torch.equal(once, twice)
    for op in (int8_quant._dynamic, int8_quant._dynamic.reference):
        assert torch.equal(op(x)[0].float(), once)


def test_zero_points_saturate(path):
    x = torch.tensor([[-3e9, -1.0, 0.0, 1.0, 3e9]])
    one = torch.ones(1)
    for azp, wanted in (
        (2**31 - 1, [-1, 127, 127, 127, 127]),
        (-(2**31), [-128, -128, -128, -128, -1]),
        (100, [-128, 99, 100, 101, 127]),
    ):
        out, _ = path.run(xla_ops.static_scaled_int8_quant, x, one, int32(azp))
        assert out.tolist() == [wanted]


def test_constant_rows_have_no_zero_point(path):
    x = torch.tensor([[0.0] * 5, [3.0] * 5, [-0.25] * 5])
    (out, scale, azp), _ = path.run(
        lambda x: xla_ops.dynamic_scaled_int8_quant(x, symmetric=False), x
    )
    assert azp.flatten().tolist() == [0, 0, 0]
    assert out.tolist() == [[0] * 5, [127] * 5, [-127] * 5]
    assert torch.equal(scale, x[:, :1].abs() / 127)


def test_non_finite(path):
    nan, inf = torch.nan, torch.inf
    x = torch.tensor([[nan, 2.0, -1.0], [nan] * 3, [inf, 1.0, -1.0], [-inf, 1.0, 2.0]])
    (out, scale), _ = path.run(xla_ops.dynamic_scaled_int8_quant, x)
    assert out.tolist() == [[0, 127, -64], [0] * 3, [0] * 3, [0] * 3]
    assert scale.flatten().tolist() == [(torch.tensor(2.0) / 127).item(), 0, inf, inf]
    (out, scale, azp), _ = path.run(
        lambda x: xla_ops.dynamic_scaled_int8_quant(x, symmetric=False), x
    )
    step = (torch.tensor(3.0) / 255).item()
    assert scale.flatten().tolist() == [step, 0, inf, inf]
    # NaN is azp; -128 - (-inf / inf) is NaN, which makes azp 0.
    assert azp.flatten().tolist() == [-43, 0, -128, 0]
    assert out.tolist() == [[-43, 127, -128], [0] * 3, [-128] * 3, [0] * 3]


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 2, 8)])
def test_no_elements(path, shape):
    x = torch.empty(shape)
    rows = 3 if shape == (3, 0) else 0
    for azp in (None, int32(1)):
        out, _ = path.run(xla_ops.static_scaled_int8_quant, x, torch.ones(1), azp)
        assert out.shape == x.shape
    (out, scale), _ = path.run(xla_ops.dynamic_scaled_int8_quant, x)
    assert out.shape == x.shape
    assert scale.tolist() == [[0]] * rows
    (out, scale, azp), _ = path.run(
        lambda x: xla_ops.dynamic_scaled_int8_quant(x, symmetric=False), x
    )
    assert out.shape == x.shape
    assert scale.tolist() == azp.tolist() == [[0]] * rows


def test_strided_input(path):
    x = numbers((6, 96), torch.bfloat16)
    (out, scale), _ = path.run(
        lambda x: xla_ops.dynamic_scaled_int8_quant(x[:, 32:64]), x
    )
    check_codes(out, x[:, 32:64].float(), scale)


@pytest.mark.parametrize("azp", [False, True])
def test_mutable_forms(path, azp):
    x, scale = numbers((5, 24), torch.float16), torch.tensor([0.02])
    poison = torch.full((5, 24), 99, dtype=torch.int8)
    zero_point = int32(7) if azp else None

    def static(result, x, scale, zero_point):
        OPS.static_scaled_int8_quant(result, x, scale, zero_point)

    def dynamic(result, x, scales, azps):
        OPS.dynamic_scaled_int8_quant(result, x, scales, azps)

    _, (result, *_) = path.run(static, poison, x, scale, zero_point)
    assert torch.equal(result, xla_ops.static_scaled_int8_quant(x, scale, zero_point))
    wanted = xla_ops.dynamic_scaled_int8_quant(x, symmetric=not azp)
    for shape in ((5, 1), (5,)):
        azps = torch.zeros(shape, dtype=torch.int32) if azp else None
        _, (result, _, scales, azps) = path.run(
            dynamic, poison, x, torch.zeros(shape), azps
        )
        assert torch.equal(result, wanted[0])
        assert torch.equal(scales, wanted[1].reshape(shape))
        assert not azp or torch.equal(azps, wanted[2].reshape(shape))


@any_rows(offset=st.sampled_from([0.0, 10.0]), azp=st.integers(-200, 200))
def test_any_shape(rows, hidden, dtype, magnitude, offset, azp, seed):
    """The handlers' bits are the references'."""
    x = numbers((rows, hidden), dtype, magnitude, offset)
    scale = torch.tensor(magnitude / 50)
    for op, args in (
        (int8_quant._static, (x, scale, None)),
        (int8_quant._static, (x, scale, int32(azp))),
        (int8_quant._dynamic, (x,)),
        (int8_quant._dynamic_azp, (x,)),
    ):
        got, _ = Path("cpu").run(op, *args)
        wanted = op.reference(*args)
        got = got if isinstance(got, tuple) else (got,)
        wanted = wanted if isinstance(wanted, tuple) else (wanted,)
        for g, w in zip(got, wanted, strict=True):
            assert torch.equal(g, w)


X = torch.ones(2, 8)
ONE = torch.ones(1)


@pytest.mark.parametrize(
    "args, message",
    [
        ((X.int(), ONE), "input must be float32, float16 or bfloat16, got int32"),
        ((X[0, 0], ONE), "input must have rank 1 or more, got shape []"),
        ((X, ONE.half()), "scale must be float32, got float16"),
        ((X, X[0, :2]), "scale must have 1 element, got shape [2]"),
        ((X, ONE, ONE.long()), "azp must be int32, got int64"),
        ((X, ONE, int32(1, 2)), "azp must have 1 element, got shape [2]"),
    ],
)
def test_static_errors(path, args, message):
    with pytest.raises(Exception) as error:
        path.run(xla_ops.static_scaled_int8_quant, *args)
    assert f"static_scaled_int8_quant: {message}" in str(error.value)


@pytest.mark.parametrize(
    "result, scale, azp, message",
    [
        (X, X[:, :1], None, "result must be int8, got float32"),
        (X[:1].char(), X[:, :1], None, "result must have shape [2, 8], got [1, 8]"),
        (X.char(), X[:, :2], None, "scale must have shape [2, 1], got [2, 2]"),
        (X.char(), X[:, :1], X[:, :1].long(), "azp must be int32, got int64"),
        (X.char(), X[:, :1], int32(1), "azp must have shape [2, 1], got [1]"),
    ],
)
def test_mutable_errors(path, result, scale, azp, message):
    def run(result, x, scale, azp):
        OPS.dynamic_scaled_int8_quant(result, x, scale, azp)

    with pytest.raises(Exception) as error:
        path.run(run, result, X, scale, azp)
    assert f"dynamic_scaled_int8_quant: {message}" in str(error.value)
