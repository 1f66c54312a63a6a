#!/usr/bin/env python3
"""Holds fused_qk_norm_rope_and_paged_attention to its two ops, and times both.

    check_one_call.py --lib-dir DIR [--out results.json] [--quick] [--cpu] [--speed]

Needs torch, a GPU, and the libraries of attention and fused_qk_norm_rope_and_cache in
DIR; neither XLA nor the wheel. A case draws a batch, whose sequences may have pages
together, and makes the calls again and again on new rows and caches: results and
caches must be the same to the bit. The kernel for decode starts before the one that
writes has ended, so that a wait that is missing shows as bits that differ.

--speed: microseconds of a projection's product (4096 columns, cuBLAS), then the two
calls or the one; bf16, 32 query and 8 KV heads of 128 where no others are named, pages
of 16; by CUDA graphs of calls with tables of their own, so that no cache holds what
they read. The median of rounds through all.
"""

import argparse
import functools
import itertools
import json
import pathlib
import random
import sys

import torch

import ffi_call
from check_decode import FP8, PAGE, Shuffled
from check_prefill import microseconds, offsets, run_cases

EPS = 1e-5
PAIR = "fused_qk_norm_rope_and_cache"
ONE = "fused_qk_norm_rope_and_paged_attention"


def cases(quick):
    batches = [
        ([1] * 8, [3000, 1, 17, 64, 65, 1, 300, 129]),
        ([1] * 64, [600 - 7 * i for i in range(64)]),
        ([1], [200]),
        ([1], [5000]),
        ([3, 1, 9, 2], [3000, 400, 9, 2]),
        ([1] * 140, [4097, *range(40, 179)]),
    ]
    if not quick:
        batches += [
            ([130, 1, 2, 1, 300], [130, 2000, 17, 400, 900]),
            ([1000], [1000]),
            ([1] * 300, [100 + i for i in range(300)]),
        ]
    heads = [(32, 8, 128), (8, 8, 64), (8, 1, 256), (5, 5, 96)]
    drawn = random.Random(1)
    for batch, given, cache in itertools.product(batches, heads, ("auto", "fp8")):
        yield {
            "batch": batch,
            "heads": given,
            "cache": cache,
            "dtype": drawn.choice([torch.bfloat16] * 3 + [torch.float32]),
            "normed": drawn.random() < 0.5,
            "is_neox": drawn.random() < 0.7,
            "shared": drawn.random() < 0.4,
            "window": drawn.choice([-1, -1, 90]),
            "cap": drawn.choice([0.0, 0.0, 20.0]),
            "sinks": drawn.random() < 0.3,
        }


