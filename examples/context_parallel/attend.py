"""Attention to a context that no single device holds: each device attends to its part,
and the parts are merged by their lse.

    CPU_NUM_DEVICES=2 PJRT_DEVICE=CPU python attend.py

The cache's pages are split over the devices, and so are each sequence's block table and
length: a device has the tables of its own pages. Inside torch_xla's manual mode the op
sees them as any cache. What crosses devices is each part's result and lse, head by
head: every device gets its heads of all parts, and merges those. The results are split
by heads, as a row-parallel output projection wants them. Against attention on one
device this adds, a step and device, one all-to-all of num_parts - 1 parts of

    num_tokens * num_heads / num_parts * (head_dim * itemsize + 4) bytes,

which does not grow with the context; the time to read the cache falls to its part.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import torch_xla
import torch_xla.runtime as xr
from torch_xla.distributed import spmd as xs

import xla_ops


def attend(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    lens: torch.Tensor,
    tables: torch.Tensor,
    mesh: xs.Mesh,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attends one new token of each sequence to all parts of its context.

    Args:
        query: [num_seqs, num_heads, head_dim], on all devices.
        kv_cache: [2, num_parts * num_blocks, page_size, num_kv_heads, head_dim], split
            in its second dimension.
        lens: [num_parts, num_seqs], int32: tokens of each part.
        tables: [num_parts, num_seqs, max_blocks], int32: block ids within the part.
        mesh: one axis of num_parts devices, "cp".

    Returns:
        out and lse of all the context, as paged_attention's, split by heads.
    """
    num_parts, num_seqs = lens.shape

    def local(t: torch.Tensor, *spec: str | None) -> torch.Tensor:
        return xs.enable_manual_sharding(t, spec, mesh=mesh).global_tensor

    def whole(t: torch.Tensor) -> torch.Tensor:
        """One part's tensor, as the piece of one with a dimension of parts."""
        spec = ("cp", *[None] * t.dim())
        shape = torch.Size((num_parts, *t.shape))
        joined = xs.disable_manual_sharding(t[None], spec, shape, mesh=mesh)
        return joined.global_tensor

    device = query.device
    out, lse = xla_ops.paged_attention(
        local(query, None, None, None),
        local(kv_cache, None, "cp", None, None, None),
        local(lens, "cp", None)[0],
        local(tables, "cp", None, None)[0],
        local(torch.arange(num_seqs + 1, dtype=torch.int32, device=device), None),
        local(torch.full((1,), num_seqs, dtype=torch.int32, device=device), None),
        query.shape[-1] ** -0.5,
        return_lse=True,
    )
    outs, lses = whole(out), whole(lse)
    # From a part of all heads to all parts of some heads: an all-to-all.
    xs.mark_sharding(outs, mesh, (None, None, "cp", None))
    xs.mark_sharding(lses, mesh, (None, "cp", None))
    states = zip(outs.unbind(0), lses.unbind(0), strict=True)
    with xla_ops.sharding(mesh, tokens=None, heads="cp"):
        return functools.reduce(lambda a, b: xla_ops.merge_attn_states(*a, *b), states)


def example(num_parts: int) -> tuple[torch.Tensor, ...]:
    """A batch on the CPU: query, cache, lens and tables, for `num_parts` devices."""
    num_seqs, num_heads, num_kv_heads, head_dim = 3, 8, 4, 32
    num_blocks, page_size, pages = 64, 16, 10  # of each part; of a sequence in it
    query = torch.randn(num_seqs, num_heads, head_dim)
    cache = torch.randn(2, num_parts * num_blocks, page_size, num_kv_heads, head_dim)
    ids = [torch.randperm(num_blocks)[: num_seqs * pages] for _ in range(num_parts)]
    tables = torch.stack(ids).view(num_parts, num_seqs, pages).int()
    # Full parts, and a last one that a sequence may have filled in part or not at all.
    lens = torch.full((num_parts, num_seqs), pages * page_size, dtype=torch.int32)
    lens[-1] = torch.tensor([0, 1, 100])
    return query, cache, lens, tables


def on_one_device(
    query: torch.Tensor, cache: torch.Tensor, lens: torch.Tensor, tables: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by one call, of the parts' pages one after the other."""
    num_parts, num_seqs, _ = tables.shape
    first = torch.arange(num_parts, dtype=torch.int32) * (cache.shape[1] // num_parts)
    table = (tables + first[:, None, None]).transpose(0, 1).reshape(num_seqs, -1)
    out, lse = xla_ops.paged_attention(
        query,
        cache,
        lens.sum(0).int(),
        table.contiguous(),
        torch.arange(num_seqs + 1, dtype=torch.int32),
        num_seqs,
        query.shape[-1] ** -0.5,
        return_lse=True,
    )
    return out, lse


def main() -> None:
    xr.use_spmd()
    num_parts = xr.global_runtime_device_count()
    mesh = xs.Mesh(np.arange(num_parts), (num_parts,), ("cp",))
    batch = example(num_parts)
    query, cache, lens, tables = (t.to(torch_xla.device()) for t in batch)
    xs.mark_sharding(cache, mesh, (None, "cp", None, None, None))
    out, lse = attend(query, cache, lens, tables, mesh)
    expected, expected_lse = on_one_device(*batch)
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse.cpu(), expected_lse, rtol=1e-4, atol=1e-5)
    print(f"{num_parts} devices: as on one device")


if __name__ == "__main__":
    main()
