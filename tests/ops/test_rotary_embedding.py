"""xla_ops.rotary_embedding: numerics against float64, both pairings, views, errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import xla_ops
from rows import DTYPES
from support import assert_close_to_exact


def cos_sin(max_position, rotary_dim, dtype=torch.float32):
    inverse = 10000 ** (-torch.arange(0, rotary_dim, 2) / max(rotary_dim, 1))
    angles = torch.arange(max_position)[:, None] * inverse
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)


def expected(positions, heads, head_size, cache, is_neox):
    """The definition by loops over tokens and pairs, in heads' dtype."""
    out = heads.clone()
    rows = out.view(positions.numel(), -1, head_size) if out.numel() else out
    pairs = cache.shape[1] // 2
    for t, p in enumerate(positions.flatten().tolist()):
        if not 0 <= p < cache.shape[0]:
            continue
        for i in range(pairs):
            a, b = (i, i + pairs) if is_neox else (2 * i, 2 * i + 1)
            cos, sin = cache[p, i], cache[p, pairs + i]
            x, y = rows[t, :, a].clone(), rows[t, :, b].clone()
            rows[t, :, a] = x * cos - y * sin
            rows[t, :, b] = y * cos + x * sin
    return out


def exact(positions, heads, head_size, cache, is_neox):
    return expected(positions, heads.double(), head_size, cache.double(), is_neox)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize(
    "tokens, heads, kv_heads, head_size, rotary_dim",
    [
        (1, 1, 1, 2, 2),
        (3, 3, 1, 7, 6),
        (5, 4, 2, 10, 4),
        (2, 2, 2, 64, 64),
        (7, 4, 1, 80, 32),
        (2, 6, 3, 128, 0),
    ],
)
def test_numerics(path, tokens, heads, kv_heads, head_size, rotary_dim, is_neox, dtype):
    positions = torch.randint(0, 50, (tokens,))
    query = torch.randn(tokens, heads * head_size).to(dtype)
    key = torch.randn(tokens, kv_heads * head_size).to(dtype)
    cache = cos_sin(50, rotary_dim, dtype)
    results, _ = path.run(
        lambda p, q, k, c: xla_ops.rotary_embedding(p, q, k, head_size, c, is_neox),
        *(positions, query, key, cache),
    )
    rest = (head_size, cache, is_neox)
    for got, x in zip(results, (query, key), strict=True):
        assert got.dtype == dtype
        wanted = expected(positions, x, *rest)
        assert_close_to_exact(got, wanted, exact(positions, x, *rest))
        # Every product is rounded, so that there is no other right result.
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("head_size", [7, 64])
def test_int32_positions_and_float32_table(path, head_size, is_neox, dtype):
    """The bits are those of int64 and of the table in query's dtype."""
    rotary_dim = head_size // 2 * 2
    positions = torch.tensor([3, -1, 49, 50, 2**31 - 1, -(2**31), 7], dtype=torch.int32)
    query = torch.randn(7, 4 * head_size).to(dtype)
    key = torch.randn(7, 2 * head_size).to(dtype)
    cache = cos_sin(50, rotary_dim)
    (q, k), _ = path.run(
        lambda p, q, k, c: xla_ops.rotary_embedding(p, q, k, head_size, c, is_neox),
        *(positions, query, key, cache),
    )
    rest = (head_size, cache.to(dtype), is_neox)
    assert torch.equal(q, expected(positions, query, *rest))
    assert torch.equal(k, expected(positions, key, *rest))


@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("with_key", [True, False])
@pytest.mark.parametrize("batch", [(6,), (2, 3)])
@pytest.mark.parametrize("split_heads", [True, False])
def test_vllm_form(path, split_heads, batch, with_key, is_neox):
    positions = torch.randint(0, 20, batch)
    shape = (lambda n: (*batch, n, 16)) if split_heads else (lambda n: (*batch, n * 16))
    query, key, cache = torch.randn(shape(4)), torch.randn(shape(2)), cos_sin(20, 16)

    def call(p, q, k, c):
        k = k if with_key else None
        torch.ops.xla_ops.rotary_embedding(p, q, k, 16, c, is_neox)
        return q + 1

    plus_one, (_, q, k, _) = path.run(call, positions, query, key, cache)
    rest = (16, cache, is_neox)
    assert torch.equal(q, expected(positions, query, *rest))
    assert torch.equal(k, expected(positions, key, *rest) if with_key else key)
    assert torch.equal(plus_one, q + 1)


def test_slices_of_qkv(path):
    """In place in a fused projection: v and the padding of each head stay."""
    positions = torch.tensor([3, 0, 7])
    qkv, cache = torch.randn(3, 4 * 10 + 2 * 10 + 20), cos_sin(9, 8)

    def call(p, qkv, c):
        q, k, v = qkv.split([40, 20, 20], dim=-1)
        q = q.view(3, 4, 10)[..., :8]
        k = k.view(3, 2, 10)[..., :8]
        torch.ops.xla_ops.rotary_embedding(p, q, k, 8, c, True)
        return q * 1, k * 1, v * 1

    (q, k, v), (_, after, _) = path.run(call, positions, qkv, cache)
    wanted = qkv.clone()
    for view in (wanted[:, :40].view(3, 4, 10), wanted[:, 40:60].view(3, 2, 10)):
        view[..., :8] = expected(positions, view[..., :8].contiguous(), 8, cache, True)
    assert torch.equal(after, wanted)
    assert torch.equal(q, wanted[:, :40].view(3, 4, 10)[..., :8])
    assert torch.equal(k, wanted[:, 40:60].view(3, 2, 10)[..., :8])
    assert torch.equal(v, qkv[:, 60:])


