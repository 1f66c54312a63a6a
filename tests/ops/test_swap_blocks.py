"""xla_ops.swap_blocks: what is copied, layouts, two devices, errors."""

import pytest
import torch
import torch_xla
from hypothesis import given, settings
from hypothesis import strategies as st

import xla_ops
from support import Path, addresses, copies_of, programs_with

DTYPES = [
    *(torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
]
MAPPING = torch.tensor([[0, 2], [4, 0], [-1, 1], [3, -1], [3, 3]])


def expected(src, dst, mapping):
    """The definition: pair after pair."""
    dst = dst.clone()
    for source, target in mapping.tolist():
        if 0 <= source < len(src) and 0 <= target < len(dst):
            dst[target] = src[source]
    return dst


def cache(*shape, dtype=torch.float32):
    """Of numbers that every dtype holds."""
    return torch.randint(0, 16, shape).float().to(dtype)


def bits(t):
    return t.view(torch.uint8) if t.element_size() == 1 else t


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (4, 2, 16), (3, 5, 7, 2)])
def test_copies(path, shape, dtype):
    src, dst = cache(6, *shape, dtype=dtype), cache(4, *shape, dtype=dtype)
    _, (src_after, got, _) = path.run(xla_ops.swap_blocks, src, dst, MAPPING)
    wanted = expected(bits(src), bits(dst), MAPPING)
    assert torch.equal(bits(got), wanted)
    assert torch.equal(bits(src_after), bits(src))


@pytest.mark.parametrize(
    "pairs",
    [
        [[0, 1], [2, 1], [5, 1]],  # the last one counts
        [[6, 0], [0, 4], [2**40, 1], [1, 2**62], [-5, 0]],  # out of range
        [[i * 7 % 6, i * 5 % 4] for i in range(600)],
    ],
)
def test_pairs(path, pairs):
    src, dst, mapping = cache(6, 5), cache(4, 5), torch.tensor(pairs)
    _, (_, got, _) = path.run(xla_ops.swap_blocks, src, dst, mapping)
    assert torch.equal(got, expected(src, dst, mapping))


@pytest.mark.parametrize("src, dst, pairs", [(0, 3, 2), (3, 0, 2), (3, 3, 0)])
def test_nothing_to_do(path, src, dst, pairs):
    src, dst = cache(src, 5), cache(dst, 5)
    mapping = torch.zeros(pairs, 2, dtype=torch.int64)
    _, (_, got, _) = path.run(xla_ops.swap_blocks, src, dst, mapping)
    assert torch.equal(got, dst)


@pytest.mark.parametrize("name", ["lazy", "compiled"])
def test_mapping_on_the_cpu(name):
    """As vLLM gives it; its numbers are no constants of a program."""
    path = Path(name)
    src, dst = path.put((cache(6, 5), cache(4, 5)))
    swap = path.function(lambda s, d, m: xla_ops.swap_blocks(s, d, m))
    wanted = dst.cpu()
    for mapping in (MAPPING, MAPPING.flip(0), torch.tensor([[5, 1]] * 5)):
        swap(src, dst, mapping)
        wanted = expected(src.cpu(), wanted, mapping)
        assert torch.equal(dst.cpu(), wanted)


# Each gives src [6, 4, 2, 8] and dst [4, 4, 2, 8] of two buffers.
VIEWS = {
    "keys of stacked caches": (
        *((2, 6, 4, 2, 8), (2, 4, 4, 2, 8)),
        lambda a, b: (a[0], b[0]),
    ),
    "interleaved": (
        *((6, 2, 4, 2, 8), (4, 2, 4, 2, 8)),
        lambda a, b: (a[:, 1], b[:, 0]),
    ),
    "HND to NHD": (
        *((6, 2, 4, 8), (4, 4, 2, 8)),
        lambda a, b: (a.transpose(1, 2), b),
    ),
    "last dimension exchanged": (
        *((6, 4, 8, 2), (4, 4, 2, 8)),
        lambda a, b: (a.transpose(2, 3), b),
    ),
    "every other block": (
        *((12, 4, 2, 8), (9, 4, 2, 8)),
        lambda a, b: (a[::2], b[1::2]),
    ),
    "all dimensions apart": (
        *((6, 9, 5, 17), (4, 9, 5, 17)),
        lambda a, b: (a[:, ::2, ::2, ::2][:, :4, :2, :8], b[:, 1::2, 1::2, 1::2]),
    ),
    "one block for all": (
        *((1, 4, 2, 8), (4, 4, 2, 8)),
        lambda a, b: (a.expand(6, 4, 2, 8), b),
    ),
}


