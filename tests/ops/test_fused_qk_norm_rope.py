"""xla_ops.fused_qk_norm_rope: numerics against float64, views, errors."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import xla_ops
from support import Path, assert_close_to_exact, copies_of, programs_with
from xla_ops.core.op import OPS

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-5


def cos_sin(max_position, head_dim, dtype=torch.float32):
    inverse = 10000 ** (-torch.arange(0, head_dim, 2) / head_dim)
    angles = torch.arange(max_position)[:, None] * inverse
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)


def expected(qkv, q, k, v, dim, eps, q_weight, k_weight, cache, is_neox, positions):
    """The definition by loops over tokens and heads, in qkv's dtype throughout."""
    out = qkv.clone()
    rows = out.view(len(positions), q + k + v, dim)
    for t, p in enumerate(positions.tolist()):
        for h in range(q + k):
            x = rows[t, h].clone()
            y = x / torch.sqrt((x * x).mean() + eps) * (q_weight if h < q else k_weight)
            if 0 <= p < cache.shape[0]:
                cos, sin = cache[p].to(qkv.dtype).chunk(2)
                a, b = y.chunk(2) if is_neox else (y[::2], y[1::2])
                pair = (a * cos - b * sin, b * cos + a * sin)
                y = torch.cat(pair) if is_neox else torch.stack(pair, -1).flatten()
            rows[t, h] = y
    return out


def exact(*args):
    wide = [a.double() if is_float(a) else a for a in args]
    return expected(*wide)


def is_float(a):
    return isinstance(a, torch.Tensor) and a.is_floating_point()


def batch(tokens, q, k, v, dim, dtype=torch.float32, is_neox=True, cache_dtype=None):
    weights = [(1 + 0.3 * torch.randn(dim)).to(dtype) for _ in range(2)]
    return (
        (2 * torch.randn(tokens, (q + k + v) * dim)).to(dtype),
        *(q, k, v, dim, EPS, *weights),
        *(cos_sin(50, dim, cache_dtype or dtype), is_neox),
        torch.randint(0, 50, (tokens,)),
    )


def check(got, args):
    """No worse than the formula in fp32, rounded once at the end."""
    dtype = args[0].dtype
    once = expected(*[a.float() if is_float(a) else a for a in args]).to(dtype)
    assert got.dtype == dtype
    assert_close_to_exact(got, once, exact(*args))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize(
    "tokens, q, k, v, dim",
    [
        (1, 1, 1, 1, 2),
        (3, 3, 1, 2, 6),
        (7, 4, 2, 2, 64),
        (2, 1, 1, 0, 80),
        (5, 2, 1, 1, 128),
        (2, 2, 0, 1, 256),
        (2, 0, 2, 1, 32),
        (1, 1, 1, 1, 1026),
    ],
)
def test_numerics(path, tokens, q, k, v, dim, is_neox, dtype):
    args = batch(tokens, q, k, v, dim, dtype, is_neox)
    result, (got, *_) = path.run(xla_ops.fused_qk_norm_rope, *args)
    assert result is None
    check(got, args)
    values = slice((q + k) * dim, None)
    assert torch.equal(got[:, values], args[0][:, values])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_neox", [True, False])
def test_float32_table_and_int32_positions(path, is_neox, dtype):
    """The table's entries are not rounded."""
    args = batch(7, 3, 1, 1, 64, dtype, is_neox, torch.float32)
    *rest, positions = args
    _, (got, *_) = path.run(xla_ops.fused_qk_norm_rope, *rest, positions.int())
    check(got, args)


