#!/usr/bin/env python3
"""One model over N devices, both ways: right first, then how fast.

    PJRT_DEVICE=GPU benchmarks/several_gpus.py --devices 2 --out FILE [--shape 8b]
                    [--ways sharded ranks] [--only right one many prefill] [--no-one]
                    [--trace]

The ways are docs/several_gpus.md's: tensors of one process that are split over its
devices, and a process a device. The model is that of examples/llm, with weights that
are the same for every N. `right` compares greedy tokens of a small shape with one
device's; then, of --shape: `one` request, `many` of them, more in `wide`, and the
`prefill` of one prompt. Asserts that no byte of a cache is copied or gathered, and
prints, for one device and for N: ms a token with this engine, which waits for each
token before it prepares the next step, and of the step's program alone, as an engine
has it that works ahead; tokens/s of the latter; bytes that a decode step moves between
devices beside those of two all-reduces a layer, and a device's memory. A way that fails
costs the cases that it had not ended. Needs the installed wheel; PJRT_DEVICE=CPU does
it with N devices of the CPU client.
"""

import argparse
import gc
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time

import shapes

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "examples" / "llm"))

LLAMA = dict(
    model_type="llama", max_position_embeddings=16384, rms_norm_eps=1e-5, rope_theta=5e5
)
SHAPES = shapes.LLAMA | {
    "tiny": dict(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=1024,
    ),
}
# Requests, and tokens of each one's prompt.
CASES = {
    "one": (1, 1024),
    "many": (32, 2048),
    "wide": (64, 4096),
    "prefill": (1, 8192),
}
SMALL_CASES = {"one": (1, 32), "many": (4, 64), "wide": (8, 64), "prefill": (1, 256)}
NEW_TOKENS = 32
WAYS = ("sharded", "ranks")
ELEMENT_BYTES = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4}
COLLECTIVE = re.compile(
    r"^\s+(?:ROOT )?%?[\w.-]+ = (?P<type>.*?) "
    r"(?P<op>all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)"
    r"(?:-start)?\(",
    re.MULTILINE,
)
# What stands for them between processes.
CALL = re.compile(
    r" = (?P<type>\S.*?) custom-call\(.*"
    r'custom_call_target="xla_ops\.(?P<op>(?:host|peer)_collective|peer_add_rms_norm)"'
)
# Of its two results one is what every process has already.
HALVED = "peer_add_rms_norm"


def bytes_of(shapes: str) -> int:
    """Bytes of all arrays in the text of an HLO type."""
    total = 0
    for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
        size = ELEMENT_BYTES.get(dtype, 1)
        for dim in filter(None, dims.split(",")):
            size *= int(dim)
        total += size
    return total


