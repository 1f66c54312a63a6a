"""The fp8 quantisations: codes against the definition, scales, padding, errors."""

import pytest
import torch

import xla_ops
from rows import any_rows, each_shape_and_dtype, numbers
from support import Path

E4M3 = torch.float8_e4m3fn
SMALLEST = 1 / (448 * 512)
OPS = torch.ops.xla_ops


def check_codes(out, x, scale):
    """Each code is the nearest fp8 number to x / scale, in exact arithmetic."""
    assert out.dtype == E4M3
    assert out.shape == x.shape
    wanted = (x.double() / scale.double()).clamp(-448, 448)
    error = (out.float().double() - wanted).abs()
    # Half a step: 2^-4 of the number, 2^-10 below the smallest normal; and the fp32
    # rounding of the quotient, which may move a tie.
    assert (error <= wanted.abs().clamp(min=2**-6) * 2**-4 * (1 + 1e-5)).all()


@each_shape_and_dtype
def test_static(path, shape, dtype):
    x, scale = numbers(shape, dtype), torch.tensor(0.013)
    out, _ = path.run(xla_ops.static_scaled_fp8_quant, x, scale)
    check_codes(out, x, scale)


@each_shape_and_dtype
def test_dynamic(path, shape, dtype):
    x = numbers(shape, dtype)
    (out, scale), _ = path.run(xla_ops.dynamic_scaled_fp8_quant, x)
    assert scale.shape == (1,)
    assert torch.equal(scale, (x.float().abs().max() / 448).reshape(1))
    check_codes(out, x, scale)


@pytest.mark.parametrize("bound", [None, 4.0])
@each_shape_and_dtype
def test_per_token(path, shape, dtype, bound):
    x = numbers(shape, dtype)
    bound = None if bound is None else torch.tensor([bound])
    (out, scale), _ = path.run(xla_ops.dynamic_per_token_scaled_fp8_quant, x, bound)
    rows = x.reshape(-1, shape[-1]).float()
    largest = rows.abs().amax(-1, keepdim=True)
    if bound is not None:
        largest = largest.clamp(max=bound.item())
    assert torch.equal(scale, (largest / 448).clamp(min=SMALLEST))
    check_codes(out.reshape(rows.shape), rows, scale)


def test_the_quotient_is_vllms(path):
    """Static: times the inverse. Per token: divided. Ties can tell."""
    bound = torch.tensor(448 * 0.3)
    scale = bound / 448
    ties = torch.cat([torch.arange(17, 32, 2) * 2.0**e for e in range(-3, 4)])
    x = torch.cat([ties * scale, bound[None]])[None]
    by_inverse = (x * (1 / scale)).to(E4M3).float()
    divided = (x / scale).to(E4M3).float()
    assert not torch.equal(by_inverse, divided)
    out, _ = path.run(xla_ops.static_scaled_fp8_quant, x, scale)
    assert torch.equal(out.float(), by_inverse)
    (out, token_scale), _ = path.run(
        xla_ops.dynamic_per_token_scaled_fp8_quant, x, bound
    )
    assert token_scale.item() == scale.item()
    assert torch.equal(out.float(), divided)


def test_ties_go_to_even(path):
    x = torch.tensor([[17.0, 19.0, -17.0, 2**-10, 3 * 2**-10, 447.0]])
    out, _ = path.run(xla_ops.static_scaled_fp8_quant, x, torch.ones(1))
    assert out.float().tolist() == [[16.0, 20.0, -16.0, 0.0, 2**-8, 448.0]]


def test_non_finite(path):
    inf, nan = torch.inf, torch.nan
    x = torch.tensor([[nan, inf, -inf, 1.0], [1.0, -2.0, nan, 0.0], [nan] * 4])
    one = torch.ones(1)
    out, _ = path.run(xla_ops.static_scaled_fp8_quant, x, one)
    assert out.float()[0].tolist() == [448, 448, -448, 1]
    (out, scale), _ = path.run(xla_ops.dynamic_scaled_fp8_quant, x[1:])
    assert scale.item() == torch.tensor(2 / 448).item()
    assert out.float()[0].tolist() == [224, -448, 448, 0]
    (out, scale), _ = path.run(xla_ops.dynamic_per_token_scaled_fp8_quant, x)
    assert scale[0].item() == inf
    assert out.float()[0].tolist() == [448, 448, 448, 0]
    assert out.float()[1].tolist() == [224, -448, 448, 0]
    assert scale[2].item() == torch.tensor(SMALLEST).item()
    assert out.float()[2].tolist() == [448] * 4


def test_zeros(path):
    x = torch.zeros(2, 40)
    (out, scale), _ = path.run(xla_ops.dynamic_scaled_fp8_quant, x)
    assert scale.item() == 0
    assert (out.float() == 448).all()  # 0 / 0, as in vLLM
    (out, scale), _ = path.run(xla_ops.dynamic_per_token_scaled_fp8_quant, x)
    assert (scale == torch.tensor(SMALLEST)).all()
    assert (out.float() == 0).all()


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 2, 8)])
def test_no_elements(path, shape):
    x = torch.empty(shape)
    out, _ = path.run(xla_ops.static_scaled_fp8_quant, x, torch.ones(1))
    assert out.shape == x.shape
    (out, scale), _ = path.run(xla_ops.dynamic_scaled_fp8_quant, x)
    assert out.shape == x.shape
    assert scale.tolist() == [0]
    (out, scale), _ = path.run(xla_ops.dynamic_per_token_scaled_fp8_quant, x)
    assert out.shape == x.shape
    assert scale.tolist() == [[torch.tensor(SMALLEST).item()]] * (
        3 if 3 in shape else 0
    )


