"""xla_ops.fused_qk_norm_rope_and_cache: to the bit the ops that it joins, in place."""

import doctest
import itertools
import math

import numpy as np
import pytest
import torch
import torch_xla
import torch_xla.runtime as xr
from hypothesis import given, settings
from hypothesis import strategies as st

import xla_ops
from support import Path, addresses, copies_of, programs_with
from xla_ops.core.op import OPS

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FP8 = {"fp8": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
EPS = 1e-5
MAX_POSITION = 50


def fused(qkv, k, v, sizes, rotation, is_neox, ids, slots, *rest):
    """The op, what it writes before what it reads."""
    return xla_ops.fused_qk_norm_rope_and_cache(
        qkv, *sizes, EPS, *rotation, is_neox, ids, k, v, slots, *rest
    )


def apart(qkv, k, v, sizes, rotation, is_neox, ids, slots, *rest):
    """What it means, by the ops that it joins, which rotate in place."""
    heads, kv_heads, dim = sizes
    q_weight, k_weight, table = rotation
    turned = (heads + kv_heads) * dim
    qkv = qkv.clone()
    if q_weight is None:
        args = (ids, qkv[:, :turned], None, dim, table, is_neox)
        torch.ops.xla_ops.rotary_embedding(*args)
    else:
        counts = (heads, kv_heads, kv_heads)
        weights = (q_weight, k_weight)
        xla_ops.fused_qk_norm_rope(
            qkv, *counts, dim, EPS, *weights, table, is_neox, ids
        )
    rows = qkv.unflatten(1, (heads + 2 * kv_heads, dim))
    query, key, value = rows.split((heads, kv_heads, kv_heads), dim=1)
    xla_ops.reshape_and_cache_flash(key, value, k, v, slots, *rest)
    return query


def batch(
    tokens=4,
    heads=2,
    kv_heads=1,
    dim=16,
    dtype=torch.float32,
    *,
    weights=True,
    table=None,
    is_neox=True,
    cached=None,
):
    """Arguments of the two functions above, but for caches and what is behind slots."""
    qkv = (2 * torch.randn(tokens, (heads + 2 * kv_heads) * dim)).to(dtype)
    given = [(1 + 0.3 * torch.randn(dim)).to(dtype) for _ in "qk"]
    angles = torch.rand(MAX_POSITION, dim // 2) * 2 * math.pi
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=-1).to(table or dtype)
    ids = torch.randint(-2, MAX_POSITION + 2, (tokens,))
    slots = torch.randperm(24)[: tokens if cached is None else cached]
    slots[slots % 5 == 0] = -1
    slots[slots % 7 == 6] = 24
    rotation = (*(given if weights else (None, None)), cos_sin)
    return qkv, ((heads, kv_heads, dim), rotation, is_neox, ids, slots)


def caches(kv_heads=1, dim=16, dtype=torch.float32, blocks=6, page=4):
    """K and V, of distinct old values, so that a stray write shows."""
    return torch.randn(2, blocks, page, kv_heads, dim).to(dtype)


def bits(t):
    return t.contiguous().view(torch.uint8)


def assert_same(got, wanted):
    """To the bit; on a GPU, which adds squares in another order, nearly so."""
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == b.dtype
        if xr.device_type() == "CPU":
            assert torch.equal(bits(a), bits(b))
        elif a.element_size() == 1:
            assert not a.numel() or (bits(a) != bits(b)).float().mean() < 0.01
        else:
            tolerance = 1e-5 if a.dtype == torch.float32 else 1e-2
            close = {"rtol": tolerance, "atol": tolerance, "equal_nan": True}
            torch.testing.assert_close(a, b, **close)


def on_cpu(qkv, kv, rest, *tail, take=lambda kv: kv.unbind(0)):
    """What the ops apart make of qkv, and of a copy of a buffer of both caches."""
    kv = kv.clone()
    return apart(qkv, *take(kv), *rest, *tail), kv


FORMS = pytest.mark.parametrize("weights", [True, False], ids=["norm", "no norm"])
ORDERS = pytest.mark.parametrize("is_neox", [True, False], ids=["neox", "gptj"])


@FORMS
@ORDERS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_stacked", [True, False])
def test_is_the_ops_that_it_joins(path, dtype, weights, is_neox, is_stacked):
    qkv, rest = batch(7, 4, 2, 24, dtype, weights=weights, is_neox=is_neox)
    kv = caches(2, 24, dtype)
    wanted = on_cpu(qkv, kv, rest)
    if is_stacked:
        f = lambda qkv, kv, *r: fused(qkv, *kv.unbind(0), *r)  # noqa: E731
        query, (same, got, *_) = path.run(f, qkv, kv, *rest)
    else:
        query, (same, k, v, *_) = path.run(fused, qkv, *kv, *rest)
        got = torch.stack([k, v])
    assert_same((query, got), wanted)
    assert query.is_contiguous() and torch.equal(same, qkv)


@FORMS
@pytest.mark.parametrize("kv_cache_dtype", FP8)
@pytest.mark.parametrize("as_bytes", [True, False])
def test_fp8(path, weights, kv_cache_dtype, as_bytes):
    qkv, rest = batch(7, 2, 2, 16, torch.bfloat16, weights=weights)
    qkv[0, 70:74] = torch.tensor([torch.inf, -torch.inf, 1e6, torch.nan])
    kv = caches(2, 16).to(FP8[kv_cache_dtype])
    kv = kv.view(torch.uint8) if as_bytes else kv
    scales = torch.tensor(0.5), torch.tensor([3.0])
    # Views of fp8 are not traced: as two caches.
    tail = (kv_cache_dtype, *scales)
    k, v = kv[0].clone(), kv[1].clone()
    query = apart(qkv, k, v, *rest, *tail)
    got, (_, *written) = path.run(fused, qkv, *kv, *rest, *tail)
    assert_same((got, *written[:2]), (query, k, v))


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("cached", [0, 2, 5])
def test_tokens_without_a_slot_are_rotated(path, weights, cached):
    qkv, rest = batch(5, weights=weights, cached=cached)
    kv = caches()
    query, (_, k, v, *_) = path.run(fused, qkv, *kv, *rest)
    assert_same((query, torch.stack([k, v])), on_cpu(qkv, kv, rest))


def test_float32_table_and_int32_positions(path):
    for weights in (True, False):
        given = {"weights": weights, "table": torch.float32}
        qkv, rest = batch(6, dtype=torch.bfloat16, **given)
        *front, ids, slots = rest
        kv = caches(dtype=torch.bfloat16)
        query, (_, k, v, *_) = path.run(fused, qkv, *kv, *front, ids.int(), slots)
        assert_same((query, torch.stack([k, v])), on_cpu(qkv, kv, rest))


@pytest.mark.parametrize(
    "tokens, heads, kv_heads, blocks",
    [(0, 2, 1, 6), (3, 0, 0, 6), (3, 2, 0, 6), (3, 0, 2, 6), (3, 2, 1, 0)],
)
def test_little_to_do(path, tokens, heads, kv_heads, blocks):
    qkv, rest = batch(tokens, heads, kv_heads)
    kv = caches(kv_heads, blocks=blocks)
    query, (_, k, v, *_) = path.run(fused, qkv, *kv, *rest)
    assert_same((query, torch.stack([k, v])), on_cpu(qkv, kv, rest))


# Of one buffer, K and V caches [blocks=6, page=4, heads=2, dim=16].
VIEWS = {
    "stacked": ((2, 6, 4, 2, 16), lambda kv: kv.unbind(0)),
    "values first": ((2, 6, 4, 2, 16), lambda kv: (kv[1], kv[0])),
    "interleaved": ((6, 2, 4, 2, 16), lambda kv: kv.unbind(1)),
    "HND": ((2, 6, 2, 4, 16), lambda kv: kv.transpose(2, 3).unbind(0)),
    "of more layers": ((3, 2, 6, 4, 2, 16), lambda kv: kv[1].unbind(0)),
    "padded heads": ((2, 6, 4, 2, 20), lambda kv: kv[..., :16].unbind(0)),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("weights", [True, False])
def test_writes_through_views(path, view, weights):
    shape, take = VIEWS[view]
    qkv, rest = batch(7, 2, 2, weights=weights)
    kv = torch.randn(shape)

    def step(qkv, kv, *rest):
        k, v = take(kv)
        query = fused(qkv, k, v, *rest)
        return query, k + 1, v + 1

    (query, *later), (_, written, *_) = path.run(step, qkv, kv, *rest)
    wanted = on_cpu(qkv, kv, rest, take=take)
    assert_same((query, written), wanted)
    assert_same(later, [t + 1 for t in take(wanted[1])])


@pytest.mark.parametrize("name", ["lazy", "compiled"])
def test_caches_of_other_strides_than_each_other(name):
    """XLA's are dense values; then the ops are called one by one."""
    qkv, rest = batch(7, 2, 2)
    k, v = torch.randn(6, 4, 2, 16), torch.randn(6, 2, 4, 16)

    def step(qkv, k, v, *rest):
        return fused(qkv, k, v.transpose(1, 2), *rest)

    got, (same, *written) = Path(name).run(step, qkv, k, v, *rest)
    values = v.transpose(1, 2).contiguous()
    query = apart(qkv, k, values, *rest)
    assert_same((got, *written[:2]), (query, k, values.transpose(1, 2)))
    assert torch.equal(same, qkv)


@pytest.mark.parametrize("weights", [True, False])
def test_qkv_may_be_a_view(path, weights):
    qkv, rest = batch(4, weights=weights)
    wide, kv = torch.randn(6, 80), caches()
    wide[1:5, 8:72] = qkv

    def step(wide, kv, *rest):
        return fused(wide[1:5, 8:72], *kv.unbind(0), *rest)

    query, (same, got, *_) = path.run(step, wide, kv, *rest)
    assert_same((query, got), on_cpu(qkv, kv, rest))
    assert torch.equal(same, wide)


@settings(max_examples=60)
@given(data=st.data())
def test_any_shape(data):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    dtype = data.draw(st.sampled_from(DTYPES))
    tokens, heads, kv_heads, dim = draw(0, 6), draw(0, 3), draw(0, 3), 2 * draw(1, 40)
    data.draw(st.random_module())
    qkv, rest = batch(
        *(tokens, heads, kv_heads, dim, dtype),
        weights=data.draw(st.booleans()),
        table=data.draw(st.sampled_from([dtype, torch.float32])),
        is_neox=data.draw(st.booleans()),
        cached=draw(0, tokens),
    )
    kind = data.draw(st.sampled_from(["auto", *FP8]))
    kv = caches(kv_heads, dim, FP8.get(kind, dtype))
    scales = torch.rand(1) + 0.1, torch.rand(()) + 0.1
    tail = data.draw(st.sampled_from([(kind,), (kind, *scales)]))
    take = data.draw(st.sampled_from([lambda t: t.unbind(0), lambda t: (t[1], t[0])]))
    wanted = on_cpu(qkv, kv, rest, *tail, take=take)
    query = fused(qkv, *take(kv), *rest, *tail)
    assert_same((query, kv), wanted)


@pytest.mark.parametrize("op", ["both", "stacked"])
def test_reference_is_the_handler(op):
    """To the bit without weights, but for a sum's order with them."""
    for weights, kind in itertools.product((True, False), ("auto", "fp8")):
        qkv, (sizes, rotation, is_neox, ids, slots) = batch(6, 2, 2, weights=weights)
        kv = caches(2).to(FP8.get(kind, torch.float32))
        scales = torch.tensor([0.5]), torch.tensor([2.0])
        places = [6, 4, 2, 16, 128, 32, 16, 0, 0 if op == "both" else 768]
        buffers = kv.unbind(0) if op == "both" else [kv]
        rest = (*rotation, ids, slots, *scales, *sizes, EPS, is_neox)
        args = (qkv, *buffers, *rest, kind, places, False)
        declared = OPS[f"fused_qk_norm_rope_and_cache_{op}"]
        wanted = declared.reference(*args)
        got = declared(*args, *[None] * declared.num_donors)
        for a, b in zip(got, wanted, strict=True):
            assert torch.allclose(a.float(), b.float(), atol=1e-5)


# In place. As for reshape_and_cache_flash (tests/core/test_in_place.py), many layers,
# since XLA pairs donated buffers with results by order.
LAYERS = 6
SHAPE = (37, 4, 1, 16)


def zeros(*shape):
    return torch.zeros(*shape, device=torch_xla.device())


def make(order):
    """LAYERS pairs of caches, their buffers made in the given order."""
    if order == "stacked":
        return [zeros(2, *SHAPE) for _ in range(LAYERS)]
    pairs = [(zeros(*SHAPE), zeros(*SHAPE)) for _ in range(LAYERS)]
    if order == "V before K":
        return [pair[::-1] for pair in pairs]
    if order == "all K, then all V":
        flat = [t for pair in pairs for t in pair]
        return list(zip(flat[:LAYERS], flat[LAYERS:], strict=True))
    return pairs[::-1] if order == "last layer first" else pairs


def model(x, projection, layers, meta, *rest):
    """Each layer's projection depends on what the one before read of its caches."""
    for kv in layers:
        k, v = kv.unbind(0) if isinstance(kv, torch.Tensor) else kv
        query = fused(x @ projection, k, v, *rest)
        x = x + xla_ops.paged_attention(query, (k, v), *meta, 0.2).reshape(-1, 32)
    return x


def decode():
    """Steps of two sequences: (inputs, other arguments, outs and caches of a CPU)."""
    _, rest = batch(2)
    *rest, _ = rest
    rest = (*rest[:3], torch.tensor([3, 5]), torch.tensor([4, 9]))
    int32 = lambda *values: torch.tensor(values, dtype=torch.int32)  # noqa: E731
    meta = (int32(1, 2), int32([1], [2]), int32(0, 1, 2), int32(2))
    xs, projection = torch.randn(3, 2, 32), torch.randn(32, 64) * 0.2
    layers = [torch.zeros(2, *SHAPE) for _ in range(LAYERS)]
    outs = [model(x, projection, layers, meta, *rest) for x in xs]
    return xs, (projection, meta, *rest), outs, layers


IN_PLACE = pytest.mark.parametrize("name", ["lazy", "compiled", "dispatched"])
MADE = ["layer by layer", "last layer first", "V before K", "all K, then all V"]


@IN_PLACE
@pytest.mark.parametrize(
    "order, form",
    [
        *((order, "pairs") for order in (*MADE, "stacked")),
        *(("layer by layer", form) for form in ("K list, V list", "V list, K list")),
        ("V before K", "K list, V list"),
    ],
)
def test_every_cache_stays_where_it_is(name, order, form):
    xs, (projection, meta, *rest), outs, wanted = decode()
    layers = make(order)
    if form == "pairs":
        step, given = model, [layers]
    else:
        first, second = zip(*layers, strict=True)
        back = slice(None, None, -1 if form.startswith("V") else 1)

        def step(x, projection, first, second, *others):
            pairs = zip(*(first, second)[back], strict=True)
            return model(x, projection, list(pairs), *others)

        given = [*(first, second)[back]]
    path = Path(name)
    f = path.function(step)
    projection, meta, rest = path.put((projection, meta, tuple(rest)))
    flat = [t for kv in layers for t in (kv if isinstance(kv, tuple) else (kv,))]
    for x, out in zip(path.put(xs).unbind(0), outs, strict=True):
        before = addresses(flat)
        got = f(x * 1, projection, *given, meta, *rest)
        assert addresses(flat) == before
        assert torch.allclose(got.cpu(), out, atol=1e-4)
    for kv, cache in zip(layers, wanted, strict=True):
        assert torch.allclose(torch.stack([t.cpu() for t in kv]), cache, atol=1e-4)


@IN_PLACE
def test_no_byte_is_copied(name, hlo_dump):
    """Neither of a cache nor of a projection, nor is one taken apart.

    The CPU's matmul is a fusion of its own, so only "copy" counts for projections.
    """
    blocks, tokens, path = 1013, 13, Path(name)  # sizes that no other test has
    kv, k, v = (zeros(*n, blocks, 4, 1, 16) for n in ((2,), (), ()))
    addresses([kv, k, v])
    _, rest = batch(tokens)
    x, projection, rest = path.put((torch.randn(tokens, 8), torch.randn(8, 64), rest))

    def step(x, projection, kv, k, v, *rest):
        one = fused(x @ projection, *kv.unbind(0), *rest)
        other = fused((x + 1) @ projection, k, v, *rest)
        return one.sum(-1), other.sum(-1)

    path.function(step)(x, projection, kv, k, v, *rest)
    addresses([kv, k, v])
    programs = programs_with((tokens, 64), hlo_dump)
    assert programs, "the program was not dumped"
    for program in programs:
        for shape in ((2, blocks, 4, 1, 16), (blocks, 4, 1, 16)):
            assert copies_of(shape, program) == []
        assert not [c for c in copies_of((tokens, 64), program) if " copy" in c]
        assert copies_of((tokens, 2, 16), program) == []
        assert program.count('target="xla_ops.') == 2


@pytest.mark.parametrize(
    "backend, weights",
    [("aot_eager", True), ("aot_eager", False), ("inductor", True)],
)
def test_compiled_for_the_cpu(backend, weights):
    qkv, rest = batch(7, 2, 2, weights=weights)
    kv = caches(2)
    wanted = on_cpu(qkv, kv, rest)
    address = kv.data_ptr()

    def step(qkv, kv, *rest):
        return fused(qkv, *kv.unbind(0), *rest)

    before = qkv.clone()
    query = torch.compile(step, backend=backend, fullgraph=True)(qkv, kv, *rest)
    assert kv.data_ptr() == address
    assert torch.equal(qkv, before)
    assert_same((query, kv), wanted)


GOOD = {
    "qkv": torch.ones(3, 64),
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "eps": EPS,
    "q_weight": torch.ones(8),
    "k_weight": torch.ones(8),
    "cos_sin_cache": torch.ones(5, 8),
    "is_neox": True,
    "position_ids": torch.arange(3),
    "key_cache": torch.ones(2, 4, 2, 8),
    "value_cache": torch.ones(2, 4, 2, 8),
    "slot_mapping": torch.arange(3),
    "kv_cache_dtype": "auto",
    "k_scale": None,
    "v_scale": None,
}
ERRORS = [
    ("qkv", torch.ones(3, 64).int(), "be float32, float16 or bfloat16, got int32"),
    ("qkv", torch.ones(3, 32), "have shape [num_tokens, 64], got [3, 32]"),
    ("num_heads", -1, "be at least 0, got -1"),
    ("num_kv_heads", -1, "be at least 0, got -1"),
    ("head_dim", 7, "be even and at least 2, got 7"),
    ("eps", 0.0, "be positive and finite, got 0"),
    ("k_weight", None, "be given with q_weight, got None"),
    ("q_weight", torch.ones(8).half(), "be float32, got float16"),
    ("k_weight", torch.ones(4), "have shape [8], got [4]"),
    ("cos_sin_cache", torch.ones(5, 8).half(), "be float32, got float16"),
    ("cos_sin_cache", torch.ones(5, 4), "have shape [max_position, 8], got [5, 4]"),
    ("position_ids", torch.ones(3), "be int64 or int32, got float32"),
    ("position_ids", torch.arange(4), "have shape [3], got [4]"),
    (
        "key_cache",
        torch.ones(2, 8),
        "have shape [num_blocks, page_size, num_kv_heads, head_dim], got [2, 8]",
    ),
    (
        "value_cache",
        torch.ones(3, 4, 2, 8),
        "have shape [2, 4, 2, 8], got [3, 4, 2, 8]",
    ),
    ("slot_mapping", torch.arange(3).int(), "be int64, got int32"),
    ("slot_mapping", torch.arange(3)[None], "have shape [num_tokens], got [1, 3]"),
    ("slot_mapping", torch.arange(4), "have at most 3 elements, got 4"),
    ("kv_cache_dtype", "int8", "be auto, fp8, fp8_e4m3 or fp8_e5m2, got int8"),
    ("k_scale", torch.ones(1).half(), "be float32, got float16"),
    ("v_scale", torch.ones(2), "have 1 element, got shape [2]"),
]


@pytest.mark.parametrize("argument, value, message", ERRORS)
def test_errors(path, argument, value, message):
    with pytest.raises(Exception) as error:
        path.run(
            xla_ops.fused_qk_norm_rope_and_cache,
            *(GOOD | {argument: value}).values(),
        )
    text = f"fused_qk_norm_rope_and_cache: {argument} must {message}"
    assert text in str(error.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"q_weight": None},
            "k_weight must be absent without q_weight, got shape [8]",
        ),
        (
            {"kv_cache_dtype": "fp8"},
            "key_cache must be float8_e4m3fn or uint8, got float32",
        ),
        (
            dict.fromkeys(("key_cache", "value_cache"), torch.ones(2, 4, 1, 8)),
            "key_cache must have heads and head_dim [2, 8], got [1, 8]",
        ),
        (
            dict.fromkeys(("key_cache", "value_cache"), torch.ones(2, 0, 2, 8)),
            "page_size must be at least 1, got 0",
        ),
    ],
)
def test_errors_of_several(changes, message):
    with pytest.raises(ValueError) as error:
        xla_ops.fused_qk_norm_rope_and_cache(**GOOD | changes)
    assert str(error.value) == "fused_qk_norm_rope_and_cache: " + message


