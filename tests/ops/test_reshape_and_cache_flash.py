"""xla_ops.reshape_and_cache_flash: what is written, what is not, and errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import xla_ops
from support import Path

FP8 = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


def expected(rows, cache, slots, scale=None, kv_cache_dtype="auto"):
    """The op by a plain loop over tokens, in the order of the tokens."""
    cache = cache.clone()
    num_blocks, page_size = cache.shape[:2]
    if kv_cache_dtype != "auto":
        dtype = FP8[kv_cache_dtype]
        limit = torch.finfo(dtype).max
        rows = (rows.float() / scale).clamp(-limit, limit).to(dtype).view(cache.dtype)
    for t, slot in enumerate(slots.tolist()):
        if 0 <= slot < num_blocks * page_size:
            cache[slot // page_size, slot % page_size] = rows[t]
    return cache


def bits(t):
    return t.view(torch.uint8) if t.element_size() == 1 else t


def filled(shape, dtype):
    """A cache of distinct old values, so that a stray write shows."""
    return torch.randn(shape).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "tokens, heads, dim, blocks, page",
    [(1, 1, 8, 1, 1), (5, 3, 24, 7, 3), (17, 2, 64, 5, 16), (3, 1, 7, 4, 5)],
)
def test_auto(path, tokens, heads, dim, blocks, page, dtype):
    key, value = (torch.randn(tokens, heads, dim).to(dtype) for _ in range(2))
    kc, vc = (filled((blocks, page, heads, dim), dtype) for _ in range(2))
    slots = torch.randperm(blocks * page)[:tokens]
    slots[tokens // 2] = -1
    _, args = path.run(xla_ops.reshape_and_cache_flash, key, value, kc, vc, slots)
    assert torch.equal(args[2], expected(key, kc, slots))
    assert torch.equal(args[3], expected(value, vc, slots))


@pytest.mark.parametrize("kv_cache_dtype", ["fp8", "fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("as_bytes", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_fp8(path, kv_cache_dtype, as_bytes, dtype):
    key, value = (torch.randn(6, 2, 16).mul(50).to(dtype) for _ in range(2))
    key[0, 0, :4] = torch.tensor([torch.inf, -torch.inf, 1e4, -1e4])
    value[1, 1, 0] = torch.nan
    kc, vc = (filled((3, 4, 2, 16), FP8[kv_cache_dtype]) for _ in range(2))
    if as_bytes:
        kc, vc = kc.view(torch.uint8), vc.view(torch.uint8)
    slots = torch.tensor([0, 5, 11, -1, 3, 7])
    k_scale, v_scale = torch.tensor(0.5), torch.tensor([3.0])
    _, args = path.run(
        lambda k, v, kc, vc, s, ks, vs: xla_ops.reshape_and_cache_flash(
            k, v, kc, vc, s, kv_cache_dtype, ks, vs
        ),
        *(key, value, kc, vc, slots, k_scale, v_scale),
    )
    wanted_k = expected(key, kc, slots, k_scale, kv_cache_dtype)
    wanted_v = expected(value, vc, slots, v_scale, kv_cache_dtype)
    assert torch.equal(bits(args[2]), bits(wanted_k))
    # NaN has several encodings; all of them are right.
    dtype8 = FP8[kv_cache_dtype]
    got = args[3].view(dtype8).float()
    assert torch.equal(got.isnan(), wanted_v.view(dtype8).float().isnan())
    assert torch.equal(got.nan_to_num(), wanted_v.view(dtype8).float().nan_to_num())
    assert got[1, 1, 1, 0].isnan()


def test_extra_key_rows_are_ignored(path):
    key, value = torch.randn(9, 2, 8), torch.randn(9, 2, 8)
    kc, vc = filled((2, 4, 2, 8), torch.float32), filled((2, 4, 2, 8), torch.float32)
    slots = torch.tensor([7, 0])
    _, args = path.run(xla_ops.reshape_and_cache_flash, key, value, kc, vc, slots)
    assert torch.equal(args[2], expected(key, kc, slots))
    assert torch.equal(args[3], expected(value, vc, slots))


@pytest.mark.parametrize("slot", [-1, -(2**63), 8, 9, 2**31, 2**62, 2**63 - 1])
def test_slots_out_of_range_write_nothing(path, slot):
    key, value = torch.randn(2, 1, 8), torch.randn(2, 1, 8)
    kc, vc = filled((2, 4, 1, 8), torch.float32), filled((2, 4, 1, 8), torch.float32)
    slots = torch.tensor([slot, 1])
    _, args = path.run(xla_ops.reshape_and_cache_flash, key, value, kc, vc, slots)
    assert torch.equal(args[2], expected(key, kc, slots))
    assert torch.equal(args[3], expected(value, vc, slots))


@pytest.mark.parametrize("tokens, blocks", [(0, 3), (3, 0), (0, 0)])
def test_empty(path, tokens, blocks):
    key, value = torch.randn(tokens, 2, 8), torch.randn(tokens, 2, 8)
    kc, vc = torch.randn(blocks, 4, 2, 8), torch.randn(blocks, 4, 2, 8)
    slots = torch.arange(tokens)
    _, args = path.run(xla_ops.reshape_and_cache_flash, key, value, kc, vc, slots)
    assert torch.equal(args[2], kc)
    assert torch.equal(args[3], vc)


# Each view gives K and V caches [blocks=3, page=4, heads=2, dim=8] of one buffer.
VIEWS = {
    "stacked": ((2, 3, 4, 2, 8), lambda kv: kv.unbind(0)),
    "indexed": ((2, 3, 4, 2, 8), lambda kv: (kv[0], kv[1])),
    "values first": ((2, 3, 4, 2, 8), lambda kv: (kv[1], kv[0])),
    "interleaved": ((3, 2, 4, 2, 8), lambda kv: kv.unbind(1)),
    "HND": ((2, 3, 2, 4, 8), lambda kv: kv.transpose(2, 3).unbind(0)),
    "flat": ((2, 12, 16), lambda kv: kv.view(2, 3, 4, 2, 8).unbind(0)),
    "of more layers": ((5, 2, 3, 4, 2, 8), lambda kv: kv[3].unbind(0)),
    "part of the blocks": ((2, 9, 4, 2, 8), lambda kv: kv[:, 2:5].unbind(0)),
    "padded heads": ((2, 3, 4, 2, 12), lambda kv: kv[..., :8].unbind(0)),
    "every other block": ((2, 6, 4, 2, 8), lambda kv: kv[:, ::2].unbind(0)),
}


@pytest.mark.parametrize("view", VIEWS)
def test_writes_through_views(path, view):
    shape, take = VIEWS[view]
    kv = torch.randn(shape)
    key, value = torch.randn(4, 2, 8), torch.randn(4, 2, 8)
    slots = torch.tensor([2, 11, -1, 5])

    def write(kv, key, value, slots):
        key_cache, value_cache = take(kv)
        xla_ops.reshape_and_cache_flash(key, value, key_cache, value_cache, slots)
        return key_cache + 0, value_cache + 0

    wanted = kv.clone()
    for rows, cache in zip((key, value), take(wanted), strict=True):
        cache.copy_(expected(rows, cache, slots))
    (got_k, got_v), args = path.run(write, kv, key, value, slots)
    assert torch.equal(args[0], wanted)
    assert torch.equal(got_k, take(wanted)[0])
    assert torch.equal(got_v, take(wanted)[1])


def test_the_stride_of_a_single_head_does_not_count(path):
    """NHD keys and HND values of one head lie alike, whatever their strides say."""
    kc, vc = torch.randn(3, 4, 1, 8), torch.randn(3, 1, 4, 8)
    key, value = torch.randn(3, 1, 8), torch.randn(3, 1, 8)
    slots = torch.tensor([2, 11, 5])

    def write(key, value, kc, vc, slots):
        xla_ops.reshape_and_cache_flash(key, value, kc, vc.transpose(1, 2), slots)

    _, args = path.run(write, key, value, kc, vc, slots)
    assert torch.equal(args[2], expected(key, kc, slots))
    wanted = expected(value, vc.transpose(1, 2), slots)
    assert torch.equal(args[3].transpose(1, 2), wanted)


@settings(max_examples=60)
@given(data=st.data())
def test_any_slots(data):
    draw = data.draw
    blocks, page = draw(st.integers(0, 4)), draw(st.integers(1, 5))
    heads, dim = draw(st.integers(1, 3)), draw(st.integers(1, 20))
    tokens = draw(st.integers(0, min(8, blocks * page + 7)))
    extra = draw(st.integers(0, 2))
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
    key, value = (torch.randn(tokens + extra, heads, dim) for _ in range(2))
    kc, vc = (torch.randn(blocks, page, heads, dim) for _ in range(2))
    _, args = Path("cpu").run(
        xla_ops.reshape_and_cache_flash, key, value, kc, vc, slots
    )
    assert torch.equal(args[2], expected(key, kc, slots))
    assert torch.equal(args[3], expected(value, vc, slots))


@pytest.mark.parametrize("name", ["lazy", "cpu"])
def test_debug_mode_reports_slots(name, debug_mode, capfd):
    key = torch.randn(2, 1, 8)
    kc, vc = torch.zeros(2, 4, 1, 8), torch.zeros(2, 4, 1, 8)
    slots = torch.tensor([999, -1])
    Path(name).run(xla_ops.reshape_and_cache_flash, key, key, kc, vc, slots)
    captured = capfd.readouterr()
    assert (
        "reshape_and_cache_flash: slot_mapping[0] must be less than 8, got 999; skipped"
        in captured.err + captured.out
    )
    assert "slot_mapping[1]" not in captured.err + captured.out


def arguments(**changes):
    given = {
        "key": torch.ones(3, 2, 8),
        "value": torch.ones(3, 2, 8),
        "key_cache": torch.ones(2, 4, 2, 8),
        "value_cache": torch.ones(2, 4, 2, 8),
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
        {"key_cache": torch.ones(2, 4, 16)},
        "key_cache must have shape [num_blocks, page_size, num_kv_heads, head_dim],"
        " got [2, 4, 16]",
    ),
    (
        {"value_cache": torch.ones(2, 5, 2, 8)},
        "value_cache must have shape [2, 4, 2, 8], got [2, 5, 2, 8]",
    ),
    (
        {"value_cache": torch.ones(2, 4, 2, 8).half()},
        "value_cache must be float32, got float16",
    ),
    (
        {"key_cache": torch.ones(2, 4, 1, 8), "value_cache": torch.ones(2, 4, 1, 8)},
        "key_cache must have heads and head_dim [2, 8], got [1, 8]",
    ),
    (
        {"key_cache": torch.ones(2, 0, 2, 8), "value_cache": torch.ones(2, 0, 2, 8)},
        "page_size must be at least 1, got 0",
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
        xla_ops.reshape_and_cache_flash(**given, kv_cache_dtype=kv_cache_dtype)

    with pytest.raises(Exception) as error:
        path.run(call, given)
    assert "reshape_and_cache_flash: " + message in str(error.value)


def test_cpu_caches_must_be_dense_and_alike():
    given = arguments(key_cache=torch.ones(2, 4, 2, 16)[..., ::2])
    with pytest.raises(ValueError, match="key_cache must be dense in its last dim"):
        xla_ops.reshape_and_cache_flash(**given)
    given = arguments(value_cache=torch.ones(2, 2, 4, 8).transpose(1, 2))
    with pytest.raises(ValueError, match="value_cache must have key_cache's strides"):
        xla_ops.reshape_and_cache_flash(**given)
