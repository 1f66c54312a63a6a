#!/usr/bin/env python3
"""Checks collectives through GPUs' memory (xla_ops.peer_collective).

    torchrun --nproc_per_node 2 check_peers.py --out results.json

Needs as many GPUs of one host, torch_xla and the wheel. Values of every dtype and many
sizes against sums on the CPU, the same bits on every rank; calls that need no other's
result, of random sizes, between XLA's own collectives; many steps on ranks that are
late by turns; then us a call, beside XLA's all-reduce. Exit status 1 if one is wrong.
"""

import argparse
import json
import os
import pathlib
import random
import sys
import time

import torch
import torch.distributed as dist
import torch_xla
import torch_xla.core.xla_model as xm

from xla_ops.programs import peers, processes
from xla_ops.programs.replay import replay

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BYTES = (8, 24, 2048, 8192, 8200, 65_544, 1 << 19, 1 << 20)
CHAIN = 64


def given(rank, dtype, count, seed=0):
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    return torch.randn(count, generator=generator).to(dtype)


def expected(size, dtype, count, seed=0):
    """As the kernel adds up: in fp32, by rank, rounded once."""
    total = torch.zeros(count)
    for rank in range(size):
        total += given(rank, dtype, count, seed).float()
    return total.to(dtype)


def check_values(group):
    def reduced(x):
        with group.in_order():
            return group.all_reduce(x)

    found = {}
    for dtype in DTYPES:
        for size in BYTES:
            if size > peers.most_bytes(group.size):
                continue
            count = size // dtype.itemsize
            function = replay(reduced)
            right = True
            for seed in range(3):
                x = given(group.rank, dtype, count, seed).to(torch_xla.device())
                got = function(x).cpu()
                right &= torch.equal(got, expected(group.size, dtype, count, seed))
            found[f"{dtype} {size} bytes"] = right
    return found


def check_gathers(group):
    found = {}
    for shape, dim, dtype in (
        ((1,), 0, torch.float32),
        ((7,), 0, torch.int64),
        ((5, 3), 1, torch.bfloat16),
        ((64, 1024), -1, torch.float32),
        ((3, 1001), 0, torch.uint8),
        ((9,), 0, torch.bool),
    ):

        def gathered(x, dim=dim):
            with group.in_order():
                return group.all_gather(x, dim)

        count = torch.Size(shape).numel()
        parts = [
            (given(r, torch.float32, count) * 50).abs().to(dtype).view(shape)
            for r in range(group.size)
        ]
        x = parts[group.rank].to(torch_xla.device())
        got = replay(gathered)(x).cpu()
        found[f"gather {shape} {dtype}"] = torch.equal(got, torch.cat(parts, dim))
    return found


def check_norms(group):
    """The norm of a sum in its call, beside the two calls on the same inputs."""
    found = {}
    shapes = ((1, 4096), (64, 4096), (3, 8), (5, 2048), (130, 1000), (33, 8192))
    for dtype in DTYPES:
        for shape in shapes:
            count = torch.Size(shape).numel()
            hidden = shape[-1]
            if hidden * dtype.itemsize > 16384 or hidden * dtype.itemsize % 8:
                continue
            if count * dtype.itemsize > peers.most_bytes(group.size):
                continue
            residual = given(99, dtype, count).view(shape).to(torch_xla.device())
            weight = given(98, dtype, hidden).to(torch_xla.device())

            def normed(x, residual, weight):
                with group.in_order():
                    one = group.all_reduce_add_rms_norm(x, residual, weight, 1e-5)
                    rest = group.all_reduce(x), residual, weight, 1e-5
                    two = torch.ops.xla_ops.fused_add_rms_norm_functional(*rest)
                return *one, *two

            function = replay(normed)
            right = True
            for seed in range(3):
                x = given(group.rank, dtype, count, seed).view(shape)
                x = x.to(torch_xla.device())
                results = [t.cpu() for t in function(x, residual, weight)]
                out, total, wanted, wanted_total = results
                right &= torch.equal(total, wanted_total)
                # The squares are added up in another order.
                close = dict(rtol=2e-2 if dtype.itemsize == 2 else 1e-5, atol=1e-6)
                right &= torch.allclose(out.float(), wanted.float(), **close)
            found[f"norm {shape} {dtype}"] = right
    return found


