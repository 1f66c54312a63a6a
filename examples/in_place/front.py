"""In place by this package's front: what we recommend.

SPDX-License-Identifier: Apache-2.0

    python examples/in_place/front.py

A mutable op, called like any other. The front makes the functional result the cache's
new value and, under torch.compile, donates the cache's buffer: nothing is copied, and
nobody has to know.
"""

import xla_ops
from common import demonstrate, read

BACKEND = "openxla"


def step(x, caches, slots):
    for key_cache, value_cache in caches:
        xla_ops.reshape_and_cache_flash(x, x, key_cache, value_cache, slots)
        x = x + read(key_cache, slots) + read(value_cache, slots)
    return x


if __name__ == "__main__":
    demonstrate(step, BACKEND)
