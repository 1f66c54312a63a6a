"""What the four examples share: caches, rows to write, and a run that checks them.

SPDX-License-Identifier: Apache-2.0

A cache is [num_blocks, page_size, heads, head_dim]; slot s is its row s when the first
two dimensions are taken as one. A step writes x into K and V of each layer, at `slots`,
and adds what the caches then hold there.
"""

import torch
import torch_xla

PAGE, HEADS, HEAD_DIM, TOKENS = 16, 2, 128, 4


def make_caches(layers: int, num_blocks: int) -> list[tuple[torch.Tensor, ...]]:
    shape, device = (num_blocks, PAGE, HEADS, HEAD_DIM), torch_xla.device()
    caches = [
        tuple(torch.zeros(shape, dtype=torch.bfloat16, device=device) for _ in "kv")
        for _ in range(layers)
    ]
    torch_xla.sync(wait=True)
    return caches


def make_inputs(num_blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns x [TOKENS, heads, head_dim], all ones, and slots [TOKENS]."""
    device = torch_xla.device()
    x = torch.ones(TOKENS, HEADS, HEAD_DIM, dtype=torch.bfloat16).to(device)
    slots = torch.arange(TOKENS) * (num_blocks * PAGE // TOKENS) + 3
    return x, slots.to(device)


def write_arguments(rows, cache, slots) -> tuple:
    """The arguments of the functional op that writes rows into one cache.

    torch.ops.xla_ops.reshape_and_cache_flash_one(*arguments) returns the new cache.
    """
    strides = (PAGE * HEADS * HEAD_DIM, HEADS * HEAD_DIM, HEAD_DIM)
    geometry = [*cache.shape, *strides, 0]  # a dense cache that begins at element 0
    scale = rows.new_ones((), dtype=torch.float32)  # for fp8 caches
    return cache, rows, slots, scale, "auto", geometry, False, None


def read(cache, slots) -> torch.Tensor:
    return cache.view(-1, HEADS, HEAD_DIM)[slots]


def addresses(caches) -> list[int]:
    torch_xla.sync(wait=True)
    pointer = torch_xla._XLAC._unsafe_buffer_pointer
    return [pointer(t) for pair in caches for t in pair]


@torch.no_grad()
def run(step, caches, x, slots):
    """Runs one step and returns (x, caches), whichever way the step updates them."""
    out = step(x, caches, slots)
    torch_xla.sync()
    return out if isinstance(out, tuple) else (out, caches)


def demonstrate(step, backend: str) -> None:
    """Runs a step lazily and compiled, and says whether the buffers stayed."""
    for mode in ("lazily", f"compiled by {backend}"):
        f = torch.compile(step, backend=backend) if backend in mode else step
        caches, (x, slots) = make_caches(layers=2, num_blocks=64), make_inputs(64)
        try:
            for _ in range(3):
                before = addresses(caches)
                out, caches = run(f, caches, x, slots)
                stayed = sum(
                    a == b for a, b in zip(before, addresses(caches), strict=True)
                )
        except RuntimeError as error:
            print(f"{mode}: raises {str(error)[:60]}...")
            continue
        # Each layer adds K and V, and both hold x: 1, 3, 9.
        right = (out == 9).all() and all(
            (read(t, slots) == 3**i).all()
            for i, pair in enumerate(caches)
            for t in pair
        )
        print(f"{mode}: values right: {bool(right)}, {stayed} of 4 buffers stayed")