class Calls:
    """Buffers of a batch, and the calls on them."""

    def __init__(self, libraries, device, batch, heads, cache, dtype, **options):
        new, lengths = batch
        num_heads, kv_heads, head_dim = heads
        self.kind = {"dtype": dtype, "device": device}
        rows = sum(new)
        longest = max(lengths)
        self.qkv = torch.empty(rows, (num_heads + 2 * kv_heads) * head_dim, **self.kind)
        blocks = sum(-(-n // PAGE) for n in lengths) + 3
        stored = dtype if cache == "auto" else torch.uint8
        shape = (2, blocks, PAGE, kv_heads, head_dim)
        self.kv = torch.empty(shape, dtype=stored, device=device)
        int32 = {"dtype": torch.int32, "device": device}
        self.slots = torch.zeros(rows, dtype=torch.int64, device=device)
        self.positions = torch.zeros_like(self.slots)
        width = -(-longest // PAGE) + 2
        self.tables = torch.full((len(new), width), -1, **int32)
        self.lengths = torch.tensor(lengths, **int32)
        self.starts = offsets(new, device)
        count = torch.tensor([len(new)], **int32)
        table = torch.randn(longest, head_dim, **self.kind)
        weights = [None, None]
        if options.get("normed"):
            weights = [torch.randn(head_dim, **self.kind) for _ in "qk"]
        scales = [None, None]
        if cache != "auto":
            scales = [torch.tensor([s], device=device) for s in (0.5, 1.5)]
        sizes = (rows, num_heads, kv_heads, head_dim, len(new), width * PAGE, 0)
        splits, workspace_bytes = libraries["attention"].plan(sizes, 2)
        row = kv_heads * head_dim
        place = {
            "kv_cache_dtype": cache,
            "num_kv_heads": kv_heads,
            "num_blocks": blocks,
            "page_size": PAGE,
            "block_stride": PAGE * row,
            "page_stride": row,
            "head_stride": head_dim,
            "key_offset": 0,
            "value_offset": blocks * PAGE * row,
            "debug": False,
        }
        write = {"num_heads": num_heads, "head_dim": head_dim, "eps": EPS}
        write["is_neox"] = options.get("is_neox", True)
        read = {"scale": head_dim**-0.5, "window_right": 0, "num_splits": splits}
        read |= {"window_left": options.get("window", -1)}
        read |= {"soft_cap": options.get("cap", 0.0)}
        sinks = torch.randn(num_heads, device=device) if options.get("sinks") else None
        prepared = [self.qkv, table, self.positions, self.slots, *weights, *scales]
        query = torch.empty(rows, num_heads, head_dim, **self.kind)
        self.out = torch.empty_like(query)
        lse = torch.empty(num_heads, rows, device=device)
        workspace = torch.full((workspace_bytes,), 255, dtype=torch.uint8).to(device)
        scratch = [lse, workspace]
        batch = (self.starts, None, self.lengths, self.tables, None, count)
        first = libraries[PAIR].call(
            f"{PAIR}_stacked", [*prepared, self.kv], [query, self.kv], place | write
        )
        second = libraries["attention"].call(
            "paged_attention",
            [query, self.kv, self.kv, *batch, None, sinks, *scales],
            [self.out, *scratch],
            place | read | {"paged": True},
        )
        present = [t for i, t in enumerate(batch) if i not in (1, 4)]
        self.one = libraries["attention"].call(
            ONE,
            [*prepared, *present, None, sinks, self.kv],
            [self.out, self.kv, query, *scratch],
            place | write | read,
        )

        def two():
            first()
            second()

        self.two = two

    def lay_out(self, new, lengths, shared, generator):
        """Gives the sequences pages, the first ones of two the same if `shared`: one
        may then read what another writes in the same call."""
        free = torch.randperm(self.kv.shape[1] - 1, generator=generator).tolist()
        slots, positions = [], []
        tables = self.tables.cpu()
        for seq, (count, length) in enumerate(zip(new, lengths, strict=True)):
            for page in range(-(-length // PAGE)):
                tables[seq, page] = free.pop()
            # Not the page that this one writes to itself.
            if shared and seq % 2 and length - count >= PAGE:
                last = (lengths[seq - 1] - 1) // PAGE
                tables[seq, 0] = tables[seq - 1, last]
            for position in range(length - count, length):
                block = int(tables[seq, position // PAGE])
                slots.append(block * PAGE + position % PAGE)
                positions.append(position)
        self.tables.copy_(tables)
        self.slots.copy_(torch.tensor(slots))
        self.positions.copy_(torch.tensor(positions))


def check(libraries, device, batch, heads, cache, dtype, shared, **options):
    calls = Calls(libraries, device, batch, heads, cache, dtype, **options)
    generator = torch.Generator().manual_seed(sum(heads))
    calls.lay_out(*batch, shared, generator)
    cached = torch.randn(calls.kv.shape, device=device)
    cached = cached.to(dtype) if cache == "auto" else cached.to(FP8).view(torch.uint8)
    for turn in range(2 if device == "cpu" else 12):
        rows = torch.randn(calls.qkv.shape, **calls.kind)
        found = []
        for call in (calls.two, calls.one):
            calls.out.fill_(torch.nan)
            calls.kv.copy_(cached)
            # What is computed last before the call is what it reads first.
            torch.mul(rows, 1 + turn, out=calls.qkv)
            call()
            found.append((calls.out.clone(), calls.kv.clone()))
        for name, want, got in zip(("out", "cache"), *found, strict=True):
            same = want.view(torch.uint8) == got.view(torch.uint8)
            assert same.all(), f"{name} of turn {turn}: {(~same).sum()} bytes differ"
        assert not found[0][0].isnan().any()
    return 0.0


def speed_cases():
    for count, length in (
        *((1, 128), (1, 256), (1, 1024), (1, 4096), (8, 256), (8, 1024)),
        *((32, 576), (64, 512), (64, 576), (64, 640), (64, 1520), (256, 576)),
    ):
        yield f"{count} x {length}", count * [length], "auto"
    for count, length in ((1, 256), (64, 576)):
        yield f"{count} x {length}, fp8", count * [length], "fp8"


def speed(libraries, name, lengths, cache, layers=16, rounds=11):
    heads = (32, 8, 128)
    new = [1] * len(lengths)
    weight = torch.randn(4096, 6144, device="cuda").bfloat16() / 64
    hidden = torch.randn(len(lengths), 4096, device="cuda").bfloat16()
    own = []
    for _ in range(layers):
        calls = Calls(libraries, "cuda", (new, lengths), heads, cache, torch.bfloat16)
        calls.kv.random_(0, 56)
        pages = Shuffled(calls.kv.shape[1] - 1)
        calls.tables.copy_(pages.table(lengths, calls.tables.shape[1]))
        calls.positions.copy_(calls.lengths - 1)
        at = (calls.lengths - 1).long()
        blocks = calls.tables[torch.arange(len(lengths), device="cuda"), at // PAGE]
        calls.slots.copy_(blocks * PAGE + at % PAGE)
        own.append(calls)

    def run(which, i):
        calls = own[i % layers]
        torch.mm(hidden, weight, out=calls.qkv)
        if which:
            getattr(calls, which)()

    names = {"product": None, "two": "two", "one": "one"}
    times = microseconds(
        {n: functools.partial(run, which) for n, which in names.items()}, rounds, layers
    )
    text = " ".join(f"{n} {us:.2f}" for n, us in times.items())
    gain = times["two"] - times["one"]
    print(f"{name}: {text}; one call takes {gain:.2f} us less", flush=True)
    return {"case": name, "us": times}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lib-dir", required=True)
    parser.add_argument("--out")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--speed", action="store_true")
    args = parser.parse_args()
    device = "cpu" if args.cpu else "cuda"
    platform = "cpu" if args.cpu else "cuda"
    libraries = {
        op: ffi_call.Library(args.lib_dir, op, platform) for op in ("attention", PAIR)
    }
    results = {"torch": torch.__version__}
    if not args.cpu:
        results["device"] = torch.cuda.get_device_name()
    checked = functools.partial(check, libraries, device)
    results["checks"] = run_cases("one call", cases(args.quick), checked)
    if args.speed:
        results["speed"] = [speed(libraries, *case) for case in speed_cases()]
    if args.out:
        pathlib.Path(args.out).write_text(json.dumps(results, indent=1))
    sys.exit(bool(results["checks"]["failures"]))


if __name__ == "__main__":
    main()
