"""xla_ops.merge_attn_states: numerics against float64, empty sides, views, errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import xla_ops
from rows import DTYPES
from support import Path, assert_close_to_exact

INF = torch.inf


def merged(prefix, prefix_lse, suffix, suffix_lse, dtype):
    """The definition, without regard to empty sides, computed in `dtype`."""
    p, s = prefix_lse.to(dtype), suffix_lse.to(dtype)
    m = torch.maximum(p, s)
    wp, ws = torch.exp(p - m), torch.exp(s - m)
    turn = lambda w: (w / (wp + ws)).t().unsqueeze(-1)  # noqa: E731
    output = prefix.to(dtype) * turn(wp) + suffix.to(dtype) * turn(ws)
    return output, torch.log(wp + ws) + m


def inputs(tokens, heads, dim, dtype=torch.float32):
    prefix, suffix = (torch.randn(tokens, heads, dim).to(dtype) for _ in range(2))
    prefix_lse, suffix_lse = (3 * torch.randn(heads, tokens) for _ in range(2))
    return prefix, prefix_lse, suffix, suffix_lse


def check(got, args):
    output, lse = got
    wanted, wanted_lse = merged(*args, torch.float64)
    same, same_lse = merged(*args, torch.float32)
    assert output.dtype == args[0].dtype and lse.dtype == torch.float32
    assert_close_to_exact(output, same.to(output.dtype), wanted)
    assert_close_to_exact(lse, same_lse, wanted_lse)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (3, 5, 7), (17, 3, 40), (5, 8, 128), (2, 1, 257), (300, 2, 8)]
)
def test_numerics(path, shape, dtype):
    args = inputs(*shape, dtype)
    got, _ = path.run(xla_ops.merge_attn_states, *args)
    check(got, args)


@pytest.mark.parametrize("with_lse", [True, False])
def test_vllm_form(path, with_lse):
    args = inputs(4, 3, 16)
    output, lse = torch.full((4, 3, 16), torch.nan), torch.full((3, 4), torch.nan)

    def call(output, lse, *args):
        torch.ops.xla_ops.merge_attn_states(output, lse if with_lse else None, *args)

    _, (output, lse, *after) = path.run(call, output, lse, *args)
    wanted, wanted_lse = xla_ops.merge_attn_states(*args)
    assert torch.allclose(output, wanted, atol=1e-6)
    assert torch.allclose(lse, wanted_lse, atol=1e-6) if with_lse else lse.isnan().all()
    for a, b in zip(after, args, strict=True):
        assert torch.equal(a, b)


def test_over_its_own_inputs(path):
    """output may be prefix_output and output_lse prefix_lse, as in a running merge."""
    args = inputs(40, 3, 24)

    def call(*args):
        torch.ops.xla_ops.merge_attn_states(args[0], args[1], *args)

    _, (output, lse, suffix, suffix_lse) = path.run(call, *args)
    wanted, wanted_lse = xla_ops.merge_attn_states(*args)
    assert torch.allclose(output, wanted, atol=1e-6)
    assert torch.allclose(lse, wanted_lse, atol=1e-6)
    assert torch.equal(suffix, args[2]) and torch.equal(suffix_lse, args[3])


def test_padded_heads(path):
    """As vLLM's MLA does: outputs are slices of wider heads."""
    wide = torch.randn(2, 4, 3, 24)
    lse = torch.randn(2, 3, 4)

    def call(wide, lse):
        wide = wide[..., :16]
        return xla_ops.merge_attn_states(wide[0], lse[0], wide[1], lse[1])

    got, _ = path.run(call, wide, lse)
    check(got, (wide[0, ..., :16], lse[0], wide[1, ..., :16], lse[1]))


