"""In place by a custom call put into the graph by hand, with allow_in_graph.

SPDX-License-Identifier: Apache-2.0

    python examples/in_place/direct_call.py

No torch.library op, no schema: a Python function adds the instruction to the lazy
graph, and allow_in_graph tells Dynamo to call it as it is. AOTAutograd would look into
it and find no op, so it needs the backend openxla_eval, which has no AOTAutograd, hence
no functionalization: reads and writes of one cache in a graph may change places.
"""

import torch
import torch_xla
from torch._subclasses import FakeTensor

from common import demonstrate, read, write_arguments
from xla_ops.core import handlers
from xla_ops.core.custom_call import call_in_graph
from xla_ops.core.op import OPS

BACKEND = "openxla_eval"


@torch._dynamo.allow_in_graph
def write(cache, rows, slots):
    """Returns the new cache, in the old one's buffer."""
    if isinstance(cache, FakeTensor):  # Dynamo asks for the shape
        return torch.empty_like(cache)
    if type(cache) is not torch.Tensor:
        raise TypeError(f"write: backend must be {BACKEND}, got one with AOTAutograd")
    op = OPS["reshape_and_cache_flash_one"]
    bound = op.lowered(write_arguments(rows, cache, slots))
    target = bound.call.target
    if not handlers.available(handlers.xla_platform(), target):
        raise RuntimeError(f"write: XLA must have a handler of {target}, got none")
    (new,) = call_in_graph(bound)
    torch_xla._XLAC._set_buffer_donation(cache, True)
    return new


def step(x, caches, slots):
    for key_cache, value_cache in caches:
        key_cache.copy_(write(key_cache, x, slots))
        value_cache.copy_(write(value_cache, x, slots))
        x = x + read(key_cache, slots) + read(value_cache, slots)
    return x


if __name__ == "__main__":
    demonstrate(step, BACKEND)
