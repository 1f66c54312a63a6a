#!/usr/bin/env python3
"""Times one KV write of three tokens into a large cache of CPU or CUDA tensors.

    compiled_update.py [--device cpu] [--megabytes 16 1024] [--out results.json]

Nothing of XLA: this is what torch.compile makes of an update in place, by our name and
by vLLM's. Each backend is right first (against eager, on a small cache), then timed:
the 20th percentile of 50 calls, and how much the peak of memory grew by compiling and
calling. A call that stays in place costs the same at every size and grows nothing.
cudagraphs copies the inputs of a graph unless it is told to keep their mutation; it is.
"""

import argparse
import json
import os
import pathlib
import platform
import resource
import statistics
import sys
import time

import torch

import xla_ops
import xla_ops.vllm

HEADS, HEAD_DIM, PAGE = 8, 128, 16
BACKENDS: dict[str, tuple[str, ...]] = {"cpu": ("eager", "aot_eager", "inductor")}
BACKENDS["cuda"] = (*BACKENDS["cpu"], "cudagraphs")


def by_our_name(cache, rows, slots):
    key_cache, value_cache = cache.unbind(0)
    xla_ops.reshape_and_cache_flash(rows, rows, key_cache, value_cache, slots)
    return key_cache[0, 0]


def by_vllms_name(cache, rows, slots):
    key_cache, value_cache = cache.unbind(0)
    one = torch.ones((), device=cache.device)
    torch.ops._C_cache_ops.reshape_and_cache_flash(
        rows, rows, key_cache, value_cache, slots, "auto", one, one
    )
    return key_cache[0, 0]


def make(device, megabytes):
    """A stacked bf16 cache of that size, three rows and their slots."""
    page_bytes = 2 * PAGE * HEADS * HEAD_DIM * 2
    blocks = megabytes * 2**20 // page_bytes
    cache = torch.zeros(
        2, blocks, PAGE, HEADS, HEAD_DIM, dtype=torch.bfloat16, device=device
    )
    rows = torch.ones(3, HEADS, HEAD_DIM, dtype=torch.bfloat16, device=device)
    return cache, rows, torch.tensor([0, 5, -1], device=device)


def peak(device) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(step, backend, device, megabytes) -> dict:
    torch._dynamo.reset()
    run = step if backend == "eager" else torch.compile(step, backend=backend)
    cache, rows, slots = make(device, 1)
    wanted = cache.clone()
    step(wanted, rows, slots)
    run(cache, rows, slots)
    assert torch.equal(cache, wanted), f"{step.__name__} by {backend} is wrong"

    cache, rows, slots = make(device, megabytes)
    cache.fill_(1)
    address, before = cache.data_ptr(), peak(device)
    times = []
    for _ in range(55):
        start = time.perf_counter()
        run(cache, rows, slots)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    assert cache.data_ptr() == address
    return {
        "form": step.__name__,
        "backend": backend,
        "megabytes": megabytes,
        "ms": round(statistics.quantiles(times[5:], n=5)[0], 3),
        "peak_grew_mb": round((peak(device) - before) / 2**20, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=sorted(BACKENDS), default="cpu")
    parser.add_argument("--megabytes", type=int, nargs="+", default=[16, 1024])
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    xla_ops.vllm.register_lowerings()
    torch._dynamo.config.cudagraph_backend_keep_input_mutation = True
    name = f"{platform.machine()}, {os.cpu_count()} cores"
    if args.device == "cuda":
        name = torch.cuda.get_device_name()
    record: dict = {
        "device": name,
        "torch": torch.__version__,
        "xla_ops": xla_ops.__version__,
        "command": sys.argv[1:],
        "rows": [],
    }
    with torch.no_grad():
        for megabytes in args.megabytes:
            for step in (by_our_name, by_vllms_name):
                for backend in BACKENDS[args.device]:
                    row = measure(step, backend, args.device, megabytes)
                    record["rows"].append(row)
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{record['device']}, torch {record['torch']}")
    print(f"{'form':<14}{'backend':<12}{'MB':>6}{'ms':>10}{'peak grew MB':>14}")
    for row in record["rows"]:
        print(
            f"{row['form']:<14}{row['backend']:<12}{row['megabytes']:>6}"
            f"{row['ms']:>10.3f}{row['peak_grew_mb']:>14.1f}"
        )


if __name__ == "__main__":
    main()
