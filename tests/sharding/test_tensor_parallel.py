"""A decoder's blocks, tensor parallel as users write it: mark_sharding on weights."""

import pytest
import torch
import torch_xla
from torch.utils import _pytree as pytree

import xla_ops
from shard_addresses import shard_addresses
from sharded import compiled, put, run, tiles_of

LAYERS, SEQS, HEADS, KV_HEADS, DIM = 3, 4, 8, 4, 16
HIDDEN, INNER, NUM_BLOCKS, PAGE, CONTEXT = 64, 96, 32, 8, 21

# How Megatron splits them: the first product of a pair by columns, the second by rows.
SPECS = {
    "q": (None, "tp"),
    "k": (None, "tp"),
    "v": (None, "tp"),
    "o": ("tp", None),
    "gate": (None, "tp"),
    "up": (None, "tp"),
    "down": ("tp", None),
}
DECLARED = {"tokens": None, "heads": "tp", "columns": "tp"}


def make_layer():
    shapes = {
        "q": (HIDDEN, HEADS * DIM),
        "k": (HIDDEN, KV_HEADS * DIM),
        "v": (HIDDEN, KV_HEADS * DIM),
        "o": (HEADS * DIM, HIDDEN),
        "gate": (HIDDEN, INNER),
        "up": (HIDDEN, INNER),
        "down": (INNER, HIDDEN),
        "attn_norm": (HIDDEN,),
        "mlp_norm": (HIDDEN,),
    }
    return {name: torch.randn(shape) * 0.2 for name, shape in shapes.items()}


def make_batch():
    table = torch.randperm(NUM_BLOCKS)[: SEQS * 3].view(SEQS, 3).int()
    last = CONTEXT - 1
    return {
        "hidden": torch.randn(SEQS, HIDDEN),
        "positions": torch.full((SEQS,), last),
        "cos_sin": torch.randn(64, DIM),
        "slots": table[:, last // PAGE].long() * PAGE + last % PAGE,
        "table": table,
        "lens": torch.full((SEQS,), CONTEXT, dtype=torch.int32),
        "starts": torch.arange(SEQS + 1, dtype=torch.int32),
        "num_seqs": torch.tensor([SEQS], dtype=torch.int32),
    }


def decode(layers, caches, b, scale=DIM**-0.5):
    x, residual = None, b["hidden"]
    for w, cache in zip(layers, caches, strict=True):
        if x is None:
            y = xla_ops.rms_norm(residual, w["attn_norm"])
        else:
            y, residual = xla_ops.fused_add_rms_norm(x, residual, w["attn_norm"])
        q = (y @ w["q"]).view(SEQS, HEADS, DIM)
        k = (y @ w["k"]).view(SEQS, KV_HEADS, DIM)
        v = (y @ w["v"]).view(SEQS, KV_HEADS, DIM)
        q, k = xla_ops.rotary_embedding(b["positions"], q, k, DIM, b["cos_sin"])
        xla_ops.reshape_and_cache_flash(k, v, *cache.unbind(0), b["slots"])
        batch = (b["lens"], b["table"], b["starts"], b["num_seqs"])
        out = xla_ops.paged_attention(q, cache, *batch, scale)
        x = out.reshape(SEQS, HEADS * DIM) @ w["o"]
        y, residual = xla_ops.fused_add_rms_norm(x, residual, w["mlp_norm"])
        x = torch.nn.functional.silu(y @ w["gate"]) * (y @ w["up"]) @ w["down"]
    return x + residual


WAYS = ["lazy", "openxla", "xla_ops", "replay"]


@pytest.mark.parametrize("how", WAYS)
def test_one_all_reduce_a_pair(how, mesh, hlo_dump):
    """Two a layer, of the hidden state; nothing else, and no copy of a cache."""
    layers, b = [make_layer() for _ in range(LAYERS)], make_batch()
    caches = [torch.randn(2, NUM_BLOCKS, PAGE, KV_HEADS, DIM) for _ in layers]
    own = pytree.tree_map(torch.clone, caches)
    scale = 1 / (WAYS.index(how) + 2)  # a program that no other test has compiled
    expected = decode(layers, own, b, scale)
    on_xla = [
        {name: put(t, mesh, SPECS.get(name)) for name, t in layer.items()}
        for layer in layers
    ]
    kv = [put(c, mesh, (None, None, None, "tp", None)) for c in caches]
    moved = pytree.tree_map(put, b)
    before = shard_addresses(kv)
    function = run(how, decode)
    with compiled(hlo_dump) as programs, xla_ops.sharding(mesh, **DECLARED):
        out = function(on_xla, kv, moved, scale)
    torch_xla.sync(wait=True)
    assert len(programs.texts) == 1
    assert programs.collectives == {"all-reduce": 2 * LAYERS}
    assert programs.bytes_moved == 2 * LAYERS * SEQS * HIDDEN * 4
    cache_shard = f"f32[2,{NUM_BLOCKS},{PAGE},{KV_HEADS // 4},{DIM}]"
    assert cache_shard in programs.texts[0]
    assert f"= {cache_shard}{{4,3,2,1,0}} copy(" not in programs.texts[0]
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-4, atol=1e-4)
    for t, wanted in zip(kv, own, strict=True):
        assert tiles_of(t) == [1, 1, 1, 4, 1]
        torch.testing.assert_close(t.cpu(), wanted, rtol=1e-4, atol=1e-4)
    if how != "openxla":  # torch_xla's copy_ of a sharded result copies each shard
        assert shard_addresses(kv) == before


def test_queries_that_say_nothing_follow_the_cache(mesh, hlo_dump):
    """A column-parallel product goes where the cache's heads are, undeclared."""
    w, b = make_layer(), make_batch()
    cache = torch.randn(2, NUM_BLOCKS, PAGE, KV_HEADS, DIM)

    def attend(hidden, q, cache, b):
        q = (hidden @ q).view(SEQS, HEADS, DIM)
        batch = (b["lens"], b["table"], b["starts"], b["num_seqs"])
        return xla_ops.paged_attention(q, cache, *batch, DIM**-0.5)

    expected = attend(b["hidden"], w["q"], cache, b)
    kv = put(cache, mesh, (None, None, None, "tp", None))
    weight = put(w["q"], mesh, SPECS["q"])
    moved = pytree.tree_map(put, b)
    with compiled(hlo_dump) as programs:
        out = attend(moved["hidden"], weight, kv, moved)
    assert programs.texts
    assert not programs.collectives
    assert tiles_of(out) == [1, 4, 1]
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-4, atol=1e-4)


def test_data_parallel_norms_move_nothing(grid, hlo_dump):
    """Tokens over one axis of a grid, columns over the other."""
    x, w, up = torch.randn(8, HIDDEN), torch.randn(HIDDEN), torch.randn(HIDDEN, INNER)

    def block(x, w, up):
        return xla_ops.gelu_new(xla_ops.rms_norm(x, w) @ up)

    expected = block(x, w, up)
    with (
        compiled(hlo_dump) as programs,
        xla_ops.sharding(grid, tokens="dp", columns="tp"),
    ):
        out = block(put(x, grid, ("dp", None)), put(w), put(up, grid, (None, "tp")))
    assert programs.texts
    assert not programs.collectives
    assert tiles_of(out) == [2, 2]
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-4, atol=1e-4)