def collectives(hlo: str) -> list[tuple[int, str]]:
    """Of a program's collectives, the bytes that each gives on each device, and what it
    is; the largest first."""
    found = [
        (bytes_of(match["type"]) // (1 + (match["op"] == HALVED)), match["op"])
        for pattern in (COLLECTIVE, CALL)
        for match in pattern.finditer(hlo)
    ]
    return sorted(found, reverse=True)


def moved_bytes(hlo: str) -> int:
    """Bytes of what a program's collectives give on each device."""
    return sum(size for size, _ in collectives(hlo))


# ------------------------------------------------------------------ within a child
def make_decoder(config, parallel, max_len, dtype):
    import torch
    import torch_xla

    import weights
    from model import Decoder

    with torch.device("meta"):
        wanted = weights.unpacked(Decoder(config, max_len=1).state_dict())
    parts = {
        name: shapes.weight(
            name, meta.shape, dtype, *part_of(name, meta, config, parallel)
        )
        for name, meta in wanted.items()
    }
    return weights.assemble(
        parts, config, max_len, dtype, torch_xla.device(), "all", parallel
    )


def part_of(name, meta, config, parallel):
    """Rows, and columns where there are any, of this process's part of a weight."""
    import torch

    # As wide as the parts are many, and no wider, in the dimension that does not count.
    rows, parts = torch.arange(meta.shape[0]), parallel.size
    if meta.dim() == 1:
        return (parallel.part_of_weight(name, rows, config),)
    columns = torch.arange(meta.shape[1])
    rows = parallel.part_of_weight(name, rows[:, None].expand(-1, parts), config)
    columns = parallel.part_of_weight(name, columns.expand(parts, -1), config)
    return rows[:, 0], columns[0]


def make_engine(decoder, parallel, case):
    from engine import Engine

    requests, length = case
    return Engine(
        decoder,
        max_len_of(case),
        max_seqs=requests,
        max_prefill_tokens=max(length, 16),
        buckets=[max(length, 16)],  # a program of 80 layers compiles for long
        backend="replay",
        parallel=parallel,
    )


def prompts_of(case, vocabulary):
    import random

    rng = random.Random(7)
    requests, length = case
    return [[rng.randrange(vocabulary) for _ in range(length)] for _ in range(requests)]


def memory():
    import torch_xla
    import torch_xla.core.xla_model as xm

    try:
        return xm.get_memory_info(torch_xla.device()).get("bytes_used")
    except RuntimeError:  # the CPU client knows none
        return None


def max_len_of(case):
    from kv_cache import round_up

    return round_up(case[1] + NEW_TOKENS)


def measure(decoder, config, parallel, case, dtype, dump, trace):
    import hlo

    for path in dump.iterdir():  # of the case before
        if path.is_file():
            path.unlink()
    engine = make_engine(decoder, parallel, case)
    engine.warm_up()
    used = memory()
    prompts = prompts_of(case, config.vocab_size)
    answers = engine.generate(prompts, NEW_TOKENS)
    stats = engine.stats
    programs = hlo.step_programs(
        dump, engine.cache.part_shape, str(dtype).removeprefix("torch.")
    )
    copied = sum(p.cache_copies + p.caches_elsewhere for p in programs)
    assert copied == 0 and stats.cache_bytes_moved == 0, "a cache was copied"
    assert stats.compilations == 0, "a step was compiled again"
    # A decode step is the program of the fewest rows.
    moved = min(
        (collectives((dump / p.name).read_text()) for p in programs),
        key=lambda found: sum(size for size, _ in found),
    )
    moved_bytes = sum(size for size, _ in moved)
    rows = engine.max_seqs
    needed = 2 * config.num_layers * rows * config.hidden_size * dtype.itemsize
    decode = statistics.median(stats.decode_s)
    program, host = program_seconds(engine, prompts)
    kernels = traced(engine, prompts) if trace else None
    return {
        "kernels": kernels,
        "tokens": answers,
        "ms_a_step": decode * 1e3,
        "program_ms": program * 1e3,
        "host_ms": host * 1e3,
        "tokens_per_s": rows / program,
        "prefill_ms": sum(stats.prefill_s) * 1e3,
        "bytes_moved": moved_bytes,
        "largest_moves": moved[:3],
        "of_two_all_reduces_a_layer": (
            moved_bytes / needed if parallel.size > 1 else None
        ),
        "bytes_used": used,
    }


def is_first():
    return int(os.environ.get("RANK", "0")) == 0


def traced(engine, prompts):
    """What each kernel of a decode step takes, on the first device."""
    import device_trace

    steps = 3

    def run():
        return program_seconds(engine, prompts, steps, repeats=1)[0] * 1e3

    if not is_first():  # it has a part in the first one's steps
        return run()
    with tempfile.TemporaryDirectory() as folder:
        return device_trace.kernels(run, steps, folder)


def program_seconds(engine, prompts, steps=30, repeats=3):
    """A decode step's program without the host: steps that do not wait for tokens."""
    import torch_xla.core.xla_model as xm

    from engine import _Sequence
    from kv_cache import blocks_for

    batch = []
    for i, prompt in enumerate(prompts):
        sequence = _Sequence(i, [*prompt, 1], len(prompt), len(prompt) + 1, None)
        sequence.blocks = engine.cache.allocator.take(blocks_for(sequence.max_len))
        sequence.num_cached = len(prompt)
        batch.append(sequence)
    inputs = engine._inputs(batch, [1] * len(batch), engine.max_seqs)
    times = []
    for _ in range(repeats):
        xm.wait_device_ops()
        start = time.perf_counter()
        for _ in range(steps):
            with engine.parallel.step():
                tokens, _ = engine._compiled(inputs)
        host = (time.perf_counter() - start) / steps
        tokens.cpu()
        times.append(((time.perf_counter() - start) / steps, host))
    for sequence in batch:
        engine.cache.allocator.give_back(sequence.blocks)
    return min(times)


def child(args):
    import torch
    import torch_xla.backends

    from config import ModelConfig
    from parallel import OneDevice, Ranks, Sharded

    on_gpu = os.environ["PJRT_DEVICE"] != "CPU"
    torch.set_grad_enabled(False)
    found = {}
    parallel = decoder = None
    made = None  # what `decoder` is
    for name in args.only:
        shape = "tiny" if name == "right" else args.shape
        # In float32 a GPU would multiply in TF32; bf16 is what is timed, as it is.
        precision = "highest" if name == "right" else "default"
        torch_xla.backends.set_mat_mul_precision(precision)
        config = ModelConfig.from_dict(LLAMA | SHAPES[shape])
        dtype = torch.bfloat16 if on_gpu and name != "right" else torch.float32
        cases = SMALL_CASES if shape == "tiny" else CASES
        case = (4, 40) if name == "right" else cases[name]
        if made != (shape, dtype):
            # A process's part is one of this shape; devices are taken once.
            if args.child == "ranks":
                parallel = Ranks(config)
            elif parallel is None:
                is_sharded = args.child == "sharded"
                parallel = Sharded(args.devices, config) if is_sharded else OneDevice()
            of_shape = (cases[n] for n in args.only if n != "right")
            max_len = max(map(max_len_of, [case, *of_shape]))
            decoder = None  # before the next takes its place
            decoder = make_decoder(config, parallel, max_len, dtype)
            made = (shape, dtype)
        found[name] = measure(
            decoder, config, parallel, case, dtype, args.dump, args.trace
        )
        gc.collect()  # the engine and its caches
        if is_first():
            args.out.write_text(json.dumps(found))


# ------------------------------------------------------------------ the parent
def run(way, devices, args, folder):
    out = folder / f"{way}.json"
    command = [sys.executable, __file__, "--child", way, "--devices", str(devices)]
    if way == "ranks":
        torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", str(devices)]
        command[1:1] = torchrun
    command += ["--shape", args.shape, "--out", str(out), "--only", *args.only]
    command += ["--trace"] if args.trace else []
    # torchrun would give each process one thread, to make and move its weights.
    threads = max(1, (os.cpu_count() or 1) // devices)
    env = {"OMP_NUM_THREADS": str(threads), **os.environ}
    if way == "sharded" and env["PJRT_DEVICE"] == "CPU":
        env["CPU_NUM_DEVICES"] = str(devices)
    elif way == "one":
        env["CUDA_VISIBLE_DEVICES"] = env.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    failure = None
    process = subprocess.Popen(command, env=env)
    try:
        if status := process.wait(args.timeout):
            failure = f"exit status {status}"
    except subprocess.TimeoutExpired:
        failure = f"stopped after {args.timeout} s"
        process.terminate()  # torchrun ends its processes then
        process.wait()
    return json.loads(out.read_text()) if out.exists() else {}, failure


def table(record):
    for name, ways in record["cases"].items():
        one = ways.get("one")
        for way, found in ways.items():
            line = f"{name:8} {way:8} {found['ms_a_step']:9.2f} ms a step,"
            line += f" {found['program_ms']:.2f} its program"
            line += f" ({found['host_ms']:.2f} to queue it),"
            line += f" {found['tokens_per_s']:9.1f} tokens/s"
            line += f" {found['prefill_ms']:9.1f} ms of prompts"
            if one and way != "one":
                share = found["program_ms"] / one["program_ms"]
                line += f"  {share:.2f} of one's time,"
                if (moved := found["of_two_all_reduces_a_layer"]) is not None:
                    line += f" {moved:.2f} of the bytes"
            print(line)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", type=int, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--only", nargs="+", default=["right", *CASES])
    parser.add_argument(
        "--no-one", action="store_true", help="where one device is full"
    )
    parser.add_argument("--timeout", type=float, default=1800, help="seconds a way")
    parser.add_argument(
        "--trace", action="store_true", help="note what each kernel takes too"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    unknown = set(args.only) - {"right", *CASES}
    if unknown:
        parser.error(f"argument --only: must be of right, {', '.join(CASES)}")
    os.environ.setdefault("PJRT_DEVICE", "CPU")
    if args.child:
        with tempfile.TemporaryDirectory() as folder:
            args.dump = pathlib.Path(folder)
            flags = f"--xla_dump_to={folder} --xla_dump_hlo_as_text"
            os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
            child(args)
        return 0

    record = {"devices": args.devices, "shape": args.shape, "cases": {}}
    compared, wrong, failed = [], [], []  # ways
    with tempfile.TemporaryDirectory() as folder:
        for way in (() if args.no_one else ("one",)) + tuple(args.ways):
            found, failure = run(
                way, 1 if way == "one" else args.devices, args, pathlib.Path(folder)
            )
            if failure:
                failed.append(f"{way}: {failure}")
            for name, result in found.items():
                tokens = result.pop("tokens")
                if name == "right":
                    compared.append(way)
                    expected = record.setdefault("tokens", tokens)
                    if tokens != expected:
                        wrong.append(way)
                record["cases"].setdefault(name, {})[way] = result
            args.out.write_text(json.dumps(record, indent=1))
    record.pop("tokens", None)
    record["right"] = not wrong if len(compared) > 1 else None
    record["failed"] = failed
    args.out.write_text(json.dumps(record, indent=1))
    table(record)
    if wrong:
        print(f"tokens differ from one device's: {', '.join(wrong)}")
    for line in failed:
        print(f"FAILED: {line}")
    return 1 if wrong or failed else 0


if __name__ == "__main__":
    sys.exit(main())
