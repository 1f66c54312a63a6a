"""Not in place: a functional op gives a new cache, which the caller keeps.

SPDX-License-Identifier: Apache-2.0

    python examples/in_place/clone_and_return.py

The pure form, as in JAX: right under every transformation and with any backend. Without
donation the old cache stays alive while the new one is made, so each step copies every
cache and needs room for two.
"""

import torch

import xla_ops  # noqa: F401  (the op)
from common import demonstrate, read, write_arguments

BACKEND = "openxla"


def write(cache, rows, slots):
    op = torch.ops.xla_ops.reshape_and_cache_flash_one
    return op(*write_arguments(rows, cache, slots))


def step(x, caches, slots):
    new = []
    for key_cache, value_cache in caches:
        new.append((write(key_cache, x, slots), write(value_cache, x, slots)))
        x = x + read(new[-1][0], slots) + read(new[-1][1], slots)
    return x, new


if __name__ == "__main__":
    demonstrate(step, BACKEND)