@pytest.mark.parametrize("backend", [None, "aot_eager"])
@pytest.mark.parametrize("is_stacked", [True, False])
def test_qkv_may_lie_where_it_is_written(backend, is_stacked):
    """The first token's key and value lie on what is read for the others."""

    def step(kv, values):
        given = {"qkv": kv.flatten()[:192].view(3, 64), "key_cache": kv[0]}
        given |= {"value_cache": values, "slot_mapping": torch.tensor([6, 7, 3])}
        return xla_ops.fused_qk_norm_rope_and_cache(**GOOD | given)

    def steps_apart(kv, values):
        qkv = kv.flatten()[:192].view(3, 64).clone()
        given = {"qkv": qkv, "key_cache": kv[0], "value_cache": values}
        given |= {"slot_mapping": torch.tensor([6, 7, 3])}
        return xla_ops.fused_qk_norm_rope_and_cache(**GOOD | given)

    run = torch.compile(step, backend=backend) if backend else step
    kv, values = torch.randn(2, 2, 4, 2, 8), torch.randn(2, 4, 2, 8)
    both, apart = [], []
    for function, found in ((run, both), (steps_apart, apart)):
        own = kv.clone(), values.clone()
        given = (own[0], own[0][1]) if is_stacked else own
        found += [function(*given), *own]
    for got, wanted in zip(both, apart, strict=True):
        assert torch.equal(got, wanted)