@pytest.mark.parametrize("view", VIEWS)
def test_layouts(path, view):
    src_shape, dst_shape, take = VIEWS[view]
    a, b = cache(*src_shape), cache(*dst_shape)

    def call(a, b, mapping):
        xla_ops.swap_blocks(*take(a, b), mapping)
        return b + 1

    wanted = b.clone()
    take(a, wanted)[1].copy_(expected(*take(a, b), MAPPING))
    plus_one, (a_after, b_after, _) = path.run(call, a, b, MAPPING)
    assert torch.equal(b_after, wanted)
    assert torch.equal(plus_one, wanted + 1)
    assert torch.equal(a_after, a)


@pytest.mark.parametrize(
    "take",
    [
        lambda t: (t, t),  # block after block, as copy_blocks
        lambda t: (t[:], t[:]),
        lambda t: (t[:, ::2, ::2, ::2, ::2],) * 2,  # too many gaps for one kernel
    ],
)
def test_one_cache(path, take):
    base, mapping = cache(6, 4, 4, 4, 4), torch.tensor([[0, 1], [1, 2], [2, 0], [3, 3]])
    wanted = base.clone()
    part, _ = take(wanted)
    for source, target in mapping.tolist():
        part[target] = part[source].clone()
    _, (got, _) = path.run(
        lambda base, m: xla_ops.swap_blocks(*take(base), m), base, mapping
    )
    assert torch.equal(got, wanted)


@pytest.mark.parametrize(
    "take",
    [
        lambda t: (t[:4], t[4:]),  # apart
        lambda t: (t[:6], t[2:]),  # src as it was
        lambda t: (t[::2], t[1::2]),
    ],
)
def test_views_of_one_tensor(path, take):
    base = cache(8, 5)
    mapping = torch.tensor([[0, 1], [1, 2], [2, 0], [3, 3]])
    wanted = base.clone()
    take(wanted)[1].copy_(expected(*take(base), mapping))
    _, (got, _) = path.run(
        lambda base, m: xla_ops.swap_blocks(*take(base), m), base, mapping
    )
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("name", ["lazy", "compiled"])
def test_no_cache_is_copied(name, hlo_dump):
    path = Path(name)
    src, dst = path.put((cache(61, 3, 37), cache(53, 3, 37)))
    before = addresses([src, dst])
    swap = path.function(lambda s, d, m: xla_ops.swap_blocks(s, d, m))
    swap(src, dst, MAPPING.to(path.device))
    path.wait()
    assert addresses([src, dst]) == before
    for program in programs_with((53, 3, 37), hlo_dump):
        assert not copies_of((53, 3, 37), program)
        assert not copies_of((61, 3, 37), program)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8, torch.float8_e4m3fn])
@pytest.mark.parametrize("mapping_on_device", [False, True])
def test_between_devices(dtype, mapping_on_device):
    device = torch_xla.device()
    pairs = torch.tensor([[0, 1], [5, 1], [4, 0], [-1, 2], [6, 3], [2, 9], [2, 3]])
    mapping = pairs.to(device) if mapping_on_device else pairs
    for to_device in (True, False):
        src, dst = cache(6, 3, 8, dtype=dtype), cache(4, 3, 8, dtype=dtype)
        wanted = expected(bits(src), bits(dst), pairs)
        there, here = (dst.to(device), src) if to_device else (src.to(device), dst)
        args = (here, there) if to_device else (there, here)
        result = xla_ops.swap_blocks(*args, mapping)
        assert result is None
        assert torch.equal(bits(args[1].cpu()), wanted)
        assert torch.equal(bits(args[0].cpu()), bits(src))


