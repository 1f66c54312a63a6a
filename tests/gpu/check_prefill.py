#!/usr/bin/env python3
"""Checks builds of attention's library, and times their prefill beside peers.

    check_prefill.py --lib-dir [NAME=]DIR [--lib-dir NAME=DIR ...] [--out results.json]
                     [--quick] [--cpu] [--speed] [--peers DIR]

Needs torch, a GPU, and libxla_ops_attention_cuda.so in each DIR; neither XLA nor the
wheel. Every build runs all cases, so that a change of a kernel can be told from the
build before it in one process. --quick runs a small set, --cpu the CPU libraries.

--speed adds TFLOP/s of bf16, 16k tokens in all, 2048 columns, contiguous and in pages
of 16, beside those of FlashAttention 3 where --peers has fa3.so (vLLM's _vllm_fa3_C) or
a folder fa3_fwd. A card slows while it is busy, so rounds go through all systems, each
a CUDA graph of three calls, and begin with another one each time; the median counts.
Exit status 1 if a case fails.
"""

import argparse
import functools
import importlib
import itertools
import json
import pathlib
import statistics
import sys
import traceback

import torch

import ffi_call
from check_attention_backward import attend

BOUND = {torch.bfloat16: 0.012, torch.float16: 0.002}
PAGE = 16


def offsets(lengths, device):
    sums = torch.tensor([0, *lengths]).cumsum(0)
    return sums.to(torch.int32).to(device)


def prepare(library, query, key, value, starts, **options):
    """Makes flash_attn_varlen's call, and returns it and where it writes `out`.

    Keys and values are [tokens, heads, head_dim], or pages with a `block_table`.
    `splits` 0 lets the library choose.
    """
    tokens, heads, head_dim = query.shape
    table = options.get("block_table")
    paged = table is not None
    kv_heads = key.shape[-2]
    blocks, page = key.shape[:2] if paged else (1, key.shape[0])
    longest = table.shape[1] * page if paged else page
    splits = options.get("splits", 1)
    row = kv_heads * head_dim
    sizes = (tokens, heads, kv_heads, head_dim, len(starts) - 1, longest, splits)
    splits, workspace_bytes = library.plan(sizes, 2)
    device = query.device
    out = torch.full_like(query, torch.nan)
    lse = torch.empty(heads, tokens, device=device)
    workspace = torch.full((workspace_bytes,), 255, dtype=torch.uint8, device=device)
    call = library.call(
        "flash_attn_varlen",
        [
            *(query, key, value, starts, options.get("key_starts")),
            *(options.get("lengths"), table, None, options.get("num_seqs")),
            *(options.get("slopes"), options.get("sinks")),
            *(options.get("k_scale"), options.get("v_scale")),
        ],
        [out, lse, workspace],
        {
            "scale": head_dim**-0.5,
            "window_left": options.get("left", -1),
            "window_right": options.get("right", -1),
            "soft_cap": float(options.get("cap", 0.0)),
            "kv_cache_dtype": "auto" if key.dtype == query.dtype else "fp8_e4m3",
            "paged": paged,
            "num_splits": splits,
            "num_kv_heads": kv_heads,
            "num_blocks": blocks,
            "page_size": page,
            "block_stride": page * row,
            "page_stride": row,
            "head_stride": head_dim,
            "key_offset": 0,
            "value_offset": 0,
            "debug": False,
        },
    )
    return call, out