def test_caches_lie_apart():
    with pytest.raises(ValueError, match="value_cache must not share memory with key"):
        xla_ops.fused_qk_norm_rope_and_cache(
            **GOOD | {"value_cache": GOOD["key_cache"]}
        )


def test_wrong_types():
    for name in ("qkv", "cos_sin_cache", "key_cache", "slot_mapping"):
        with pytest.raises(TypeError, match=f"{name} must be a tensor, got list"):
            xla_ops.fused_qk_norm_rope_and_cache(**GOOD | {name: [1.0]})
    for name in ("q_weight", "v_scale"):
        with pytest.raises(
            TypeError, match=f"{name} must be a tensor or None, got lis"
        ):
            xla_ops.fused_qk_norm_rope_and_cache(**GOOD | {name: [1.0]})
    with pytest.raises(TypeError, match="kv_cache_dtype must be a str, got None"):
        xla_ops.fused_qk_norm_rope_and_cache(**GOOD | {"kv_cache_dtype": None})


def test_numbers():
    """Counts may be NumPy's, and must be numbers."""
    counts = {"num_heads": np.int64(4), "num_kv_heads": np.uint8(2)}
    xla_ops.fused_qk_norm_rope_and_cache(**GOOD | counts)
    for name in ("num_heads", "num_kv_heads", "head_dim"):
        with pytest.raises(TypeError, match=f"{name} must be an int, got True"):
            xla_ops.fused_qk_norm_rope_and_cache(**GOOD | {name: True})


