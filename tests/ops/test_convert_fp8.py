"""convert_fp8: every code, roundings, saturation, both directions, errors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import xla_ops
from support import Path

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FORMATS = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


def to_fp8(x, scale, fp8):
    limit = torch.finfo(fp8).max
    return (x.float() / torch.tensor(scale)).clamp(-limit, limit).to(fp8)


def from_fp8(codes, scale, dtype):
    return (codes.float() * torch.tensor(scale)).to(dtype)


def same(a, b):
    assert a.dtype == b.dtype and a.shape == b.shape
    return torch.equal(a.float().nan_to_num(12345.0), b.float().nan_to_num(12345.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (7, 66), (2, 3, 4, 50), (3, 4096)])
@pytest.mark.parametrize("format", FORMATS)
def test_to_fp8(path, format, shape, dtype):
    x = (100 * torch.randn(shape)).to(dtype)
    out, _ = path.run(xla_ops.convert_fp8, x, 0.37, format)
    assert same(out, to_fp8(x, 0.37, FORMATS[format]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("as_bytes", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_from_fp8_every_code(path, format, as_bytes, dtype):
    codes = torch.arange(256).to(torch.uint8).reshape(4, 64)
    typed = codes.view(FORMATS[format])
    src = codes if as_bytes else typed
    out, _ = path.run(lambda src: xla_ops.convert_fp8(src, 1.3, format, dtype), src)
    assert same(out, from_fp8(typed, 1.3, dtype))


def test_bytes_are_the_codes(path):
    x = 100 * torch.randn(5, 24)
    typed, _ = path.run(xla_ops.convert_fp8, x, 0.5, "fp8")
    out, _ = path.run(lambda x: xla_ops.convert_fp8(x, 0.5, "fp8", torch.uint8), x)
    assert torch.equal(out, typed.view(torch.uint8))


def test_saturates_and_keeps_nan(path):
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30, -0.0])
    for format, limit in (("fp8", 448.0), ("fp8_e5m2", 57344.0)):
        out, _ = path.run(xla_ops.convert_fp8, x, 1.0, format)
        assert out[0].float().isnan()
        assert out[1:].float().tolist() == [limit, -limit, limit, 0.0]


@pytest.mark.parametrize("shape", [(0,), (3, 0, 8)])
def test_nothing_to_do(path, shape):
    out, _ = path.run(xla_ops.convert_fp8, torch.empty(shape))
    assert out.shape == shape


def test_strided_source(path):
    x = torch.randn(6, 96)
    out, _ = path.run(lambda x: xla_ops.convert_fp8(x[:, 32:64], 0.5), x)
    assert same(out, to_fp8(x[:, 32:64], 0.5, torch.float8_e4m3fn))


@pytest.mark.parametrize("codes", [torch.uint8, torch.float8_e4m3fn])
def test_vllm_form(path, codes):
    x = 10 * torch.randn(6, 40)
    op = torch.ops.xla_ops.convert_fp8
    dst = torch.zeros(6, 40, dtype=torch.uint8).view(codes)
    _, (dst, after) = path.run(lambda d, s: op(d, s, 0.5, "fp8"), dst, x)
    assert torch.equal(after, x)
    assert same(dst.view(torch.float8_e4m3fn), to_fp8(x, 0.5, torch.float8_e4m3fn))
    _, (back, _) = path.run(
        lambda d, s: op(d, s, 0.5, "fp8"), torch.empty(6, 40).half(), dst
    )
    wanted = from_fp8(dst.view(torch.float8_e4m3fn), 0.5, torch.float16)
    assert torch.equal(back, wanted)


def test_vllm_form_writes_into_a_view(path):
    x = torch.randn(3, 8)

    def call(base, x):
        torch.ops.xla_ops.convert_fp8(base[1:4], x, 0.5, "fp8")

    _, (base, _) = path.run(call, torch.full((5, 8), 7, dtype=torch.uint8), x)
    wanted = torch.full((5, 8), 7, dtype=torch.uint8)
    wanted[1:4] = to_fp8(x, 0.5, torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(base, wanted)


@settings(max_examples=50)
@given(
    size=st.integers(0, 300),
    dtype=st.sampled_from(DTYPES),
    format=st.sampled_from(sorted(FORMATS)),
    scale=st.floats(1e-3, 1e3),
    seed=st.random_module(),
)
def test_there_and_back(size, dtype, format, scale, seed):
    """No more than half a step of the format, of what it can hold."""
    fp8 = FORMATS[format]
    x = torch.randn(size).to(dtype)
    codes, _ = Path("cpu").run(xla_ops.convert_fp8, x, scale, format)
    back, _ = Path("cpu").run(
        lambda c: xla_ops.convert_fp8(c, scale, format, torch.float32), codes
    )
    info = torch.finfo(fp8)
    inside = x.double().clamp(-info.max * scale, info.max * scale)
    step = info.eps * inside.abs().clamp(min=info.smallest_normal * scale)
    assert ((back.double() - inside).abs() <= 0.5001 * step).all()


@pytest.mark.parametrize(
    "args, message",
    [
        ((torch.ones(8), 1.0, "auto"), "kv_cache_dtype must be fp8, fp8_e4m3 or"),
        ((torch.ones(8), 0.0), "scale must be positive and finite, got 0"),
        ((torch.ones(8), -1.0), "scale must be positive and finite, got -1"),
        ((torch.ones(8), math.inf), "scale must be positive and finite, got inf"),
        ((torch.ones(8), math.nan), "scale must be positive and finite, got nan"),
        (
            (torch.ones(8).int(), 1.0, "fp8", torch.float32),
            "src must be float32, float16, bfloat16, float8_e4m3fn or uint8, got int32",
        ),
        (
            (torch.ones(8).to(torch.float8_e5m2), 1.0, "fp8", torch.float32),
            "float8_e4m3fn or uint8, got float8_e5m2",
        ),
        (
            (torch.ones(8), 1.0, "fp8", torch.float32),
            "dst must be float8_e4m3fn or uint8, got float32",
        ),
        (
            (torch.ones(8).to(torch.uint8), 1.0, "fp8", torch.int8),
            "dst must be float32, float16 or bfloat16, got int8",
        ),
        (
            (torch.ones(8).to(torch.uint8),),
            "dtype must be float32, float16 or bfloat16, got None",
        ),
    ],
)
def test_errors(path, args, message):
    src, *rest = args
    with pytest.raises(Exception) as error:
        path.run(lambda src: xla_ops.convert_fp8(src, *rest), src)
    assert "convert_fp8: " in str(error.value) and message in str(error.value)


def test_vllm_form_errors(path):
    with pytest.raises(Exception) as error:
        path.run(
            lambda d, s: torch.ops.xla_ops.convert_fp8(d, s, 1.0, "fp8"),
            *(torch.ones(8).to(torch.uint8), torch.ones(9)),
        )
    assert "convert_fp8: dst must have shape [9], got [8]" in str(error.value)