def test_rounds_once():
    """rms_norm and rotary_embedding by themselves are further from the truth."""
    args = batch(64, 4, 2, 1, 64, torch.bfloat16)
    _, (got, *_) = Path("cpu").run(xla_ops.fused_qk_norm_rope, *args)
    qkv, q, k, v, dim, eps, q_weight, k_weight, cache, is_neox, positions = args
    heads = qkv.view(64, q + k + v, dim)
    parts = (
        xla_ops.rms_norm(heads[:, :q].contiguous(), q_weight, eps),
        xla_ops.rms_norm(heads[:, q : q + k].contiguous(), k_weight, eps),
    )
    rotated = xla_ops.rotary_embedding(positions, *parts, dim, cache, is_neox)
    apart = torch.cat([*rotated, heads[:, q + k :]], dim=1).view(qkv.shape)
    truth = exact(*args)
    error = lambda x: (x.double() - truth).abs().mean().item()  # noqa: E731
    assert error(got) < 0.7 * error(apart)
    assert (got.float() - apart.float()).abs().max() < 0.1


@pytest.mark.parametrize("position", [-1, 50, 2**31, 2**62, -(2**63)])
def test_positions_out_of_range_are_not_rotated(path, position):
    *rest, positions = batch(2, 2, 1, 1, 16)
    positions[0] = position
    args = (*rest, positions)
    _, (got, *_) = path.run(xla_ops.fused_qk_norm_rope, *args)
    check(got, args)


@pytest.mark.parametrize("tokens, q, k, v", [(0, 2, 1, 1), (3, 0, 0, 2), (3, 0, 0, 0)])
def test_nothing_to_do(path, tokens, q, k, v):
    args = batch(tokens, q, k, v, 8)
    _, (got, *_) = path.run(xla_ops.fused_qk_norm_rope, *args)
    assert torch.equal(got, args[0])


def test_no_positions_known(path):
    args = list(batch(3, 2, 1, 1, 8))
    args[8] = torch.empty(0, 8)
    _, (got, *_) = path.run(xla_ops.fused_qk_norm_rope, *args)
    check(got, args)


def test_non_finite_elements_stay_in_their_head(path):
    args = batch(2, 2, 1, 1, 16)
    args[0][0, 3] = torch.nan
    args[0][1, 16 + 5] = torch.inf
    _, (got, *_) = path.run(xla_ops.fused_qk_norm_rope, *args)
    bad = ~got.view(2, 4, 16).isfinite()
    assert bad.any(-1).nonzero().tolist() == [[0, 0], [1, 1]]
    assert bad[0, 0].all()


def test_later_reads_see_the_update(path):
    args = batch(4, 2, 1, 1, 16)

    def call(qkv, *rest):
        before = qkv * 1
        xla_ops.fused_qk_norm_rope(qkv, *rest)
        q, k, v = qkv.split([32, 16, 16], dim=-1)
        return before, q * 1, k * 1, v * 1

    (before, *parts), (after, *_) = path.run(call, *args)
    assert torch.equal(before, args[0])
    assert torch.equal(torch.cat(parts, dim=-1), after)
    check(after, args)


VIEWS = {
    "rows": ((9, 64), lambda t: t[2:6]),
    "columns": ((4, 80), lambda t: t[:, 8:72]),
    "of two": ((2, 4, 64), lambda t: t[1]),
    "flat": ((256,), lambda t: t.view(4, 64)),
}


@pytest.mark.parametrize("view", VIEWS)
def test_writes_through_views(path, view):
    shape, take = VIEWS[view]
    base, (_, *rest) = torch.randn(shape), batch(4, 2, 1, 1, 16)

    def call(base, *rest):
        xla_ops.fused_qk_norm_rope(take(base), *rest)
        return base + 1

    plus_one, (after, *_) = path.run(call, base, *rest)
    dense, _ = path.run(
        lambda qkv, *rest: xla_ops.fused_qk_norm_rope(qkv, *rest) or qkv * 1,
        *(take(base).contiguous(), *rest),
    )
    wanted = base.clone()
    take(wanted).copy_(dense)
    assert torch.equal(after, wanted)
    assert torch.equal(plus_one, wanted + 1)