@pytest.mark.parametrize("argument", ["qkv", "q_weight", "key_cache", "cos_sin_cache"])
@pytest.mark.parametrize("name", ["cpu", "lazy"])
def test_has_no_gradient(name, argument):
    given = Path(name).put(dict(GOOD))
    with torch.enable_grad():
        given[argument] = given[argument].clone().requires_grad_()
        with pytest.raises(RuntimeError) as error:
            xla_ops.fused_qk_norm_rope_and_cache(**given)
    text = f"fused_qk_norm_rope_and_cache: has no gradient: {argument} requires one"
    assert text in str(error.value)


def test_example():
    """Of the docstring."""
    function = xla_ops.fused_qk_norm_rope_and_cache
    found = doctest.DocTestFinder(recurse=False).find(
        function, globs={"torch": torch, function.__name__: function}
    )
    result = doctest.DocTestRunner().run(found[0])
    assert result.attempted == 6 and not result.failed


def test_debug_reports_skipped_slots(capfd):
    xla_ops.set_debug(True)
    try:
        slots = torch.tensor([1, -1, 8])
        xla_ops.fused_qk_norm_rope_and_cache(**GOOD | {"slot_mapping": slots})
    finally:
        xla_ops.set_debug(False)
    assert capfd.readouterr().err == (
        "xla_ops: fused_qk_norm_rope_and_cache: slot_mapping[2] must be less than 8,"
        " got 8; skipped\n"
    )
