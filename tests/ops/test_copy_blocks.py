"""xla_ops.copy_blocks: what is copied and what is not, views, in place, errors."""

import pytest
import torch
import torch_xla
from hypothesis import given, settings
from hypothesis import strategies as st

import xla_ops
from support import Path, addresses, copies_of, programs_with

DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int8,
    torch.uint8,
]


def bits(t):
    return t.view(torch.uint8) if t.element_size() == 1 else t


def expected(cache, pairs):
    """The op by a plain loop over pairs, in their order."""
    cache = bits(cache.clone())
    for source, target in pairs.tolist():
        if 0 <= source < len(cache) and 0 <= target < len(cache):
            cache[target] = cache[source].clone()
    return cache


def make(shape, dtype=torch.float32):
    """A cache of distinct values, so that a stray write shows."""
    if dtype in (torch.int8, torch.uint8):
        return torch.randint(0, 100, shape).to(dtype)
    return torch.randn(shape).to(dtype)


def run(path, keys, values, pairs):
    """Returns the key and value caches after the op."""
    _, (keys, values, _) = path.run(xla_ops.copy_blocks, keys, values, pairs)
    return keys, values


PAIRS = torch.tensor([[1, 4], [0, 3], [6, 2]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [(1,), (3, 5), (16, 2, 64), (2, 3, 7, 4), ()])
def test_copies(path, block, dtype):
    keys = [make((7, *block), dtype) for _ in range(2)]
    values = [make((7, *block), dtype) for _ in range(2)]
    got_keys, got_values = run(path, keys, values, PAIRS)
    for got, cache in zip(got_keys + got_values, keys + values, strict=True):
        assert torch.equal(bits(got), expected(cache, PAIRS))


def test_caches_need_not_be_alike(path):
    """vLLM's old layout: keys [blocks, heads, dim / x, page, x], values apart."""
    keys, values = [make((7, 2, 4, 3, 8))], [make((8, 2, 32, 3), torch.float16)]
    got_keys, got_values = run(path, keys, values, PAIRS)
    assert torch.equal(got_keys[0], expected(keys[0], PAIRS))
    assert torch.equal(got_values[0], expected(values[0], PAIRS))


# Blocks that occur in several pairs.
CHAINS = {
    "chain": [[0, 1], [1, 2], [2, 3]],
    "backwards": [[2, 3], [1, 2], [0, 1]],
    "cycle": [[0, 1], [1, 0]],
    "overwritten source": [[0, 1], [5, 0]],
    "same target": [[0, 4], [1, 4], [2, 4]],
    "fan out": [[3, 0], [3, 1], [3, 2]],
    "to itself": [[2, 2], [2, 3], [3, 3]],
    "twice": [[0, 1], [0, 1]],
    "two chains and a pair": [[0, 1], [5, 6], [3, 4], [1, 2], [4, 3]],
    "with a gap of padding": [[0, 1], [-1, 2], [1, 9], [1, 2]],
}


@pytest.mark.parametrize("chain", CHAINS)
def test_pairs_count_in_order(path, chain):
    pairs = torch.tensor(CHAINS[chain])
    cache = make((7, 4, 3))
    (got,), _ = run(path, [cache], [cache], pairs)
    assert torch.equal(got, expected(cache, pairs))


@pytest.mark.parametrize("number", [-1, 7, 8, 2**31, 2**62, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("column", [0, 1])
def test_pairs_out_of_range_are_skipped(path, column, number):
    pairs = torch.tensor([[1, 2], [3, 4], [5, 6]])
    pairs[1, column] = number
    cache = make((7, 4))
    (got,), (value,) = run(path, [cache], [cache + 1], pairs)
    assert torch.equal(got, expected(cache, pairs))
    assert torch.equal(value, expected(cache + 1, pairs))


def test_debug_reports_skipped_pairs(debug_mode, capfd):
    pairs = torch.tensor([[0, 1], [-1, 9], [1, 7]])
    xla_ops.copy_blocks([make((7, 4))], [make((9, 4))], pairs)
    assert capfd.readouterr().err == (
        "xla_ops: copy_blocks: block_mapping[2] must be less than [7, 7], got [1, 7]; "
        "skipped\n"
    )


@pytest.mark.parametrize(
    "shape, pairs",
    [((7, 4), torch.empty(0, 2, dtype=torch.int64)), ((0, 4), PAIRS), ((7, 0), PAIRS)],
)
def test_nothing_to_do(path, shape, pairs):
    cache = make(shape)
    (got,), _ = run(path, [cache], [cache], pairs)
    assert torch.equal(got, cache)


def test_no_layers(path):
    assert run(path, [], [], PAIRS) == ([], [])


def test_extreme_values_keep_their_bits(path):
    cache = make((7, 8))
    cache[1] = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 1e-45, 0, 1, -1])
    (got,), _ = run(path, [cache], [cache], PAIRS)
    assert torch.equal(got[4].view(torch.int32), cache[1].view(torch.int32))


# Each view gives K and V caches of 7 blocks inside one buffer.
VIEWS = {
    "stacked": ((2, 7, 4, 2, 8), lambda kv: kv.unbind(0)),
    "interleaved": ((7, 2, 4, 2, 8), lambda kv: kv.unbind(1)),
    "HND": ((2, 7, 2, 4, 8), lambda kv: kv.transpose(2, 3).unbind(0)),
    "of more layers": ((5, 2, 7, 4, 2, 8), lambda kv: kv[3].unbind(0)),
    "part of the blocks": ((2, 9, 4, 2, 8), lambda kv: kv[:, 1:8].unbind(0)),
    "padded heads": ((2, 7, 4, 2, 12), lambda kv: kv[..., :8].unbind(0)),
    "every other block": ((2, 14, 4, 2, 8), lambda kv: kv[:, ::2].unbind(0)),
    "dim first": ((2, 7, 8, 4, 2), lambda kv: kv.permute(0, 1, 3, 4, 2).unbind(0)),
}


@pytest.mark.parametrize("view", VIEWS)
def test_views(path, view):
    shape, take = VIEWS[view]
    kv = make(shape)

    def call(kv, pairs):
        k, v = take(kv)
        xla_ops.copy_blocks([k], [v], pairs)
        return k + 0, v + 0

    wanted = kv.clone()
    for cache in take(wanted):
        cache.copy_(expected(cache, PAIRS))
    (k, v), (after, _) = path.run(call, kv, PAIRS)
    assert torch.equal(after, wanted)
    assert torch.equal(k, take(wanted)[0]) and torch.equal(v, take(wanted)[1])


@settings(max_examples=60)
@given(data=st.data())
def test_any_pairs(data):
    blocks = data.draw(st.integers(1, 6))
    number = st.integers(-1, blocks)
    pairs = data.draw(st.lists(st.tuples(number, number), max_size=12))
    pairs = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
    cache = make((blocks, data.draw(st.integers(1, 5000))))
    keys, values = run(Path("cpu"), [cache], [cache * 2], pairs)
    assert torch.equal(keys[0], expected(cache, pairs))
    assert torch.equal(values[0], expected(cache * 2, pairs))


@settings(max_examples=60)
@given(data=st.data())
def test_reference_counts_in_order(data):
    """The plain torch reference, which serves where there is no handler."""
    op = xla_ops.core.op.OPS["copy_blocks_one"]
    number = st.integers(-2, 6)
    pairs = data.draw(st.lists(st.tuples(number, number), max_size=8))
    pairs = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
    buffer = make((80,))
    geometry = [5, 1, 2, 3, 14, 0, 5, 4]
    cache = buffer.as_strided((5, 2, 3), (14, 5, 1), 4)
    wanted = buffer.clone()
    wanted.as_strided((5, 2, 3), (14, 5, 1), 4).copy_(expected(cache, pairs))
    assert torch.equal(op.reference(buffer, pairs, geometry, False), wanted)
    assert torch.equal(op(buffer, pairs, geometry, False, None), wanted)


def test_reference_does_not_grow_with_the_pairs():
    op = xla_ops.core.op.OPS["copy_blocks_one"]
    cache = make((500, 8))
    geometry = [500, 1, 1, 8, 8, 0, 0, 0]
    sizes = []
    for count in (130, 250):
        pairs = torch.randint(-2, 502, (count, 2))
        got = op.reference(cache.to("xla"), pairs.to("xla"), geometry, False)
        hlo = torch_xla._XLAC._get_xla_tensors_hlo([got])
        sizes.append(hlo.count(" = "))
        assert torch.equal(got.cpu(), expected(cache, pairs))
    assert sizes[0] == sizes[1] < 400


LAYERS, BLOCKS, BLOCK = 8, 1049, (16, 2, 8)  # sizes that no other test has


@pytest.mark.parametrize("name", ["lazy", "compiled"])
@pytest.mark.parametrize("form", ["separate", "values first", "stacked"])
def test_in_place(name, form, hlo_dump):
    """8 layers in one call keep their buffers, and no program copies one."""
    blocks = BLOCKS + ["separate", "values first", "stacked"].index(form)
    shape = (2, blocks, *BLOCK) if form == "stacked" else (blocks, *BLOCK)
    count = LAYERS if form == "stacked" else 2 * LAYERS
    flat = [make(shape).to(torch_xla.device()) for _ in range(count)]
    before = [t.cpu() for t in flat]

    def call(caches, pairs):
        if form == "stacked":
            keys, values = zip(*(kv.unbind(0) for kv in caches), strict=True)
        else:
            keys, values = caches[:LAYERS], caches[LAYERS:]
        if form == "values first":
            keys, values = values, keys
        xla_ops.copy_blocks(keys, values, pairs)

    f = Path(name).function(call)
    pairs = PAIRS.to(torch_xla.device())
    places = addresses(flat)
    for _ in range(3):
        f(flat, pairs)
        assert addresses(flat) == places
    for cache, old in zip(flat, before, strict=True):
        for part, was in zip(
            *(  # K and V of a stacked cache, one by one
                t if form == "stacked" else [t] for t in (cache.cpu(), old)
            ),
            strict=True,
        ):
            assert torch.equal(part, expected(was, PAIRS))
    programs = programs_with(shape, hlo_dump)
    assert any('target="xla_ops.copy_blocks"' in program for program in programs)
    for program in programs:
        if 'target="xla_ops.copy_blocks"' in program:
            assert copies_of(shape, program) == []


def test_cpu_views_are_written_directly():
    cache = make((7, 6))[:, ::2]
    wanted = expected(cache, PAIRS)
    xla_ops.copy_blocks([cache], [make((7, 1))], PAIRS)
    assert torch.equal(cache, wanted)


def test_too_many_gaps():
    cache = make((7, 4, 4, 4, 4))[:, ::2, ::2, ::2, ::2]
    message = "key_caches.0. must be free of overlaps and, in a block, of more than two"
    with pytest.raises(ValueError, match=message):
        xla_ops.copy_blocks([cache], [cache.clone()], PAIRS)
    first = make((7, 4))
    wanted = first.clone()
    with pytest.raises(ValueError, match=message.replace("key", "value")):
        xla_ops.copy_blocks([first], [cache], PAIRS)
    assert torch.equal(first, wanted)  # all are checked before one is written


def test_expanded_cache():
    message = (
        r"key_caches\[0\] must be dense in its last dimension and free of overlaps,"
        r" got strides \[0, 1\]"
    )
    with pytest.raises(ValueError, match=message):
        xla_ops.copy_blocks([make((1, 4)).expand(7, 4)], [make((7, 4))], PAIRS)


@pytest.mark.parametrize(
    "keys, values, pairs, message",
    [
        (
            [make((7, 4))],
            [],
            PAIRS,
            "value_caches must have key_caches' length 1, got 0",
        ),
        (
            [make((7, 4))],
            [make((7, 4))],
            PAIRS.int(),
            "block_mapping must be int64, got int32",
        ),
        (
            [make((7, 4))],
            [make((7, 4))],
            PAIRS.t(),
            "block_mapping must have shape [num_pairs, 2], got [2, 3]",
        ),
        (
            [make((7, 4))],
            [make((7, 4)).long()],
            PAIRS,
            "value_caches[0] must be float32, float16, bfloat16, float8_e4m3fn, "
            "float8_e5m2, int8 or uint8, got int64",
        ),
        (
            [make(())],
            [make((7, 4))],
            PAIRS,
            "key_caches[0] must have rank 1 or more, got shape []",
        ),
    ],
)
def test_errors(path, keys, values, pairs, message):
    with pytest.raises(Exception) as error:
        path.run(xla_ops.copy_blocks, keys, values, pairs)
    assert f"copy_blocks: {message}" in str(error.value)


def test_wrong_type():
    with pytest.raises(TypeError, match="key_caches.1. must be a tensor, got NoneType"):
        xla_ops.copy_blocks([make((7, 4)), None], [make((7, 4))] * 2, PAIRS)
