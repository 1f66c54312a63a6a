"""KV caches whose heads are split stay where they are, and stay split."""

import pytest
import torch
import torch_xla
from torch.utils import _pytree as pytree

import xla_ops
from shard_addresses import shard_addresses
from sharded import compiled, put, run, spec_of, tiles_of

WAYS = ("lazy", "openxla", "xla_ops", "replay")
HEADS, KV_HEADS, HEAD_DIM, NUM_BLOCKS, PAGE, CONTEXT = 8, 4, 16, 32, 8, 20
NUM_SEQS = 3


def make(dtype=torch.float32):
    """New rows, and where they go: the last token of each sequence."""
    table = torch.randperm(NUM_BLOCKS)[: NUM_SEQS * 3].view(NUM_SEQS, 3).int()
    last = CONTEXT - 1
    slots = table[:, last // PAGE].long() * PAGE + last % PAGE
    return {
        "q": torch.randn(NUM_SEQS, HEADS, HEAD_DIM, dtype=dtype),
        "k": torch.randn(NUM_SEQS, KV_HEADS, HEAD_DIM, dtype=dtype),
        "v": torch.randn(NUM_SEQS, KV_HEADS, HEAD_DIM, dtype=dtype),
        "slots": slots,
        "table": table,
        "lens": torch.full((NUM_SEQS,), CONTEXT, dtype=torch.int32),
        "starts": torch.arange(NUM_SEQS + 1, dtype=torch.int32),
        "num_seqs": torch.tensor([NUM_SEQS], dtype=torch.int32),
    }


def step(caches, rows, scale=HEAD_DIM**-0.5):
    """Writes rows to every cache and attends to it."""
    outs = []
    for cache in caches:
        pair = cache.unbind(0) if isinstance(cache, torch.Tensor) else cache
        xla_ops.reshape_and_cache_flash(rows["k"], rows["v"], *pair, rows["slots"])
        outs.append(
            xla_ops.paged_attention(
                rows["q"],
                cache,
                rows["lens"],
                rows["table"],
                rows["starts"],
                rows["num_seqs"],
                scale,
            )
        )
    return outs


def flat(caches):
    return [t for c in caches for t in ([c] if isinstance(c, torch.Tensor) else c)]


def put_heads(t, mesh):
    """A cache on the device, [..., heads, head_dim], its heads split."""
    return put(t, mesh, (*[None] * (t.dim() - 2), "tp", None))


def stacked():
    return torch.randn(2, NUM_BLOCKS, PAGE, KV_HEADS, HEAD_DIM)


def separate():
    return [torch.randn(NUM_BLOCKS, PAGE, KV_HEADS, HEAD_DIM) for _ in range(2)]


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("make_cache", [stacked, separate])
def test_eight_layers_in_place(how, make_cache, mesh, hlo_dump):
    """Values, addresses on each device, shardings, and nothing between devices."""
    caches, rows = [make_cache() for _ in range(8)], make()
    own = pytree.tree_map(torch.clone, caches)
    # A program of its own: torch_xla would take another test's from its cache.
    scale = 1 / (WAYS.index(how) + 2)
    expected = step(own, rows, scale)
    on_xla = pytree.tree_map(lambda t: put_heads(t, mesh), caches)
    moved = {name: put(t) for name, t in rows.items()}
    before = shard_addresses(flat(on_xla))
    shardings = [spec_of(t) for t in flat(on_xla)]
    function = run(how, step)
    with compiled(hlo_dump) as programs:
        outs = function(on_xla, moved, scale)
    for _ in range(3):
        function(on_xla, moved, scale)
        torch_xla.sync(wait=True)
    if how != "openxla":  # torch_xla's copy_ of a sharded result copies each shard
        assert shard_addresses(flat(on_xla)) == before
    assert [spec_of(t) for t in flat(on_xla)] == shardings
    assert programs.texts
    assert not programs.collectives
    assert not programs.count("copy")
    for out, wanted in zip(outs, expected, strict=True):
        assert tiles_of(out) == [1, 4, 1]
        torch.testing.assert_close(out.cpu(), wanted)
    for t, wanted in zip(flat(on_xla), flat(own), strict=True):
        assert torch.equal(t.cpu(), wanted)


@pytest.mark.parametrize("how", WAYS)
def test_whole_caches(how, mesh):
    """What is computed from whole tensors is whole; they stay a program's inputs."""
    caches, rows = [stacked() for _ in range(2)], make()
    own = pytree.tree_map(torch.clone, caches)
    on_xla, moved = pytree.tree_map(put, (caches, rows))
    before = shard_addresses(on_xla)

    def attend(caches, rows, k, number):
        return step(caches, {**rows, "k": k * number}, 0.25)[1] + 1

    function = run(how, attend)
    for _ in range(4):
        k, number = torch.randn(rows["k"].shape), torch.randn(1)
        out = function(on_xla, moved, put(k), put(number))
        torch_xla.sync(wait=True)
        torch.testing.assert_close(out.cpu(), attend(own, rows, k, number))
    for t, wanted in zip(on_xla, own, strict=True):
        assert torch.equal(t.cpu(), wanted)
    if how != "openxla":
        assert shard_addresses(on_xla) == before


@pytest.mark.parametrize("how", ["openxla", "xla_ops"])
@pytest.mark.parametrize("place", [put_heads, lambda t, mesh: put(t)])
def test_graph_breaks(how, place, mesh):
    """What two programs take is an input of the second one too."""
    cache, rows = stacked(), make()
    on_xla = place(cache, mesh)

    def write(cache, k, slots):
        xla_ops.reshape_and_cache_flash(k, k * 2, *cache.unbind(0), slots)
        torch._dynamo.graph_break()
        xla_ops.reshape_and_cache_flash(k + 1, k, *cache.unbind(0), slots + 1)

    function = torch.compile(write, backend=how)
    for i in range(4):
        k, slots = torch.randn(rows["k"].shape), torch.arange(NUM_SEQS) * 5 + i
        function(on_xla, put(k), put(slots))
        write(cache, k, slots)
        assert torch.equal(on_xla.cpu(), cache)


@pytest.mark.parametrize("how", ["lazy", "xla_ops", "replay"])
def test_a_thousand_steps(how, mesh):
    """Each writes other rows; at the end all is as on one device, and where it was."""
    cache, rows = stacked(), make()
    slots = torch.randint(NUM_BLOCKS * PAGE, (1000, NUM_SEQS))
    scale = torch.randn(1000)

    def write(cache, k, v, slots, scale):
        pair = cache.unbind(0)
        xla_ops.reshape_and_cache_flash(k * scale, v + scale, *pair, slots)

    own = cache.clone()
    for i in range(1000):
        write(own, rows["k"], rows["v"], slots[i], scale[i])
    on_xla = put_heads(cache, mesh)
    before, spec = shard_addresses([on_xla]), spec_of(on_xla)
    k, v = put(rows["k"]), put(rows["v"])
    moved = [(put(s), put(x)) for s, x in zip(slots, scale, strict=True)]
    torch_xla.sync()
    function = run(how, write)
    for inputs in moved:
        function(on_xla, k, v, *inputs)
        torch_xla.sync()
    assert spec_of(on_xla) == spec
    assert shard_addresses([on_xla]) == before
    assert torch.equal(on_xla.cpu(), own)


@pytest.mark.parametrize("how", ["lazy", "xla_ops", "replay"])
@pytest.mark.parametrize("layout", ["HND", "blocks_first", "packed"])
def test_layouts(how, layout, mesh):
    """Heads in other places of the buffer; strides and offsets are a shard's."""
    rows = make()
    shape = {
        "HND": (2, NUM_BLOCKS, KV_HEADS, PAGE, HEAD_DIM),
        "blocks_first": (NUM_BLOCKS, 2, PAGE, KV_HEADS, HEAD_DIM),
        "packed": (2, NUM_BLOCKS, PAGE, KV_HEADS * HEAD_DIM),
    }[layout]
    heads = {"HND": 2, "blocks_first": 3, "packed": 3}[layout]
    cache = torch.randn(shape)

    def views(cache):
        if layout == "HND":
            return [t.transpose(1, 2) for t in cache.unbind(0)]
        if layout == "blocks_first":
            return cache.unbind(1)
        return [t.view(NUM_BLOCKS, PAGE, KV_HEADS, HEAD_DIM) for t in cache.unbind(0)]

    def both(cache, rows):
        return step([views(cache)], rows)[0]

    own = cache.clone()
    expected = both(own, rows)
    on_xla = put(
        cache, mesh, tuple("tp" if i == heads else None for i in range(cache.dim()))
    )
    before = shard_addresses([on_xla])
    out = run(how, both)(on_xla, {name: put(t) for name, t in rows.items()})
    torch_xla.sync(wait=True)
    torch_xla.sync(wait=True)
    torch.testing.assert_close(out.cpu(), expected)
    assert torch.equal(on_xla.cpu(), own)
    assert shard_addresses([on_xla]) == before
    assert tiles_of(on_xla)[heads] == 4


def test_reshape_and_cache(mesh, hlo_dump):
    """vLLM's older layout: [num_blocks, heads, head_dim / x, page_size, x]."""
    x = 4
    rows = make()
    key_cache = torch.randn(NUM_BLOCKS, KV_HEADS, HEAD_DIM // x, PAGE, x)
    value_cache = torch.randn(NUM_BLOCKS, KV_HEADS, HEAD_DIM, PAGE)
    own = [key_cache.clone(), value_cache.clone()]
    xla_ops.reshape_and_cache(rows["k"], rows["v"], *own, rows["slots"])
    on_xla = [
        put(t, mesh, (None, "tp", *[None] * (t.dim() - 2)))
        for t in (key_cache, value_cache)
    ]
    before = shard_addresses(on_xla)
    with compiled(hlo_dump) as programs:
        xla_ops.reshape_and_cache(
            put(rows["k"]), put(rows["v"]), *on_xla, put(rows["slots"])
        )
    assert programs.texts
    assert not programs.collectives
    assert shard_addresses(on_xla) == before
    for t, wanted in zip(on_xla, own, strict=True):
        assert torch.equal(t.cpu(), wanted)


@pytest.mark.parametrize("view", [False, True])
def test_copy_and_swap_blocks(view, mesh, hlo_dump):
    """Blocks are moved by each device for its heads."""
    pairs = torch.tensor([[0, 3], [5, 1], [2, 7]])
    caches = [stacked() for _ in range(4)] if view else separate() + separate()
    own = [c.clone() for c in caches]

    def move(caches):
        k, v, other, _ = [c[1] if view else c for c in caches]
        xla_ops.copy_blocks([k], [v], pairs.to(k.device))
        xla_ops.swap_blocks(k, other, pairs.to(k.device))

    move(own)
    on_xla = [put_heads(c, mesh) for c in caches]
    before = shard_addresses(on_xla)
    with compiled(hlo_dump) as programs:
        move(on_xla)
    assert programs.texts
    assert not programs.collectives
    assert shard_addresses(on_xla) == before
    for t, wanted in zip(on_xla, own, strict=True):
        assert torch.equal(t.cpu(), wanted)


@pytest.mark.parametrize("how", ["lazy", "xla_ops"])
def test_fp8_cache_with_scales_sinks_and_slopes(how, mesh, hlo_dump):
    """What belongs to heads goes with them; scales for all stay whole."""
    rows, sinks = make(torch.bfloat16), torch.randn(HEADS)
    slopes = torch.rand(HEADS)
    scales = torch.rand(NUM_SEQS, KV_HEADS) + 0.5
    cache = torch.randn(2, NUM_BLOCKS, PAGE, KV_HEADS, HEAD_DIM)
    cache = cache.to(torch.float8_e4m3fn).view(torch.uint8)
    written = torch.tensor([0.5])

    def attend(cache, rows, sinks, slopes, scales, written):
        pair = cache.unbind(0)
        given = (rows["k"], rows["v"], *pair, rows["slots"], "fp8", written, written)
        xla_ops.reshape_and_cache_flash(*given)
        batch = (rows["lens"], rows["table"], rows["starts"], rows["num_seqs"])
        return xla_ops.paged_attention(
            rows["q"],
            cache,
            *batch,
            0.25,
            sliding_window=9,
            alibi_slopes=slopes,
            sinks=sinks,
            kv_cache_dtype="fp8",
            k_scale=scales,
            v_scale=scales,
            return_lse=True,
        )

    own = cache.clone()
    expected, expected_lse = attend(own, rows, sinks, slopes, scales, written)
    on_xla = put_heads(cache, mesh)
    before = shard_addresses([on_xla])
    moved = {name: put(t) for name, t in rows.items()}
    split_sinks = put(sinks, mesh, ("tp",))
    rest = [put(t) for t in (slopes, scales, written)]
    with compiled(hlo_dump) as programs:
        out, lse = run(how, attend)(on_xla, moved, split_sinks, *rest)
    assert not programs.collectives
    assert tiles_of(lse) == [4, 1]
    torch.testing.assert_close(out.cpu(), expected)
    torch.testing.assert_close(lse.cpu(), expected_lse)
    assert torch.equal(on_xla.cpu(), own)
    assert shard_addresses([on_xla]) == before


def test_gradient_of_queries(mesh, hlo_dump):
    """Over a cache whose heads are split."""
    rows, sinks = make(), torch.randn(HEADS)
    cache, grad = stacked(), torch.randn(NUM_SEQS, HEADS, HEAD_DIM)

    def gradients(cache, rows, sinks, grad):
        query, sinks = (t.detach().requires_grad_() for t in (rows["q"], sinks))
        batch = (rows["lens"], rows["table"], rows["starts"], rows["num_seqs"])
        with torch.enable_grad():
            out = xla_ops.paged_attention(query, cache, *batch, 0.25, sinks=sinks)
            return torch.autograd.grad(out, (query, sinks), grad)

    expected = gradients(cache, rows, sinks, grad)
    moved = {name: put(t) for name, t in rows.items()}
    given = (put_heads(cache, mesh), moved, put(sinks), put(grad))
    with compiled(hlo_dump) as programs:
        dq, dsinks = gradients(*given)
    assert not programs.collectives
    assert (tiles_of(dq), tiles_of(dsinks)) == ([1, 4, 1], [4])
    torch.testing.assert_close(dq.cpu(), expected[0])
    torch.testing.assert_close(dsinks.cpu(), expected[1])


@pytest.mark.parametrize(
    "dim, message",
    [
        (1, "key_cache must be whole in dimension 0; split it in heads"),
        (2, "key_cache must be whole in dimension 1; split it in heads"),
        (4, "key_cache must be whole in dimension 3; split it in heads"),
    ],
)
def test_caches_split_elsewhere(dim, message, mesh):
    """Blocks, offsets in a page and head_dim; by the name of the cache."""
    rows = {name: put(t) for name, t in make().items()}
    spec = tuple("tp" if i + 1 == dim else None for i in range(4))
    pair = [put(t, mesh, spec) for t in separate()]
    with pytest.raises(ValueError, match=message):
        xla_ops.reshape_and_cache_flash(rows["k"], rows["v"], *pair, rows["slots"])
    batch = (rows["lens"], rows["table"], rows["starts"], rows["num_seqs"])
    with pytest.raises(ValueError, match=f"paged_attention: {message}"):
        xla_ops.paged_attention(rows["q"], pair, *batch, 0.25)


def test_heads_without_a_dimension_of_their_own(mesh):
    """Keys and values in one row: no piece of it has the heads of both."""
    qkv = put(torch.randn(NUM_SEQS, (HEADS + 2 * KV_HEADS) * HEAD_DIM))
    q, k, v = qkv.split([HEADS * HEAD_DIM, *[KV_HEADS * HEAD_DIM] * 2], -1)
    starts = put(torch.arange(NUM_SEQS + 1, dtype=torch.int32))
    query = put(torch.randn(NUM_SEQS, HEADS, HEAD_DIM), mesh, (None, "tp", None))
    del q
    key, value = (t.unflatten(-1, (KV_HEADS, HEAD_DIM)) for t in (k, v))
    message = "must have a dimension of heads alone where heads are split"
    with pytest.raises(ValueError, match=f"flash_attn_varlen: k {message}"):
        xla_ops.flash_attn_varlen(query, key, value, starts, starts, 1, 1)