def test_a_projection_is_updated_without_a_copy(hlo_dump):
    hidden, weight = torch.randn(5, 24), torch.randn(24, 4 * 34)
    _, *rest = batch(5, 2, 1, 1, 34)

    def call(hidden, weight, *rest):
        qkv = hidden @ weight
        xla_ops.fused_qk_norm_rope(qkv, *rest)
        return qkv.sum(-1)

    got, _ = Path("compiled").run(call, hidden, weight, *rest)
    reference = OPS["fused_qk_norm_rope_functional"].reference
    assert torch.allclose(got, reference(hidden @ weight, *rest).sum(-1), atol=1e-4)
    (program,) = programs_with((5, 136), hlo_dump)
    assert not [c for c in copies_of((5, 136), program) if " copy" in c]


@settings(max_examples=50)
@given(data=st.data())
def test_any_shape(data):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    tokens, q, k, v = draw(0, 4), draw(0, 3), draw(0, 2), draw(0, 2)
    dtype = data.draw(st.sampled_from(DTYPES))
    table = data.draw(st.sampled_from([dtype, torch.float32]))
    is_neox = data.draw(st.booleans())
    dim = 2 * draw(1, 40)
    data.draw(st.random_module())
    args = batch(tokens, q, k, v, dim, dtype, is_neox, table)
    _, (got, *_) = Path("cpu").run(xla_ops.fused_qk_norm_rope, *args)
    check(got, args)


GOOD = {
    "qkv": torch.ones(3, 64),
    "num_heads_q": 4,
    "num_heads_k": 2,
    "num_heads_v": 2,
    "head_dim": 8,
    "eps": EPS,
    "q_weight": torch.ones(8),
    "k_weight": torch.ones(8),
    "cos_sin_cache": torch.ones(5, 8),
    "is_neox": True,
    "position_ids": torch.arange(3),
}


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"qkv": torch.ones(3, 64).int()},
            "qkv must be float32, float16 or bfloat16, got int32",
        ),
        ({"num_heads_q": -1}, "num_heads_q must be at least 0, got -1"),
        ({"num_heads_v": -1}, "num_heads_v must be at least 0, got -1"),
        ({"head_dim": 7}, "head_dim must be even and at least 2, got 7"),
        ({"head_dim": 0}, "head_dim must be even and at least 2, got 0"),
        (
            {"num_heads_v": 1},
            "qkv must have shape [num_tokens, 56], got [3, 64]",
        ),
        (
            {"qkv": torch.ones(64)},
            "qkv must have shape [num_tokens, 64], got [64]",
        ),
        ({"eps": 0.0}, "eps must be positive and finite, got 0"),
        ({"eps": math.nan}, "eps must be positive and finite, got nan"),
        ({"q_weight": torch.ones(8).half()}, "q_weight must be float32, got float16"),
        ({"k_weight": torch.ones(4)}, "k_weight must have shape [8], got [4]"),
        (
            {"cos_sin_cache": torch.ones(5, 8).half()},
            "cos_sin_cache must be float32, got float16",
        ),
        (
            {"cos_sin_cache": torch.ones(5, 4)},
            "cos_sin_cache must have shape [max_position, 8], got [5, 4]",
        ),
        (
            {"position_ids": torch.ones(3)},
            "position_ids must be int64 or int32, got float32",
        ),
        (
            {"position_ids": torch.arange(4)},
            "position_ids must have shape [3], got [4]",
        ),
    ],
)
def test_errors(path, changes, message):
    args = GOOD | changes
    with pytest.raises(Exception) as error:
        path.run(xla_ops.fused_qk_norm_rope, *args.values())
    assert "fused_qk_norm_rope: " + message in str(error.value)


def test_wrong_type():
    with pytest.raises(TypeError, match="qkv must be a tensor, got list"):
        xla_ops.fused_qk_norm_rope(**GOOD | {"qkv": [1.0]})


def test_numbers():
    """Counts may be NumPy's, and must be numbers."""
    counts = {"num_heads_q": np.int64(4), "num_heads_k": np.uint8(2)}
    xla_ops.fused_qk_norm_rope(**GOOD | counts | {"head_dim": torch.tensor(8)})
    for name in ("num_heads_q", "num_heads_k", "num_heads_v", "head_dim"):
        with pytest.raises(TypeError, match=f"{name} must be an int, got True"):
            xla_ops.fused_qk_norm_rope(**GOOD | {name: True})
