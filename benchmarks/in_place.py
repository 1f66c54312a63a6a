#!/usr/bin/env python3
"""Times a decode step against the size of the KV cache that it updates.

    in_place.py --out results.json [--layers 8] [--megabytes 16 2048 8192]

A step writes 64 new tokens into each layer's cache and attends to them. If the caches
are really updated in place, a step costs the same whatever their size. Reports the
median milliseconds a step and how many cache bytes moved (caches whose buffer's address
changed), lazily and compiled, for stacked and for separate caches; "stock" is the same
step with torch's own index_copy_, which copies under torch.compile.
"""

import argparse
import json
import pathlib
import statistics
import time

import torch
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.runtime as xr

import xla_ops

PAGE, HEADS, DIM, SEQS = 16, 8, 128, 64
# The stock step holds several copies of every cache at once.
STOCK_LIMIT_MB = 4096


def wait():
    torch_xla.sync()
    xm.wait_device_ops()


def addresses(caches):
    wait()
    return [torch_xla._XLAC._unsafe_buffer_pointer(t) for t in caches]


def layer_ours(x, key, kv, slots, meta):
    k, v = kv.unbind(0) if isinstance(kv, torch.Tensor) else kv
    xla_ops.reshape_and_cache_flash(key, key, k, v, slots)
    return x + xla_ops.paged_attention(key, kv, *meta, DIM**-0.5)


def layer_stock(x, key, kv, slots, meta):
    for cache in kv:
        cache.view(-1, HEADS, DIM).index_copy_(0, slots, key)
    return x + kv[0].view(-1, HEADS, DIM)[:SEQS] + kv[1].view(-1, HEADS, DIM)[:SEQS]


def measure(kind, compiled, layers, megabytes):
    steps = 10 if kind == "stock" else 30
    device = torch_xla.device()
    blocks = megabytes * 2**20 // (layers * 2 * PAGE * HEADS * DIM * 2)
    new = lambda *s: torch.zeros(*s, PAGE, HEADS, DIM, dtype=torch.bfloat16).to(device)  # noqa: E731
    if kind == "stacked":
        caches = [new(2, 1).repeat(1, blocks, 1, 1, 1) for _ in range(layers)]
    else:
        caches = [
            tuple(new(1).repeat(blocks, 1, 1, 1) for _ in range(2))
            for _ in range(layers)
        ]
    flat = [t for kv in caches for t in (kv if isinstance(kv, tuple) else [kv])]
    key = torch.randn(SEQS, HEADS, DIM).bfloat16().to(device)
    slots = (torch.randperm(blocks)[:SEQS] * PAGE).to(device)
    one = lambda *v: torch.tensor(v, dtype=torch.int32).to(device)  # noqa: E731
    meta = (
        torch.ones(SEQS, dtype=torch.int32).to(device),
        (slots // PAGE).int()[:, None],
        torch.arange(SEQS + 1, dtype=torch.int32).to(device),
        one(SEQS),
    )
    layer = layer_stock if kind == "stock" else layer_ours

    def step(x, key, caches, slots, meta):
        for kv in caches:
            x = layer(x, key, kv, slots, meta)
        return x

    torch._dynamo.reset()
    f = torch.compile(step, backend="openxla", fullgraph=True) if compiled else step
    times, moved = [], 0
    with torch.no_grad():
        for i in range(steps):
            before = addresses(flat) if i == steps - 1 else wait()
            start = time.perf_counter()
            f(key, key, caches, slots, meta)
            wait()
            times.append(1e3 * (time.perf_counter() - start))
        after = addresses(flat)
    for t, a, b in zip(flat, before, after, strict=True):
        moved += t.nbytes if a != b else 0
    return {
        "kind": kind,
        "mode": "compiled" if compiled else "lazy",
        "cache_mb": sum(t.nbytes for t in flat) / 2**20,
        "layers": layers,
        "ms_per_step": statistics.median(times[5:]),
        "cache_bytes_moved": moved,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--kinds", nargs="+", default=["stacked", "separate", "stock"])
    parser.add_argument("--megabytes", type=int, nargs="+", default=[64, 2048])
    args = parser.parse_args()
    rows = []
    print("caches    mode      MB     ms/step  cache bytes moved")
    for kind in args.kinds:
        for compiled in (False, True):
            for megabytes in args.megabytes:
                if kind == "stock" and megabytes > STOCK_LIMIT_MB:
                    continue
                row = measure(kind, compiled, args.layers, megabytes)
                rows.append(row)
                print(
                    f"{row['kind']:9s} {row['mode']:9s} {row['cache_mb']:6.0f} "
                    f"{row['ms_per_step']:8.2f}  {row['cache_bytes_moved']}",
                    flush=True,
                )
    result = {"device": xr.device_type(), "version": xla_ops.__version__, "rows": rows}
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
