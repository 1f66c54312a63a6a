"""Places of their own for small buffers, so that a program's scratch stays where it is.

XLA launches a program's kernels as nodes of CUDA graphs, which hold addresses. Where
one has changed since the call before, it writes every node that uses it anew, and
captures custom calls again: 2.8 ms of the host for a decode step of 32 layers, more
than the step takes. Arguments and caches stay where they are. The scratch lies where
XLA's allocator (BFC: best fit, freed neighbours become one) finds a hole, and it gives
out a hole whole unless that is twice as large as what was asked for. So a result of
eight bytes beside a freed one of 500 KB makes that one larger by its own size at each
step, and the scratch behind both moves on, for some hundred steps.

Small holes between buffers that stay never become one with others, and best fit takes
them first.

Tested by tests/programs/test_small_buffers.py; benchmarks/several_gpus.py shows what it
is worth.
"""

from __future__ import annotations

import torch

from ..core import handlers

# Tokens, counts and the tables of programs' results are below 4 KB. A step of an engine
# that works ahead has some ten of them.
_HOLES = 128
_HOLE_BYTES = 4096

_walls: dict[torch.device, list[torch.Tensor]] = {}


def keep_apart(device: torch.device) -> None:
    """Makes the places in the memory of a GPU, once; 0.5 MB. Elsewhere does nothing."""
    if device in _walls or handlers.platform_of(device) != handlers.CUDA:
        return
    walls: list[torch.Tensor] = []
    holes: list[torch.Tensor] = []
    # Made on the host, whatever the default device: a lazy tensor has no buffer.
    hole = torch.zeros(_HOLE_BYTES, dtype=torch.uint8, device="cpu")
    for _ in range(_HOLES):
        holes.append(hole.to(device))
        walls.append(hole[:1].to(device))
    _walls[device] = walls
