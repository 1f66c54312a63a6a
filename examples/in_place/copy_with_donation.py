"""In place by a functional op, copy_ and a donation that the caller asks for.

SPDX-License-Identifier: Apache-2.0

    python examples/in_place/copy_with_donation.py

The op returns the new cache, and copy_ makes it the value of the old one. Lazily
torch_xla then reuses the buffer by itself. Compiled, openxla reuses only what is
donated by name; without that line each step copies every cache. A cache that is a view
cannot be donated so: the buffer belongs to its base.
"""

import torch

import xla_ops  # noqa: F401  (the op)
from common import demonstrate, read, write_arguments

BACKEND = "openxla"


def write(cache, rows, slots):
    if torch.compiler.is_compiling():
        torch.ops.xla.dynamo_set_buffer_donor_(cache, True)
    op = torch.ops.xla_ops.reshape_and_cache_flash_one
    cache.copy_(op(*write_arguments(rows, cache, slots)))


def step(x, caches, slots):
    for key_cache, value_cache in caches:
        write(key_cache, x, slots)
        write(value_cache, x, slots)
        x = x + read(key_cache, slots) + read(value_cache, slots)
    return x


if __name__ == "__main__":
    demonstrate(step, BACKEND)