def test_strided_input(path):
    x = numbers((6, 96), torch.bfloat16)
    (out, scale), _ = path.run(
        lambda x: xla_ops.dynamic_per_token_scaled_fp8_quant(x[:, 32:64]), x
    )
    check_codes(out, x[:, 32:64].float(), scale)


@pytest.mark.parametrize("rows", [5, 8])
def test_mutable_forms(path, rows):
    """vLLM's calls; rows of the result past the input's stay as they are."""
    x = numbers((5, 24), torch.float16)
    scale = torch.tensor([0.02])
    poison = torch.full((rows, 24), 3.0).to(E4M3)

    def static(result, x, scale):
        OPS.static_scaled_fp8_quant(result, x, scale)

    def dynamic(result, x, scale):
        OPS.dynamic_scaled_fp8_quant(result, x, scale)

    def per_token(result, x, scale):
        OPS.dynamic_per_token_scaled_fp8_quant(result, x, scale, None)

    wanted = xla_ops.static_scaled_fp8_quant(x, scale).float()
    _, (result, *_) = path.run(static, poison, x, scale)
    assert torch.equal(result[:5].float(), wanted)
    assert (result[5:].float() == 3).all()

    wanted, wanted_scale = xla_ops.dynamic_scaled_fp8_quant(x)
    _, (result, _, found) = path.run(dynamic, poison, x, torch.tensor([7.0, 8.0]))
    assert torch.equal(result[:5].float(), wanted.float())
    assert (result[5:].float() == 3).all()
    assert found.tolist() == [wanted_scale.item(), 8.0]

    wanted, wanted_scale = xla_ops.dynamic_per_token_scaled_fp8_quant(x)
    for shape in ((5, 1), (5,)):
        _, (result, _, found) = path.run(per_token, poison, x, torch.zeros(shape))
        assert torch.equal(result[:5].float(), wanted.float())
        assert torch.equal(found, wanted_scale.reshape(shape))


@any_rows()
def test_any_shape(rows, hidden, dtype, magnitude, seed):
    """The handlers' bits are the references'."""
    x = numbers((rows, hidden), dtype, magnitude)
    cpu = Path("cpu")
    from xla_ops.ops import fp8_quant

    for op, args in (
        (fp8_quant._static, (x, torch.tensor([magnitude / 100]))),
        (fp8_quant._dynamic, (x,)),
        (fp8_quant._per_token, (x, None)),
        (fp8_quant._per_token, (x, torch.tensor(magnitude))),
    ):
        got, _ = cpu.run(op, *args)
        wanted = op.reference(*args)
        got = got if isinstance(got, tuple) else (got,)
        wanted = wanted if isinstance(wanted, tuple) else (wanted,)
        for g, w in zip(got, wanted, strict=True):
            assert torch.equal(g.float(), w.float())


X = torch.ones(2, 8)
ONE = torch.ones(1)


@pytest.mark.parametrize(
    "name, args, message",
    [
        (
            "static_scaled_fp8_quant",
            (X.int(), ONE),
            "input must be float32, float16 or bfloat16, got int32",
        ),
        (
            "static_scaled_fp8_quant",
            (X[0, 0], ONE),
            "input must have rank 1 or more, got shape []",
        ),
        (
            "static_scaled_fp8_quant",
            (X, ONE.half()),
            "scale must be float32, got float16",
        ),
        (
            "static_scaled_fp8_quant",
            (X, X[0, :2]),
            "scale must have 1 element, got shape [2]",
        ),
        (
            "dynamic_scaled_fp8_quant",
            (X.int(),),
            "input must be float32, float16 or bfloat16, got int32",
        ),
        (
            "dynamic_per_token_scaled_fp8_quant",
            (X, X[0, :2]),
            "scale_ub must have 1 element, got shape [2]",
        ),
        (
            "dynamic_per_token_scaled_fp8_quant",
            (X, ONE.double()),
            "scale_ub must be float32, got float64",
        ),
    ],
)
def test_errors(path, name, args, message):
    with pytest.raises(Exception) as error:
        path.run(getattr(xla_ops, name), *args)
    assert f"{name}: {message}" in str(error.value)


@pytest.mark.parametrize(
    "result, scale, message",
    [
        (X, ONE, "result must be float8_e4m3fn, got float32"),
        (X[:, :7].to(E4M3), ONE, "result must have shape [2, 8], got [2, 7]"),
        (X.to(E4M3), ONE, "scale must have shape [2, 1], got [1]"),
    ],
)
def test_mutable_errors(path, result, scale, message):
    def call(result, x, scale):
        OPS.dynamic_per_token_scaled_fp8_quant(result, x, scale, None)

    with pytest.raises(Exception) as error:
        path.run(call, result, X, scale)
    assert f"dynamic_per_token_scaled_fp8_quant: {message}" in str(error.value)