@pytest.mark.parametrize("position", [-1, 9, 2**31, 2**62, -(2**63)])
def test_positions_out_of_range_leave_their_token(path, position):
    positions = torch.tensor([position, 5])
    query, key, cache = torch.randn(2, 32), torch.randn(2, 16), cos_sin(9, 16)
    (q, k), _ = path.run(
        lambda p, q, k, c: xla_ops.rotary_embedding(p, q, k, 16, c),
        *(positions, query, key, cache),
    )
    assert torch.equal(q[0], query[0]) and torch.equal(k[0], key[0])
    assert torch.equal(q, expected(positions, query, 16, cache, True))
    assert torch.equal(k, expected(positions, key, 16, cache, True))


def test_no_tokens(path):
    (q, k), _ = path.run(
        lambda p, q, k, c: xla_ops.rotary_embedding(p, q, k, 8, c),
        torch.empty(0, dtype=torch.int64),
        torch.empty(0, 16),
        torch.empty(0, 8),
        cos_sin(4, 8),
    )
    assert q.shape == (0, 16) and k.shape == (0, 8)


def test_non_finite_elements_stay_in_their_pair(path):
    query = torch.randn(2, 32)
    query[0, 3] = torch.nan
    query[1, 5] = torch.inf
    (q, _), _ = path.run(
        lambda p, q, c: xla_ops.rotary_embedding(p, q, None, 16, c),
        *(torch.tensor([1, 2]), query, cos_sin(4, 16)),
    )
    bad = ~q.isfinite()
    assert bad.nonzero().tolist() == [[0, 3], [0, 11], [1, 5], [1, 13]]


@settings(max_examples=50)
@given(data=st.data())
def test_any_shape(data):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    tokens, kv_heads, group, head_size = draw(0, 4), draw(1, 3), draw(1, 3), draw(1, 40)
    rotary_dim = 2 * draw(0, head_size // 2)
    is_neox = data.draw(st.booleans())
    dtype = data.draw(st.sampled_from(DTYPES))
    data.draw(st.random_module())
    positions = torch.randint(-1, 6, (tokens,))
    query = torch.randn(tokens, kv_heads * group, head_size).to(dtype)
    key = torch.randn(tokens, kv_heads, head_size).to(dtype)
    cache = cos_sin(5, rotary_dim, dtype)
    rest = (head_size, cache, is_neox)
    q, k = xla_ops.rotary_embedding(positions, query, key, *rest)
    assert torch.equal(q, expected(positions, query, *rest))
    assert torch.equal(k, expected(positions, key, *rest))


GOOD = {
    "positions": torch.tensor([1, 2]),
    "query": torch.ones(2, 32),
    "key": torch.ones(2, 16),
    "head_size": 8,
    "cos_sin_cache": torch.ones(4, 8),
}


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"positions": torch.ones(2)},
            "positions must be int64 or int32, got float32",
        ),
        (
            {"positions": torch.ones(1, 1, 2).long()},
            "positions must have shape [num_tokens] or [batch_size, seq_len], "
            "got [1, 1, 2]",
        ),
        ({"head_size": 0}, "head_size must be at least 1, got 0"),
        (
            {"query": torch.ones(2, 32).int()},
            "query must be float32, float16 or bfloat16, got int32",
        ),
        (
            {"query": torch.ones(2, 30)},
            "query must have shape [2, num_heads * 8] or [2, num_heads, 8], "
            "got [2, 30]",
        ),
        (
            {"query": torch.ones(3, 32)},
            "query must have shape [2, num_heads * 8] or [2, num_heads, 8], "
            "got [3, 32]",
        ),
        (
            {"query": torch.ones(2)},
            "query must have shape [2, num_heads * 8] or [2, num_heads, 8], got [2]",
        ),
        (
            {"query": torch.ones(2, 4, 9)},
            "query must have shape [2, num_heads * 8] or [2, num_heads, 8], "
            "got [2, 4, 9]",
        ),
        ({"key": torch.ones(2, 16).half()}, "key must be float32, got float16"),
        (
            {"key": torch.ones(2, 15)},
            "key must have shape [2, num_heads * 8] or [2, num_heads, 8], got [2, 15]",
        ),
        (
            {"key": torch.ones(2, 24)},
            "key must have a number of heads that divides query's 4, got 3",
        ),
        (
            {"cos_sin_cache": torch.ones(4, 8).half()},
            "cos_sin_cache must be float32, got float16",
        ),
        (
            {
                "query": torch.ones(2, 32).half(),
                "key": torch.ones(2, 16).half(),
                "cos_sin_cache": torch.ones(4, 8).bfloat16(),
            },
            "cos_sin_cache must be float16 or float32, got bfloat16",
        ),
        (
            {"cos_sin_cache": torch.ones(8)},
            "cos_sin_cache must have shape [max_position, rotary_dim], got [8]",
        ),
        (
            {"cos_sin_cache": torch.ones(4, 7)},
            "cos_sin_cache must have an even last dimension of at most 8, got 7",
        ),
        (
            {"cos_sin_cache": torch.ones(4, 10)},
            "cos_sin_cache must have an even last dimension of at most 8, got 10",
        ),
    ],
)
def test_errors(path, changes, message):
    args = {**GOOD, **changes}
    with pytest.raises(Exception) as error:
        path.run(xla_ops.rotary_embedding, *args.values())
    assert f"rotary_embedding: {message}" in str(error.value)


def test_wrong_type():
    with pytest.raises(TypeError, match="rotary_embedding: key must be a tensor, got"):
        xla_ops.rotary_embedding(**{**GOOD, "key": [1.0]})
