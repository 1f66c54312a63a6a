"""examples/context_parallel: right, and as cheap as it says."""

import numpy as np
import torch
from torch_xla.distributed import spmd as xs

import attend
from sharded import compiled, put, tiles_of


def test_attention_to_parts_of_a_context(spmd, hlo_dump):
    mesh = xs.Mesh(np.arange(4), (4,), ("cp",))
    batch = attend.example(4)
    expected, expected_lse = attend.on_one_device(*batch)
    query, cache, lens, tables = batch
    with compiled(hlo_dump) as programs:
        out, lse = attend.attend(
            put(query),
            put(cache, mesh, (None, "cp", None, None, None)),
            put(lens),
            put(tables),
            mesh,
        )
    assert set(programs.collectives) == {"all-to-all"}
    num_tokens, num_heads, head_dim = query.shape
    # A device's own part is in an all-to-all's result too.
    of_a_part = num_tokens * num_heads // 4 * (head_dim * 4 + 4)
    assert programs.bytes_moved == 4 * of_a_part
    assert (tiles_of(out), tiles_of(lse)) == ([1, 4, 1], [4, 1])
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse.cpu(), expected_lse, rtol=1e-4, atol=1e-5)
