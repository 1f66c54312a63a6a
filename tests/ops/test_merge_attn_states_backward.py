"""The gradients of merge_attn_states: numerics against float64, empty sides."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import xla_ops
from differentiated import assert_gradients, gradients_of
from rows import DTYPES
from support import Path

merge = xla_ops.merge_attn_states


def exact(prefix, p, suffix, s):
    """In the widest dtype that is given; outputs in their own."""
    wide = p.dtype
    weight = torch.sigmoid(p - s).t().unsqueeze(-1)
    output = prefix.to(wide) * weight + suffix.to(wide) * (1 - weight)
    return output.to(prefix.dtype), torch.logaddexp(p, s)


def inputs(tokens, heads, dim, dtype=torch.float32):
    prefix, suffix = (torch.randn(tokens, heads, dim).to(dtype) for _ in range(2))
    p, s = (3 * torch.randn(heads, tokens) for _ in range(2))
    return [prefix, p, suffix, s]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (3, 5, 7), (17, 3, 40), (5, 8, 128), (2, 1, 257), (300, 2, 8)]
)
def test_numerics(path, shape, dtype):
    assert_gradients(path, merge, exact, inputs(*shape, dtype))


@pytest.mark.parametrize("wanted", [[0], [1], [3], [1, 2]])
def test_only_what_is_asked_for(path, wanted):
    assert_gradients(path, merge, exact, inputs(3, 2, 8), wanted=wanted)


@pytest.mark.parametrize("used", [0, 1])
def test_one_result_is_used(path, used):
    grads = [torch.randn(3, 2, 8), torch.randn(2, 3)]
    grads[1 - used] = None
    wanted = [0, 1, 2, 3]
    if used == 0:
        assert_gradients(path, merge, exact, inputs(3, 2, 8), grads=grads)
        return
    # Float64's own has none for the outputs, on which the lse does not depend.
    args = inputs(3, 2, 8)
    found = gradients_of(path, merge, args, grads, wanted)
    assert not found[0].any() and not found[2].any()
    right = gradients_of(Path("cpu"), exact, args, grads, [1, 3])
    torch.testing.assert_close([found[1], found[3]], right)


@settings(max_examples=50)
@given(
    shape=st.tuples(st.integers(0, 9), st.integers(0, 5), st.integers(0, 70)),
    dtype=st.sampled_from(DTYPES),
    seed=st.random_module(),
)
def test_any_shape(shape, dtype, seed):
    assert_gradients(Path("cpu"), merge, exact, inputs(*shape, dtype))


@pytest.mark.parametrize("empty", [torch.inf, -torch.inf])
def test_empty_sides(path, empty):
    """NaN in what is not looked at does not get out; both empty: prefix has it all."""
    prefix, p, suffix, s = inputs(3, 1, 8)
    s[0, 0], suffix[0] = empty, torch.nan
    p[0, 1], prefix[1] = empty, torch.nan
    p[0, 2], s[0, 2] = empty, -empty
    grads = [torch.randn(3, 1, 8), torch.randn(1, 3)]
    found = gradients_of(path, merge, [prefix, p, suffix, s], grads, [0, 1, 2, 3])
    assert torch.equal(found[0], grads[0] * torch.tensor([1.0, 0, 1])[:, None, None])
    assert torch.equal(found[2], grads[0] * torch.tensor([0.0, 1, 0])[:, None, None])
    assert torch.equal(found[1], grads[1] * torch.tensor([1.0, 0, 0]))
    assert torch.equal(found[3], grads[1] * torch.tensor([0.0, 1, 0]))


def test_errors():
    op = torch.ops.xla_ops.merge_attn_states_backward
    args = inputs(3, 2, 8)
    for grads, message in [
        ((torch.ones(3, 2, 7), None), "grad_output must have shape [3, 2, 8]"),
        ((torch.ones(3, 2, 8).half(), None), "grad_output must be float32"),
        ((torch.ones(3, 2, 8), torch.ones(3, 2)), "grad_lse must have shape [2, 3]"),
    ]:
        with pytest.raises(ValueError) as error:
            op(*grads, *args)
        assert f"merge_attn_states_backward: {message}, got " in str(error.value)
