"""Another library's mutable op, used as it comes.

SPDX-License-Identifier: Apache-2.0

    python examples/in_place/other_library.py

A library made for CPU and CUDA tensors, as vLLM is, knows nothing of XLA. Lazily its
mutable op raises. Compiled, torch makes it functional and torch_xla runs it on the
host: right, and every step carries every cache to the host and back. What helps is a
lowering for XLA, as xla_ops.vllm.register_lowerings() adds for vLLM's ops.
"""

import torch

from common import HEAD_DIM, HEADS, demonstrate, read

BACKEND = "openxla"

# The other library: it would define the op for CUDA too.
library = torch.library.Library("some_library", "DEF")
library.define("write_rows(Tensor(a!) cache, Tensor rows, Tensor slots) -> ()")


def _write_on_cpu(cache, rows, slots):
    cache.view(-1, HEADS, HEAD_DIM).index_copy_(0, slots, rows)


library.impl("write_rows", _write_on_cpu, "CPU")
torch.library.register_fake("some_library::write_rows", lambda *_: None, lib=library)


def step(x, caches, slots):
    for key_cache, value_cache in caches:
        torch.ops.some_library.write_rows(key_cache, x, slots)
        torch.ops.some_library.write_rows(value_cache, x, slots)
        x = x + read(key_cache, slots) + read(value_cache, slots)
    return x


if __name__ == "__main__":
    demonstrate(step, BACKEND)