def in_pages(rows, lengths, page, generator):
    """Rows as shuffled pages, NaN where no token is, and the block table."""
    most = -(-max(lengths) // page) + 2
    count = sum(-(-length // page) for length in lengths) + len(lengths) + 3
    order = torch.randperm(count, generator=generator).tolist()
    table = torch.full((len(lengths), most), -1, dtype=torch.int32)
    pages = [t.new_full((count, page, *t.shape[1:]), torch.nan) for t in rows]
    first = 0
    for seq, length in enumerate(lengths):
        for token in range(0, length, page):
            block = order.pop()
            table[seq, token // page] = block
            size = min(page, length - token)
            for source, target in zip(rows, pages, strict=True):
                target[block, :size] = source[first + token : first + token + size]
        first += length
    return pages, table.to(rows[0].device)


def cases(quick):
    features = [
        {"right": 0},
        {"right": 0, "climbing": True},
        {"right": 0, "deep": True},
        {},
        {"right": 0, "left": 200},
        {"right": 0, "cap": 20.0},
        {"right": 0, "slopes": True},
        {"right": 0, "sinks": True},
        {"left": 77},
        {"right": 0, "splits": 3},
    ]
    head_dims = (64, 128, 256) if quick else (64, 96, 128, 192, 256)
    pages = (0, PAGE) if quick else (0, PAGE, 64)
    dtypes = list(BOUND)[: 1 if quick else 2]
    for head_dim, dtype, page in itertools.product(head_dims, dtypes, pages):
        for heads, given in (
            ((8, 2), features[: 3 if quick else None]),
            ((5, 5), features[:2]),
            # Enough tiles for the larger ones of mma.sync, up to head_dim 128.
            ((64, 16), features[: 1 if quick else None] * (head_dim <= 128)),
        ):
            for options in given:
                case = {"head_dim": head_dim, "dtype": dtype, "page": page}
                yield case | {"heads": heads, "options": options}


def check(library, device, head_dim, dtype, page, heads, options):
    """Compares a ragged batch with a float32 reference; returns error over bound."""
    options = dict(options)
    generator = torch.Generator().manual_seed(head_dim + heads[0])
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    query_lengths, key_lengths = (
        (1, 130, 77, 500, 0, 257),
        (700, 130, 300, 1111, 40, 257),
    )
    query = draw(sum(query_lengths), heads[0], head_dim)
    key, value = (draw(sum(key_lengths), heads[1], head_dim) for _ in "kv")
    if options.pop("climbing", False):
        # The rows' maxima rise along the keys.
        query, key = 4 * query, key * torch.linspace(0.1, 6, len(key))[:, None, None]
    if options.pop("deep", False):
        # The last keys, which come first, are far below all others.
        query[..., 0], key[..., 0] = 256, 0
        end = 0
        for length in key_lengths:
            end += length
            key[end - min(length, 128) : end, :, 0] = -256
    query, key, value = (t.to(dtype).to(device) for t in (query, key, value))
    extra = {}
    if options.pop("slopes", False):
        extra["slopes"] = 0.1 * draw(heads[0]).abs().to(device)
    if options.pop("sinks", False):
        extra["sinks"] = 3 * draw(heads[0]).to(device)
    starts = offsets(query_lengths, device)
    if page:
        (keys, values), table = in_pages((key, value), key_lengths, page, generator)
        lengths = torch.tensor(key_lengths, dtype=torch.int32, device=device)
        place = {"block_table": table, "lengths": lengths}
    else:
        keys, values = key, value
        place = {"key_starts": offsets(key_lengths, device)}
    call, out = prepare(
        library, query, keys, values, starts, **options, **extra, **place
    )
    call()
    parts = zip(
        query.float().split(query_lengths),
        key.float().split(key_lengths),
        value.float().split(key_lengths),
        strict=True,
    )
    wanted = torch.cat(
        [
            attend(
                options, *part, extra.get("sinks"), extra.get("slopes"), torch.float32
            )[0]
            for part in parts
        ]
    )
    error = ((out.float() - wanted).abs().max() / wanted.abs().max()).item()
    assert error < BOUND[dtype], f"error {error:.3g}, bound {BOUND[dtype]}"
    return error / BOUND[dtype]


def run_cases(name, cases, check):
    worst, failures, count = 0.0, [], 0
    for case in cases:
        count += 1
        try:
            worst = max(worst, check(**case))
        except Exception:  # noqa: BLE001, the other cases run
            failures.append(f"{case}: {traceback.format_exc(limit=-1)}")
            print(failures[-1], flush=True)
    print(
        f"{name}: {count} cases, {len(failures)} failures, worst {worst:.2f} of bound"
    )
    return {"cases": count, "failures": failures, "worst_of_bound": worst}


def run_builds(parser, cases, check, speeds):
    """The command line of a check of several builds; ends the process.

    Args:
        parser: has the check's own options.
        cases: (quick) -> keyword arguments of `check`, case by case.
        check: (library, device, **case) -> its error, as a share of the bound.
        speeds: (libraries, the parsed options) -> a list, for --speed.
    """
    parser.add_argument("--lib-dir", action="append", required=True)
    parser.add_argument("--out")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--speed", action="store_true")
    args = parser.parse_args()
    platform, device = ("cpu", "cpu") if args.cpu else ("cuda", "cuda")
    libraries = {}
    for given in args.lib_dir:
        name, _, folder = given.rpartition("=")
        library = ffi_call.Library(folder, "attention", platform)
        libraries[name or f"build {len(libraries)}"] = library
    results = {"torch": torch.__version__, "builds": {}}
    if not args.cpu:
        results["device"] = torch.cuda.get_device_name()
    for name, library in libraries.items():
        checked = functools.partial(check, library, device)
        results["builds"][name] = run_cases(name, cases(args.quick), checked)
    if args.speed:
        results["speed"] = speeds(libraries, args)
    if args.out:
        pathlib.Path(args.out).write_text(json.dumps(results, indent=1))
    sys.exit(any(build["failures"] for build in results["builds"].values()))


class Peers:
    """FlashAttention 3, as far as it is there."""

    def __init__(self, folder):
        self.varlen = self.dense = None
        if folder is None:
            return
        if (folder / "fa3.so").exists():
            torch.ops.load_library(str(folder / "fa3.so"))
            self.varlen = torch.ops._vllm_fa3_C.fwd
        if (folder / "fa3_fwd").exists():
            sys.path.insert(0, str(folder / "fa3_fwd"))
            module = importlib.import_module("fa3_fwd_interface")
            self.dense = module.flash_attn_func

    def fa3(self, query, key, value, starts, tokens, causal, **place):
        """The positions of vLLM 0.26.0's schema."""
        key_starts, lengths = place.get("key_starts"), place.get("lengths")
        return self.varlen(
            *(
                query,
                key,
                value,
                None,
                None,
                None,
                None,
                starts,
                key_starts,
                None,
                None,
            ),
            *(
                lengths,
                tokens,
                tokens,
                place.get("block_table"),
                None,
                None,
                None,
                None,
            ),
            *(
                None,
                None,
                None,
                None,
                query.shape[-1] ** -0.5,
                causal,
                -1,
                -1,
                0.0,
                True,
            ),
            *(None, 0, None, 0, None, 1, 0, None),
        )


def graph_of(call, calls=3):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for i in range(2):
            call(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(calls):
            call(i)
    graph.replay()
    torch.cuda.synchronize()
    return graph, calls


def microseconds(calls, rounds=9, in_graph=3):
    """Of each call, the median of rounds through all of them."""
    graphs = {name: graph_of(call, in_graph) for name, call in calls.items()}
    times = {name: [] for name in calls}
    for turn in range(rounds):
        first = turn % len(graphs)
        names = list(graphs)
        for name in names[first:] + names[:first]:
            graph, count = graphs[name]
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times[name].append(begin.elapsed_time(end) * 1e3 / count)
    return {name: statistics.median(all_of) for name, all_of in times.items()}


def speed(libraries, peers, head_dim, causal, tokens, page):
    batch, heads = 16384 // tokens, 2048 // head_dim
    shape = (2, batch * tokens, heads, head_dim)
    draw = lambda: torch.randn(shape, device="cuda").bfloat16()  # noqa: E731
    queries, keys, values = draw(), draw(), draw()
    starts = offsets([tokens] * batch, "cuda")
    place = {"key_starts": starts}
    calls = {}
    if page:
        count = batch * tokens // page
        order = torch.randperm(count, device="cuda")
        keys, values = (t.view(2, count, page, heads, head_dim) for t in (keys, values))
        lengths = torch.full((batch,), tokens, dtype=torch.int32, device="cuda")
        place = {"block_table": order.view(batch, -1).int(), "lengths": lengths}
    elif peers.dense is not None:
        whole = (batch, tokens, heads, head_dim)
        calls["fa3_fwd"] = lambda i: peers.dense(
            *(t[i % 2].view(whole) for t in (queries, keys, values)), causal=causal
        )
    if peers.varlen is not None:
        calls["fa3"] = lambda i: peers.fa3(
            *(t[i % 2] for t in (queries, keys, values)),
            starts,
            tokens,
            causal,
            **place,
        )
    right = 0 if causal else -1
    for name, library in libraries.items():
        own = [
            prepare(library, *operands, starts, right=right, **place)[0]
            for operands in zip(queries, keys, values, strict=True)
        ]
        calls[name] = lambda i, own=own: own[i % 2]()
    operations = 4 * batch * heads * tokens**2 * head_dim / (2 if causal else 1)
    rates = {k: operations / us / 1e6 for k, us in microseconds(calls).items()}
    case = {"head_dim": head_dim, "causal": causal, "tokens": tokens, "page": page}
    text = " ".join(f"{name} {rate:.1f}" for name, rate in rates.items())
    mask = "causal" if causal else "full"
    print(f"hd{head_dim} {mask} {tokens}{' paged' * bool(page)}: {text}", flush=True)
    return case | {"tflops": rates}


def speeds(libraries, peers):
    for head_dim, causal, tokens in itertools.product(
        (128, 64, 256), (True, False), (4096, 16384, 1024)
    ):
        if causal or tokens > 1024:
            yield speed(libraries, peers, head_dim, causal, tokens, 0)
        if causal and tokens > 1024:
            yield speed(libraries, peers, head_dim, causal, tokens, PAGE)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", type=pathlib.Path)
    run_builds(
        parser,
        cases,
        check,
        lambda libraries, args: list(speeds(libraries, Peers(args.peers))),
    )


if __name__ == "__main__":
    main()