@pytest.mark.parametrize("empty", [-INF, INF])
def test_sides_without_keys(path, empty):
    prefix, prefix_lse, suffix, suffix_lse = inputs(4, 1, 8)
    prefix_lse[0, 0] = suffix_lse[0, 1] = prefix_lse[0, 2] = suffix_lse[0, 2] = empty
    prefix[0] = torch.nan  # what no key wrote, nobody reads
    suffix[1:3] = torch.nan
    args = (prefix, prefix_lse, suffix, suffix_lse)
    (output, lse), _ = path.run(xla_ops.merge_attn_states, *args)
    assert torch.equal(output[0], suffix[0]) and lse[0, 0] == suffix_lse[0, 0]
    assert torch.equal(output[1], prefix[1]) and lse[0, 1] == prefix_lse[0, 1]
    assert torch.equal(output[2], prefix[2]) and lse[0, 2] == -INF
    check((output[3:], lse[:, 3:]), [a[3:] if a.dim() == 3 else a[:, 3:] for a in args])


@pytest.mark.parametrize("other", [0.0, -INF, INF])
@pytest.mark.parametrize("side", [1, 3])
def test_nan_lse_shows(path, side, other):
    args = inputs(2, 1, 8)
    args[side][0, 0] = torch.nan
    args[4 - side][0, 0] = other
    (output, lse), _ = path.run(xla_ops.merge_attn_states, *args)
    assert output[0].isnan().all() and lse[0, 0].isnan()
    assert output[1].isfinite().all() and lse[0, 1].isfinite()


@pytest.mark.parametrize("far", [200.0, 1e30])
def test_distant_lse_values_do_not_overflow(path, far):
    args = inputs(3, 2, 8)
    args[1].fill_(far)
    args[3].fill_(-far)
    (output, lse), _ = path.run(xla_ops.merge_attn_states, *args)
    assert torch.equal(output, args[0])
    assert torch.equal(lse, args[1])


@pytest.mark.parametrize("shape", [(0, 2, 8), (3, 0, 8)])
def test_no_tokens(path, shape):
    (output, lse), _ = path.run(xla_ops.merge_attn_states, *inputs(*shape))
    assert output.shape == shape
    assert lse.shape == (shape[1], shape[0])


@settings(max_examples=50)
@given(
    tokens=st.integers(0, 5),
    heads=st.integers(1, 5),
    dim=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    seed=st.random_module(),
)
def test_any_shape(tokens, heads, dim, dtype, seed):
    args = inputs(tokens, heads, dim, dtype)
    got, _ = Path("cpu").run(xla_ops.merge_attn_states, *args)
    check(got, args)


OUT, LSE = torch.ones(4, 2, 8), torch.ones(2, 4)


@pytest.mark.parametrize(
    "args, message",
    [
        (
            (OUT.int(), LSE, OUT, LSE),
            "prefix_output must be float32, float16 or bfloat16, got int32",
        ),
        (
            (OUT[0], LSE, OUT, LSE),
            "prefix_output must have shape [num_tokens, num_heads, head_dim], "
            "got [2, 8]",
        ),
        ((OUT, LSE.half(), OUT, LSE), "prefix_lse must be float32, got float16"),
        ((OUT, LSE.t(), OUT, LSE), "prefix_lse must have shape [2, 4], got [4, 2]"),
        ((OUT, LSE, OUT.half(), LSE), "suffix_output must be float32, got float16"),
        (
            (OUT, LSE, OUT[..., :7], LSE),
            "suffix_output must have shape [4, 2, 8], got [4, 2, 7]",
        ),
        ((OUT, LSE, OUT, LSE.half()), "suffix_lse must be float32, got float16"),
        ((OUT, LSE, OUT, LSE[:1]), "suffix_lse must have shape [2, 4], got [1, 4]"),
    ],
)
def test_errors(path, args, message):
    with pytest.raises(Exception) as error:
        path.run(xla_ops.merge_attn_states, *args)
    assert f"merge_attn_states: {message}" in str(error.value)


def test_wrong_type():
    with pytest.raises(TypeError, match="suffix_lse must be a tensor, got float"):
        xla_ops.merge_attn_states(OUT, LSE, OUT, 1.0)
