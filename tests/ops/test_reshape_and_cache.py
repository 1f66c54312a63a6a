"""xla_ops.reshape_and_cache: what is written where, what is not, and errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import xla_ops
from support import Path

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FP8 = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


def expected(rows, cache, slots, scale=None, kv_cache_dtype="auto"):
    """The op by a plain loop over tokens; keys' caches have five dimensions."""
    cache = cache.clone()
    num_blocks, page = cache.shape[0], cache.shape[3]
    if kv_cache_dtype != "auto":
        dtype = FP8[kv_cache_dtype]
        limit = torch.finfo(dtype).max
        rows = (rows.float() / scale).clamp(-limit, limit).to(dtype).view(cache.dtype)
    for t, slot in enumerate(slots.tolist()):
        if 0 <= slot < num_blocks * page:
            at = cache[slot // page, :, :, slot % page]
            at.copy_(rows[t].reshape(at.shape))
    return cache


def caches(blocks, heads, dim, page, x, dtype):
    """Of old values, so that a stray write shows."""
    keys = torch.randn(blocks, heads, dim // x, page, x).to(dtype)
    return keys, torch.randn(blocks, heads, dim, page).to(dtype)


def numbers(t, fp8):
    return t.view(fp8).float().nan_to_num(12345.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "tokens, heads, dim, blocks, page, x",
    [
        (1, 1, 8, 1, 1, 8),
        (5, 3, 24, 7, 3, 8),
        (37, 2, 64, 5, 16, 4),
        (3, 1, 7, 4, 5, 7),
        (3, 1, 7, 4, 5, 1),
    ],
)
def test_auto(path, tokens, heads, dim, blocks, page, x, dtype):
    key, value = (torch.randn(tokens, heads, dim).to(dtype) for _ in range(2))
    kc, vc = caches(blocks, heads, dim, page, x, dtype)
    slots = torch.randperm(blocks * page)[:tokens]
    slots[tokens // 2] = -1
    _, args = path.run(xla_ops.reshape_and_cache, key, value, kc, vc, slots)
    assert torch.equal(args[2], expected(key, kc, slots))
    assert torch.equal(args[3], expected(value, vc, slots))


@pytest.mark.parametrize("kv_cache_dtype", FP8)
@pytest.mark.parametrize("as_bytes", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8(path, kv_cache_dtype, as_bytes, dtype):
    fp8 = FP8[kv_cache_dtype]
    key, value = (torch.randn(6, 2, 32).mul(50).to(dtype) for _ in range(2))
    key[0, 0, :4] = torch.tensor([torch.inf, -torch.inf, 1e4, -1e4])
    value[1, 1, 0] = torch.nan
    kc, vc = caches(3, 2, 32, 4, 16, fp8)
    if as_bytes:
        kc, vc = kc.view(torch.uint8), vc.view(torch.uint8)
    slots = torch.tensor([0, 5, 11, -1, 3, 7])
    k_scale, v_scale = torch.tensor(0.5), torch.tensor([3.0])
    _, args = path.run(
        lambda k, v, kc, vc, s, ks, vs: xla_ops.reshape_and_cache(
            k, v, kc, vc, s, kv_cache_dtype, ks, vs
        ),
        *(key, value, kc, vc, slots, k_scale, v_scale),
    )
    for got, rows, cache, scale in (
        (args[2], key, kc, k_scale),
        (args[3], value, vc, v_scale),
    ):
        wanted = expected(rows, cache, slots, scale, kv_cache_dtype)
        # NaN has several encodings; all of them are right.
        assert torch.equal(numbers(got, fp8), numbers(wanted, fp8))


def test_scales_may_be_left_out(path):
    key = torch.randn(2, 2, 16)
    kc, vc = (t.to(torch.float8_e4m3fn) for t in caches(3, 2, 16, 4, 8, torch.float32))
    slots = torch.tensor([3, 8])
    _, args = path.run(
        lambda k, kc, vc, s: xla_ops.reshape_and_cache(k, k, kc, vc, s, "fp8"),
        *(key, kc, vc, slots),
    )
    wanted = expected(key, kc, slots, 1.0, "fp8")
    assert torch.equal(args[1].view(torch.uint8), wanted.view(torch.uint8))


def test_extra_key_rows_are_ignored(path):
    key, value = torch.randn(9, 2, 8), torch.randn(9, 2, 8)
    kc, vc = caches(2, 2, 8, 4, 4, torch.float32)
    slots = torch.tensor([7, 0])
    _, args = path.run(xla_ops.reshape_and_cache, key, value, kc, vc, slots)
    assert torch.equal(args[2], expected(key, kc, slots))
    assert torch.equal(args[3], expected(value, vc, slots))


@pytest.mark.parametrize("slot", [-1, -(2**63), 8, 9, 2**31, 2**62, 2**63 - 1])
def test_slots_out_of_range_write_nothing(path, slot):
    key, value = torch.randn(2, 1, 8), torch.randn(2, 1, 8)
    kc, vc = caches(2, 1, 8, 4, 4, torch.float32)
    slots = torch.tensor([slot, 1])
    _, args = path.run(xla_ops.reshape_and_cache, key, value, kc, vc, slots)
    assert torch.equal(args[2], expected(key, kc, slots))
    assert torch.equal(args[3], expected(value, vc, slots))


@pytest.mark.parametrize("tokens, blocks", [(0, 3), (3, 0), (0, 0)])
def test_empty(path, tokens, blocks):
    key, value = torch.randn(tokens, 2, 8), torch.randn(tokens, 2, 8)
    kc, vc = caches(blocks, 2, 8, 4, 4, torch.float32)
    slots = torch.arange(tokens)
    _, args = path.run(xla_ops.reshape_and_cache, key, value, kc, vc, slots)
    assert torch.equal(args[2], kc)
    assert torch.equal(args[3], vc)


def split(key_cache, value_cache):
    """Caches [blocks=3, heads=2, dim=8, page=4] with x = 4, of dense blocks."""
    return key_cache.view(3, 2, 2, 4, 4), value_cache.view(3, 2, 8, 4)


# Of one buffer both caches, as vLLM splits it and otherwise.
VIEWS = {
    "vLLM's": ((2, 3, 64), lambda kv: split(*kv.unbind(0))),
    "values first": ((2, 3, 64), lambda kv: split(kv[1], kv[0])),
    "of more layers": ((5, 2, 3, 64), lambda kv: split(*kv[3].unbind(0))),
    "part of the blocks": ((2, 9, 64), lambda kv: split(*kv[:, 2:5].unbind(0))),
    "interleaved": (
        (3, 2, 2, 2, 4, 4),
        lambda kv: (kv[:, 0], kv[:, 1].flatten(1).unflatten(1, (2, 8, 4))),
    ),
    "every other block": (
        (2, 6, 64),
        lambda kv: (
            kv[0, ::2].unflatten(1, (2, 2, 4, 4)),
            kv[1, ::2].unflatten(1, (2, 8, 4)),
        ),
    ),
}


@pytest.mark.parametrize("view", VIEWS)
def test_writes_through_views(path, view):
    shape, take = VIEWS[view]
    kv = torch.randn(shape)
    key, value = torch.randn(4, 2, 8), torch.randn(4, 2, 8)
    slots = torch.tensor([2, 11, -1, 5])

    def write(kv, key, value, slots):
        key_cache, value_cache = take(kv)
        xla_ops.reshape_and_cache(key, value, key_cache, value_cache, slots)
        return key_cache + 0, value_cache + 0

    wanted = kv.clone()
    for rows, cache in zip((key, value), take(wanted), strict=True):
        cache.copy_(expected(rows, cache, slots))
    (got_k, got_v), args = path.run(write, kv, key, value, slots)
    assert torch.equal(args[0], wanted)
    assert torch.equal(got_k, take(wanted)[0])
    assert torch.equal(got_v, take(wanted)[1])


@pytest.mark.parametrize("name", ["lazy", "compiled"])
def test_a_view_without_dense_blocks(name):
    """On XLA it is written as a dense value."""
    key, value = torch.randn(4, 2, 8), torch.randn(4, 2, 8)
    keys, values = torch.randn(3, 4, 2, 2, 4), torch.randn(3, 4, 2, 8)
    slots = torch.tensor([2, 11, -1, 5])

    def take(keys, values):
        return keys.permute(0, 2, 3, 1, 4), values.permute(0, 2, 3, 1)

    def write(key, value, keys, values, slots):
        xla_ops.reshape_and_cache(key, value, *take(keys, values), slots)

    _, args = Path(name).run(write, key, value, keys, values, slots)
    got, wanted = take(*args[2:4]), take(keys, values)
    assert torch.equal(got[0], expected(key, wanted[0], slots))
    assert torch.equal(got[1], expected(value, wanted[1], slots))


@settings(max_examples=60)
@given(data=st.data())
def test_any_slots(data):
    draw = data.draw
    blocks, page = draw(st.integers(0, 4)), draw(st.integers(1, 5))
    heads, x = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    dim = x * draw(st.integers(1, 4))
    tokens = draw(st.integers(0, min(8, blocks * page + 7)))
    # Distinct slots: of several tokens with one slot any may win.
    slots = draw(
        st.lists(
            st.integers(-3, blocks * page + 3),
            min_size=tokens,
            max_size=tokens,
            unique=True,
        )
    )
    slots = torch.tensor(slots, dtype=torch.int64)
    draw(st.random_module())
    key, value = (torch.randn(tokens, heads, dim) for _ in range(2))
    kc, vc = caches(blocks, heads, dim, page, x, torch.float32)
    _, args = Path("cpu").run(xla_ops.reshape_and_cache, key, value, kc, vc, slots)
    assert torch.equal(args[2], expected(key, kc, slots))
    assert torch.equal(args[3], expected(value, vc, slots))


@pytest.mark.parametrize("name", ["lazy", "cpu"])
def test_debug_mode_reports_slots(name, capfd):
    key = torch.randn(2, 1, 8)
    kc, vc = caches(2, 1, 8, 4, 4, torch.float32)
    xla_ops.set_debug(True)
    try:
        Path(name).run(
            xla_ops.reshape_and_cache, key, key, kc, vc, torch.tensor([999, -1])
        )
    finally:
        xla_ops.set_debug(False)
    captured = capfd.readouterr()
    text = captured.err + captured.out
    report = "reshape_and_cache: slot_mapping[0] must be less than 8, got 999; skipped"
    assert report in text and "slot_mapping[1]" not in text


def arguments(**changes):
    given = {
        "key": torch.ones(3, 2, 8),
        "value": torch.ones(3, 2, 8),
        "key_cache": torch.ones(2, 2, 2, 5, 4),
        "value_cache": torch.ones(2, 2, 8, 5),
        "slot_mapping": torch.arange(3),
        "kv_cache_dtype": "auto",
        "k_scale": torch.ones(1),
        "v_scale": torch.ones(1),
    }
    return given | changes


ERRORS = [
    (
        {"key": torch.ones(3, 2, 8).int()},
        "key must be float32, float16 or bfloat16, got int32",
    ),
    (
        {"key": torch.ones(3, 16)},
        "key must have shape [num_tokens, num_kv_heads, head_dim], got [3, 16]",
    ),
    ({"value": torch.ones(3, 2, 9)}, "value must have shape [3, 2, 8], got [3, 2, 9]"),
    ({"value": torch.ones(3, 2, 8).half()}, "value must be float32, got float16"),
    (
        {"key_cache": torch.ones(2, 5, 2, 8)},
        "key_cache must have shape [num_blocks, num_kv_heads, head_dim / x, page_size,"
        " x], got [2, 5, 2, 8]",
    ),
    (
        {"key_cache": torch.ones(2, 2, 3, 5, 4)},
        "key_cache must have heads and head_dim [2, 8], got [2, 12]",
    ),
    (
        {"key_cache": torch.ones(2, 2, 2, 0, 4)},
        "page_size must be at least 1, got 0",
    ),
    (
        {"value_cache": torch.ones(2, 2, 8, 4)},
        "value_cache must have shape [2, 2, 8, 5], got [2, 2, 8, 4]",
    ),
    (
        {"value_cache": torch.ones(2, 2, 8, 5).half()},
        "value_cache must be float32, got float16",
    ),
    (
        {"kv_cache_dtype": "int8"},
        "kv_cache_dtype must be auto, fp8, fp8_e4m3 or fp8_e5m2, got int8",
    ),
    (
        {"kv_cache_dtype": "fp8"},
        "key_cache must be float8_e4m3fn or uint8, got float32",
    ),
    ({"slot_mapping": torch.arange(3).int()}, "slot_mapping must be int64, got int32"),
    (
        {"slot_mapping": torch.zeros(3, 1, dtype=torch.int64)},
        "slot_mapping must have shape [num_tokens], got [3, 1]",
    ),
    (
        {"slot_mapping": torch.arange(4)},
        "slot_mapping must have at most 3 elements, got 4",
    ),
    ({"k_scale": torch.ones(2)}, "k_scale must have 1 element, got shape [2]"),
    ({"v_scale": torch.ones(1).half()}, "v_scale must be float32, got float16"),
]


@pytest.mark.parametrize("changes, message", ERRORS, ids=[m for _, m in ERRORS])
def test_errors(path, changes, message):
    given = arguments(**changes)
    kv_cache_dtype = given.pop("kv_cache_dtype")

    def call(given):
        xla_ops.reshape_and_cache(**given, kv_cache_dtype=kv_cache_dtype)

    with pytest.raises(Exception) as error:
        path.run(call, given)
    assert "reshape_and_cache: " + message in str(error.value)


def test_cpu_caches_must_have_dense_blocks():
    given = arguments(value_cache=torch.ones(2, 2, 5, 8).transpose(2, 3))
    with pytest.raises(ValueError, match="value_cache must have dense blocks, got str"):
        xla_ops.reshape_and_cache(**given)
