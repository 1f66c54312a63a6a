#!/usr/bin/env python3
"""Checks builds of attention's library by decode, and times sequences of all lengths.

    check_decode.py --lib-dir [NAME=]DIR [--lib-dir NAME=DIR ...] [--out results.json]
                    [--quick] [--cpu] [--speed [--only fp8]]

Needs torch, a GPU, and libxla_ops_attention_cuda.so in each DIR; neither XLA nor the
wheel. A case draws a batch of unequal sequences, some empty, compares the result with
a float32 reference, and calls again: the bits must be the same.

--speed: microseconds of bf16, 32 query and 8 KV heads of 128 where no others are named,
pages of 16, by CUDA graphs of calls with tables of their own, so that no cache holds
what they read. Rounds go through all builds; the median counts. With --only
fp8 the cases that have it in their name.
"""

import argparse
import itertools
import random

import torch

from check_attention_backward import attend
from check_prefill import (
    BOUND,
    in_pages,
    microseconds,
    offsets,
    prepare,
    run_builds,
)

PAGE = 16
FP8 = torch.float8_e4m3fn


def batches(quick):
    """(query lengths, KV lengths, further sequences and rows that none has)"""
    drawn = random.Random(1)
    one_long = [3000, 0, 17, 64, 65, 1, 300, 129]
    yield [1] * 8, one_long, 0
    yield [3, 1, 0, 2, 9, 1, 4, 1], one_long, 3
    # Long ones among so many that shapes give one split.
    lengths = [drawn.randrange(200) for _ in range(140)]
    for at, length in ((0, 4097), (67, 20000), (69, 6000)):
        lengths[at] = length
    yield [1] * 140, lengths, 0
    yield [1, 0, 2, 1, 6] * 14, [n + 600 for n in lengths[:70]], 7
    if quick:
        return
    yield [1], [5000], 0
    yield [1], [70], 40
    yield [2, 2, 2], [20000, 30, 30], 0
    for count in (30, 31, 126, 127, 400):
        lengths = [drawn.randrange(200) for _ in range(count)]
        lengths[count // 3] = 4000
        yield [1] * count, lengths, 5 * (count % 2)
    # Prefill beside decode: by two kernels on Hopper.
    yield [130, 1, 2, 1, 300, 1, 0, 1], [130, 2000, 17, 400, 900, 0, 9, 65], 2
    yield [1] * 40 + [200], [50] * 39 + [3000, 250], 0


def cases(quick):
    heads = [(8, 2, 128), (8, 8, 64)]
    dtypes = [torch.bfloat16, FP8]
    features = [{}, {"left": 90}, {"sinks": True, "cap": 20.0}, {"slopes": True}]
    if not quick:
        heads += [(32, 8, 128), (5, 5, 96), (8, 1, 256), (48, 2, 64)]
        dtypes += [torch.float16]
    # 0: what the library chooses.
    for batch, splits in itertools.product(batches(quick), (0, 1, 5)):
        many = len(batch[0]) > 8
        has_long = many and max(batch[1]) > 4096
        if has_long and splits:
            continue
        for kv_dtype, given in itertools.product(dtypes, heads[: 3 if many else None]):
            for page in (PAGE,) if quick or kv_dtype == FP8 else (PAGE, 5, 0):
                plain = many and not has_long
                if plain and (page != PAGE or (kv_dtype == FP8 and splits)):
                    continue
                plain = plain or page != PAGE
                for given_options in features[: 1 if plain else None]:
                    options = given_options | {"splits": splits}
                    yield {
                        "batch": batch,
                        "heads": given,
                        "kv_dtype": kv_dtype,
                        "page": page,
                        "options": options,
                    }


def check(library, device, batch, heads, kv_dtype, page, options):
    """Returns the error over the bound."""
    queries, lengths, padding = batch
    num_heads, kv_heads, head_dim = heads
    dtype = torch.bfloat16 if kv_dtype == FP8 else kv_dtype
    generator = torch.Generator().manual_seed(head_dim + num_heads)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    query = draw(sum(queries) + padding, num_heads, head_dim).to(dtype).to(device)
    rows = [
        draw(sum(lengths), kv_heads, head_dim).to(kv_dtype).to(device) for _ in "kv"
    ]
    extra = dict(options, right=0)
    if extra.pop("slopes", False):
        extra["slopes"] = 0.1 * draw(num_heads).abs().to(device)
    if extra.pop("sinks", False):
        extra["sinks"] = 3 * draw(num_heads).to(device)
    # Padding repeats the last start, and the count leaves it out.
    starts = offsets(queries + [0] * padding, device)
    count = torch.tensor([len(queries)], dtype=torch.int32, device=device)
    used = torch.tensor([*lengths, *[0] * padding], dtype=torch.int32, device=device)
    place = {"num_seqs": count}
    scales = [1.0, 1.0]
    if kv_dtype == FP8:
        scales = [0.5, 1.5]
        names = ("k_scale", "v_scale")
        for name, scale in zip(names, scales, strict=True):
            place[name] = torch.tensor([scale], device=device)
    keys = rows
    if page:
        # Bytes of FP8, which torch does not index everywhere.
        held = [r.float() for r in rows]
        keys, table = in_pages(held, lengths, page, generator)
        keys = [k.to(kv_dtype) for k in keys]
        table = torch.nn.functional.pad(table, (0, 0, 0, padding), value=-1)
        place |= {"block_table": table, "lengths": used}
    else:
        place["key_starts"] = offsets(lengths + [0] * padding, device)
    call, out = prepare(library, query, *keys, starts, **extra, **place)
    call()
    first = out.clone()
    out.fill_(torch.nan)
    call()
    assert torch.equal(first.view(torch.int16), out.view(torch.int16)), "other bits"
    wanted = torch.cat(
        [
            attend(
                extra, *part, extra.get("sinks"), extra.get("slopes"), torch.float32
            )[0]
            for part in zip(
                query[: sum(queries)].float().split(queries),
                (rows[0].float() * scales[0]).split(lengths),
                (rows[1].float() * scales[1]).split(lengths),
                strict=True,
            )
        ]
        + [query.new_zeros(padding, num_heads, head_dim).float()]
    )
    error = ((out.float() - wanted).abs().max() / wanted.abs().max()).item()
    bound = BOUND[dtype]
    assert error < bound, f"error {error:.3g}, bound {bound}"
    return error / bound


def speed_cases():
    """Name: lengths and what differs from the usual."""
    drawn = random.Random(2)
    long = [32768] + 63 * [1024]
    for count, length in ((64, 1024), (64, 4096), (64, 8192), (1, 1024), (1, 4096),
                          (1, 32768), (8, 4096), (32, 1024), (48, 1024)):  # fmt: skip
        yield f"{count} x {length}", count * [length], {}
    yield "16 x 4096, 32/32", 16 * [4096], {"heads": (32, 32, 128)}
    for count, length in ((64, 4096), (1, 512), (1, 1024), (1, 2048), (1, 4096),
                          (8, 1024), (64, 576), (64, 1024)):  # fmt: skip
        yield f"{count} x {length}, fp8", count * [length], {"dtype": FP8}
    # A decode step of benchmarks/vllm_engine.py, and one tile less and more.
    for length in (512, 576, 640):
        yield f"64 x {length}", 64 * [length], {}
    yield "64 x 1520", 64 * [1520], {}
    yield "32k, 63 x 1k", long, {}
    yield "63 x 1k, 32k", long[::-1], {}
    yield "64 x 1520, fp8", 64 * [1520], {"dtype": FP8}
    yield "32k, 63 x 1k, fp8", long, {"dtype": FP8}
    yield "64 x 1520, 8/1", 64 * [1520], {"heads": (8, 1, 128)}
    yield "32k, 63 x 1k, 8/1", long, {"heads": (8, 1, 128)}
    yield "256 x 1532", 256 * [1532], {}
    yield "255 x 1k, 128k", 255 * [1024] + [131072], {}
    uneven = [drawn.randrange(124, 1925) for _ in range(64)]
    yield "64 x 1024 +- 900", uneven, {}
    yield "64 x 1024 +- 100", [drawn.randrange(924, 1125) for _ in range(64)], {}
    yield "32k in a batch of 64", [32768] + 63 * [0], {}
    yield "1k in a batch of 64", [1024] + 63 * [0], {}
    yield "32k, 3 x 1k", [32768] + 3 * [1024], {}
    yield "1000 x 512", 1000 * [512], {}
    # Tables as an engine has them, wide enough for one that is long.
    for count, length in ((64, 128), (64, 1024), (64, 4096), (1000, 512)):
        yield f"{count} x {length}, wide", count * [length], {"width": 2048}
    yield "64 x 1024 +- 900, wide", uneven, {"width": 2048}
    mixed = [drawn.choice((1024, 8192)) for _ in range(64)]
    yield "1k and 8k, 64", mixed, {}


class Shuffled:
    """Pages in random order, and tables that take the next ones around."""

    def __init__(self, pages):
        self.order = torch.randperm(pages, device="cuda").int()
        self.next = 0

    def table(self, lengths, width):
        pages = [-(-length // PAGE) for length in lengths]
        shape = (len(pages), max(width, *pages))
        table = torch.zeros(shape, dtype=torch.int32, device="cuda")
        for row, count in zip(table, pages, strict=True):
            at = torch.arange(self.next, self.next + count, device="cuda")
            row[:count] = self.order[at % len(self.order)]
            self.next += count
        return table


def speed(libraries, name, lengths, more, buffers, rounds=11):
    heads, kv_heads, head_dim = more.get("heads", (32, 8, 128))
    dtype = more.get("dtype", torch.bfloat16)
    row = kv_heads * head_dim * dtype.itemsize
    size = buffers[0].numel() // (PAGE * row) * PAGE * row
    keys, values = (
        b[:size].view(dtype).view(-1, PAGE, kv_heads, head_dim) for b in buffers
    )
    # Enough calls for 200 MB, which no cache holds.
    moved = 2 * row * sum(lengths)
    count = max(4, min(64, -(-200_000_000 // moved)))
    pages = Shuffled(len(keys))
    tables = [pages.table(lengths, more.get("width", 0)) for _ in range(count)]
    query = torch.randn(len(lengths), heads, head_dim, device="cuda").bfloat16()
    used = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    starts = offsets([1] * len(lengths), "cuda")
    calls = {}
    for build, library in libraries.items():
        own = [
            prepare(
                library,
                query,
                keys,
                values,
                starts,
                splits=0,
                right=0,
                lengths=used,
                block_table=table,
            )[0]
            for table in tables
        ]
        calls[build] = lambda i, own=own: own[i % len(own)]()
    times = microseconds(calls, rounds, count)
    text = " ".join(f"{build} {us:.2f}" for build, us in times.items())
    print(f"{name}: {text}; {moved / min(times.values()) / 1e6:.2f} TB/s", flush=True)
    return {"case": name, "us": times, "bytes": moved}


def speeds(libraries, args):
    draw = {"dtype": torch.uint8, "device": "cuda"}
    # Finite in bf16 and in FP8.
    buffers = [torch.randint(56, (1_600_000_000,), **draw) for _ in "kv"]
    chosen = [c for c in speed_cases() if args.only is None or args.only in c[0]]
    return [speed(libraries, *case, buffers=buffers) for case in chosen]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="of --speed: cases whose name has this")
    run_builds(parser, cases, check, speeds)


if __name__ == "__main__":
    main()