def check_independent(group):
    """Calls that nothing but their order holds apart, some of them XLA's."""
    found = {}
    for seed in range(4):
        rng = random.Random(seed)
        counts = [4 * rng.randrange(1, 30_000) for _ in range(24)]
        counts += [2_000_000, 3, 1_500_002]  # XLA's: too long, or no whole units
        rng.shuffle(counts)

        def reduced(*inputs):
            with group.in_order():
                sums = [group.all_reduce(x) for x in inputs]
                return *sums, group.all_gather(inputs[0])

        inputs = [
            given(group.rank, torch.float32, count, i).to(torch_xla.device())
            for i, count in enumerate(counts)
        ]
        function = replay(reduced)
        for _ in range(3):
            *sums, gathered = (out.cpu() for out in function(*inputs))
        right = [
            torch.allclose(out, expected(group.size, torch.float32, count, i))
            for i, (out, count) in enumerate(zip(sums, counts, strict=True))
        ]
        parts = [given(r, torch.float32, counts[0], 0) for r in range(group.size)]
        found[f"independent {seed}"] = all(right) and torch.equal(
            gathered, torch.cat(parts)
        )
    return found


def check_late_ranks(group):
    """Each call's result is the next one's input: an old packet would be seen."""
    share = [(r + 1) / 2 ** (r + 1) for r in range(group.size - 1)]
    share.append(1 - sum(share))

    def steps(x):
        with group.in_order():
            for _ in range(CHAIN):
                x = group.all_reduce(x * share[group.rank]) + 1
            return x

    function = replay(steps)
    found = {}
    for count in (1024, 100_000):
        rng = random.Random(group.rank)
        x = torch.arange(count, dtype=torch.float32).to(torch_xla.device())
        start = x.cpu()
        for _ in range(100):
            if rng.random() < 0.1:
                time.sleep(rng.random() * 0.01)
            x = function(x)
        found[f"late ranks, {count}"] = torch.equal(x.cpu(), start + 100 * CHAIN)
    return found


def us_a_call(group):
    found = {}
    for size in BYTES[3:]:
        if size > peers.most_bytes(group.size):
            continue
        x = torch.zeros(size // 2, dtype=torch.bfloat16, device=torch_xla.device())

        def chain(x):
            with group.in_order():
                for _ in range(CHAIN):
                    x = group.all_reduce(x)
                return x

        function = replay(chain)
        times = []
        for _ in range(4):
            function(x)
            xm.wait_device_ops()
            start = time.perf_counter()
            for _ in range(20):
                function(x)
            xm.wait_device_ops()
            times.append((time.perf_counter() - start) / 20 / CHAIN * 1e6)
        found[f"{size} bytes"] = min(times)
    return found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    dist.init_process_group("gloo")
    group = processes.join(dist.group.WORLD)
    record = {"processes": group.size, "opened": type(group).__name__ == "PeerGroup"}
    checks = {"opened": record["opened"]}
    for check in (
        check_values,
        check_gathers,
        check_norms,
        check_independent,
        check_late_ranks,
    ):
        checks |= check(group)
        dist.barrier()
    record["wrong"] = [name for name, right in checks.items() if not right]
    record["cases"] = len(checks)
    record["us_a_call"] = us_a_call(group)
    store = dist.PrefixStore("by_xla", group._store)
    by_xla = processes.XlaGroup(group.rank, group.size, store)
    record["us_a_call_of_xla"] = us_a_call(by_xla)
    found = [None] * group.size
    dist.all_gather_object(found, record["wrong"])
    record["wrong"] = [f"rank {r}: {name}" for r, w in enumerate(found) for name in w]
    if group.rank == 0:
        args.out.write_text(json.dumps(record, indent=1))
        print(json.dumps(record), flush=True)
    dist.barrier()
    return 1 if record["wrong"] else 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)