def test_between_devices_through_views():
    """Blocks leave a stacked cache for the CPU's pool and come back elsewhere."""
    kv, pool = cache(2, 6, 4, 8), torch.zeros(2, 3, 4, 8)
    device_kv = kv.to(torch_xla.device())
    for k, p in zip(device_kv.unbind(0), pool.unbind(0), strict=True):
        xla_ops.swap_blocks(k, p, torch.tensor([[5, 0], [1, 2]]))
    assert torch.equal(pool[:, 0], kv[:, 5]) and torch.equal(pool[:, 2], kv[:, 1])
    for k, p in zip(device_kv.unbind(0), pool.unbind(0), strict=True):
        xla_ops.swap_blocks(p, k, torch.tensor([[0, 2]]))
    wanted = kv.clone()
    wanted[:, 2] = kv[:, 5]
    assert torch.equal(device_kv.cpu(), wanted)


def test_between_devices_not_in_a_compiled_function():
    src, dst = cache(6, 5), cache(4, 5).to(torch_xla.device())
    swap = Path("compiled").function(lambda s, d, m: xla_ops.swap_blocks(s, d, m))
    with pytest.raises(Exception, match="device xla:0 in a compiled function, got cpu"):
        swap(src, dst, MAPPING)


@settings(max_examples=60)
@given(data=st.data())
def test_any_mapping(data):
    draw = data.draw
    src_blocks, dst_blocks = draw(st.integers(0, 5)), draw(st.integers(0, 5))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    ids = st.integers(-2, 7)
    pairs = draw(st.lists(st.tuples(ids, ids), max_size=8))
    draw(st.random_module())
    src, dst = cache(src_blocks, *shape), cache(dst_blocks, *shape)
    mapping = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
    _, (_, got, _) = Path("cpu").run(xla_ops.swap_blocks, src, dst, mapping)
    assert torch.equal(got, expected(src, dst, mapping))


@pytest.mark.parametrize("name", ["lazy", "cpu", "between"])
def test_debug_mode_reports_pairs(name, capfd):
    src, dst = cache(6, 5), cache(4, 5)
    mapping = torch.tensor([[0, 1], [-1, 9], [6, 1], [1, 4]])
    xla_ops.set_debug(True)
    try:
        if name == "between":
            xla_ops.swap_blocks(src, dst.to(torch_xla.device()), mapping)
        else:
            Path(name).run(xla_ops.swap_blocks, src, dst, mapping)
    finally:
        xla_ops.set_debug(False)
    captured = capfd.readouterr()
    text = captured.err + captured.out
    start = "xla_ops: swap_blocks: block_mapping"
    assert f"{start}[2] must be less than [6, 4], got [6, 1]; skipped" in text
    assert f"{start}[3] must be less than [6, 4], got [1, 4]; skipped" in text
    assert f"{start}[0]" not in text and f"{start}[1]" not in text


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"dst": torch.ones(4, 5).double()},
            "dst must be float32, float16, bfloat16, float8_e4m3fn, float8_e5m2, int8"
            " or uint8, got float64",
        ),
        ({"src": torch.ones(6, 5).half()}, "src must be float32, got float16"),
        ({"dst": torch.ones(())}, "dst must have rank 1 or more, got shape []"),
        (
            {"src": torch.ones(6, 4)},
            "src must have shape [num_blocks, 5], got [6, 4]",
        ),
        (
            {"block_mapping": MAPPING.int()},
            "block_mapping must be int64, got int32",
        ),
        (
            {"block_mapping": torch.zeros(4, dtype=torch.int64)},
            "block_mapping must have shape [num_pairs, 2], got [4]",
        ),
    ],
)
def test_errors(path, changes, message):
    given = {"src": torch.ones(6, 5), "dst": torch.ones(4, 5), "block_mapping": MAPPING}
    with pytest.raises(Exception) as error:
        path.run(lambda g: xla_ops.swap_blocks(**g), given | changes)
    assert "swap_blocks: " + message in str(error.value)


@pytest.mark.parametrize("name", ["compiled", "dispatched"])
def test_two_views_made_outside_are_refused(name):
    """AOTAutograd would fail on an assertion of its own."""
    path = Path(name)
    both, mapping = path.put([cache(2, 6, 4, 8), torch.tensor([[0, 1]])])
    src, dst = both[:, :, :2].detach().unbind(0)
    with pytest.raises(
        Exception, match="swap_blocks: src must not be a view, made out"
    ):
        path.function(xla_ops.swap_blocks)(src, dst, mapping)
