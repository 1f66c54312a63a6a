"""fused_qk_norm_rope_and_cache where what it takes are parts of one tensor."""

import pytest
import torch
import torch_xla

from xla_ops.ops import fused_qk_norm_rope_and_cache

TOKENS, HEADS, KV_HEADS, SIZE, BLOCKS, PAGE = 3, 2, 1, 8, 2, 4
COLUMNS = (HEADS + 2 * KV_HEADS) * SIZE
CACHE = (2, BLOCKS, PAGE, KV_HEADS, SIZE)
NUM_CACHED = 2 * BLOCKS * PAGE * KV_HEADS * SIZE
WAYS = ["lazy", "openxla", "xla_ops"]


def from_arena(arena):
    qkv = arena[: TOKENS * COLUMNS].view(TOKENS, COLUMNS)
    return qkv, *arena[TOKENS * COLUMNS :].view(CACHE).unbind(0)


def with_untracked_keys(arena):
    kv = arena[TOKENS * COLUMNS :].view(CACHE).clone()
    qkv = arena[: TOKENS * COLUMNS].view(TOKENS, COLUMNS).clone()
    return qkv, kv[0].detach(), kv[1]


@pytest.mark.parametrize("parts", [from_arena, with_untracked_keys])
@pytest.mark.parametrize("way", WAYS)
def test_each_part_is_updated(way, parts):
    generator = torch.Generator().manual_seed(0)
    arena = torch.randn(TOKENS * COLUMNS + NUM_CACHED, generator=generator)
    table = torch.randn(16, SIZE, generator=generator)
    positions, slots = torch.tensor([3, 0, 5]), torch.tensor([1, 6, -1])

    def update(arena, table, positions, slots):
        qkv, keys, values = parts(arena)
        query = fused_qk_norm_rope_and_cache(
            *(qkv, HEADS, KV_HEADS, SIZE, 1e-6, None, None, table, True),
            *(positions, keys, values, slots),
        )
        return query, qkv + 0, keys + 0, values + 0

    given = (arena, table, positions, slots)
    expected = update(*(t.clone() for t in given))
    device = torch_xla.device()
    run = update if way == "lazy" else torch.compile(update, backend=way)
    got = run(*(t.to(device) for t in given))
    torch_xla.sync()
    names = ("query", "qkv", "keys", "values")
    for name, want, value in zip(names, expected, got, strict=True):
        torch.testing.assert_close(value.cpu(), want, msg=lambda m, n=name: f"{n}: {m}")
