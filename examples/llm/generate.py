"""Generates text from several prompts at once: the command line of the example.

SPDX-License-Identifier: Apache-2.0

    python examples/llm/generate.py --prompt "Pip the mouse" --prompt "One day"
    python examples/llm/generate.py --device gpu --model DIR --prompt "..."
    python examples/llm/generate.py --device gpu --tensor-parallel 2 --model DIR
    torchrun --nproc_per_node 2 examples/llm/generate.py --device gpu --model DIR

DIR is a Hugging Face checkpoint folder of a Llama, Mistral, Qwen2 or Qwen3. Without
--model it is the small one beside this file, which train_tiny.py made.
"""

import argparse
import contextlib
import os
import re
import statistics
import tempfile
from pathlib import Path

from files import short
from hlo import Program, dump_flags, step_programs
from options import Parser, errors_as_lines, from_environment, integer, warn

HERE = Path(__file__).resolve().parent
PROMPTS = [
    "One rainy morning,",
    "Pip the mouse could not",
    "In the middle of the night, Hazel the hedgehog heard",
    "Otto the owl and Fern the fox were best friends.",
]
DTYPES = ("float32", "bfloat16", "float16")
OPS = ("all", "attention")
BACKENDS = ("openxla", "xla_ops", "replay")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add(
        "--model",
        default=str(HERE / "tiny"),
        metavar="DIR",
        help="Hugging Face checkpoint folder (default: the small one in the repo)",
    )
    add("--prompt", action="append", metavar="TEXT", help="repeatable")
    add("--max-new-tokens", type=integer(1), default=64, metavar="N")
    add("--device", choices=("cpu", "gpu"), default="cpu")
    add("--dtype", choices=DTYPES, help="default: float32 on cpu, bfloat16 on gpu")
    add(
        "--ops",
        choices=OPS,
        default="all",
        help="custom calls wherever there is one (default), or for the norms and "
        "the attention alone",
    )
    add(
        "--backend",
        choices=BACKENDS,
        help="of torch.compile, or replay, which is without it; default: openxla, with "
        "--tensor-parallel replay",
    )
    add(
        "--tensor-parallel",
        type=integer(1),
        metavar="N",
        help="devices that have a part of the model each (default: 1, or the processes "
        "that torchrun has started)",
    )
    add("--temperature", type=float, default=0.0, help="0: greedy (default)")
    add("--top-p", type=float, metavar="P", help="with a temperature; default: 1")
    add("--seed", type=integer(0), metavar="N", help="with a temperature; default: 0")
    add(
        "--max-batch",
        type=integer(1),
        default=8,
        metavar="N",
        help="sequences that run together (default: 8)",
    )
    add(
        "--max-prefill-tokens",
        type=integer(1),
        default=256,
        metavar="N",
        help="prompt tokens that a step takes at most (default: 256)",
    )
    add(
        "--max-len",
        type=integer(1),
        metavar="N",
        help="tokens a sequence, at most max_position_embeddings of config.json; "
        "default: what is needed",
    )
    add(
        "--num-blocks",
        type=integer(1),
        metavar="N",
        help="cache blocks of 16 tokens; default: enough",
    )
    args = parser.parse_args(argv)
    if not args.model:
        parser.error("argument --model: must name a folder, got ''")
    args.model = Path(os.path.expanduser(args.model))
    num_processes = from_environment("WORLD_SIZE", 1, 1)
    if args.tensor_parallel is None:
        args.tensor_parallel = num_processes
    elif num_processes not in (1, args.tensor_parallel):
        parser.error(
            "argument --tensor-parallel: must be the number of processes, "
            f"{num_processes}, got {args.tensor_parallel}"
        )
    args.rank = from_environment("RANK", -1, 0)  # -1: not one of several
    args.has_ranks = num_processes > 1
    if args.has_ranks and not 0 <= args.rank < num_processes:
        raise ValueError(
            f"RANK must be from 0 to {num_processes - 1} where WORLD_SIZE is "
            f"{num_processes}, got {os.environ.get('RANK', '')!r}: start the processes "
            "by torchrun, or unset WORLD_SIZE"
        )
    if args.has_ranks and args.backend not in (None, "replay"):
        parser.error(
            f"argument --backend: must be replay under torchrun, got {args.backend}"
        )
    if args.backend is None:
        # With openxla, torch_xla copies each sharded cache once a step.
        args.backend = "openxla" if args.tensor_parallel == 1 else "replay"
    return args


def start_xla(device: str, num_devices: int, dump: Path) -> None:
    """Settings that XLA reads once, when torch_xla starts: so before its import."""
    os.environ["PJRT_DEVICE"] = device.upper()
    if num_devices > 1 and device == "cpu":
        os.environ["CPU_NUM_DEVICES"] = str(num_devices)
    elif num_devices > 1:
        # SPMD takes every GPU that it sees.
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = map(str, range(num_devices)) if seen is None else seen.split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(list(names)[:num_devices])
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} {dump_flags(dump)}".strip()


def run(args: argparse.Namespace, dump: Path) -> None:
    # What can be wrong with options and checkpoint is looked at in the order of what
    # it costs to look: small files, then torch, the weights' headers, the device.
    import tokenizer as tokenizers
    from config import ModelConfig

    config = ModelConfig.from_folder(args.model)
    tokenizer = tokenizers.load(args.model)
    texts = args.prompt or PROMPTS
    prompts = [tokenizers.encode(tokenizer, text) for text in texts]

    import torch
    import torch_xla.backends
    from tqdm import tqdm

    import weights
    from engine import Engine
    from kv_cache import round_up
    from parallel import OneDevice, Ranks, Sharded
    from sampling import Sampling

    sampling = Sampling(args.temperature, **sampling_options(args))
    for text, prompt in zip(texts, prompts, strict=True):
        check_prompt(text, prompt, args, config)
    needed = max(map(len, prompts)) + args.max_new_tokens
    prompted = round_up(sum(map(len, prompts)))
    max_len = args.max_len
    if max_len is None:
        max_len = min(config.max_len, round_up(needed))
    dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    sizes = dict(
        max_len=max_len,
        max_seqs=min(args.max_batch, len(prompts)),
        max_prefill_tokens=min(args.max_prefill_tokens, prompted),
        num_blocks=args.num_blocks,
    )
    if args.device == "cpu":
        check_memory(config, **sizes, item_size=getattr(torch, dtype).itemsize)
    weights.check(args.model, config)
    if args.device == "gpu" and dtype == "float32":
        # The default there rounds the inputs of fp32 products to TF32.
        torch_xla.backends.set_mat_mul_precision("highest")

    try:
        parallel = OneDevice()
        if args.has_ranks:
            parallel = Ranks(config)
        elif args.tensor_parallel > 1:
            parallel = Sharded(args.tensor_parallel, config)
        device = torch_xla.device()
    except RuntimeError as error:  # no plugin, no driver, ...: it says what to do
        raise ValueError(error) from error
    name = args.model.resolve().name
    print(f"loading {name} ({config.architecture}, {dtype}) on {device}")
    decoder = weights.load(
        args.model, config, max_len, getattr(torch, dtype), device, args.ops, parallel
    )
    engine = Engine(decoder, backend=args.backend, parallel=parallel, **sizes)
    with tqdm(total=len(engine.shapes), desc="compile ", unit="program") as bar:
        engine.warm_up(lambda tokens: bar.update())
        compile_s = bar.format_dict["elapsed"]
    with tqdm(
        total=len(prompts) * args.max_new_tokens, desc="generate", unit="token"
    ) as bar:
        answers = engine.generate(
            prompts, args.max_new_tokens, sampling, lambda index, token: bar.update()
        )
        bar.total = bar.n  # answers may end early
    print()
    for text, prompt, answer in zip(texts, prompts, answers, strict=True):
        # Decoded together: what a token looks like depends on the one before it.
        whole = tokenizer.decode(prompt + answer)
        start = whole[: len(tokenizer.decode(prompt))]
        print(f"> {text}\n{start}\033[1m{whole[len(start) :]}\033[0m\n")
    programs = step_programs(dump, engine.cache.part_shape, dtype)
    report(engine, device, compile_s, programs)


def sampling_options(args: argparse.Namespace) -> dict:
    """What --top-p and --seed say, where they were given."""
    options = dict(top_p=args.top_p, seed=args.seed)
    given = {name: value for name, value in options.items() if value is not None}
    if args.temperature == 0:
        for name in given:
            option = name.replace("_", "-")
            warn(f"--{option} has no effect without a --temperature above 0")
    return given


def check_prompt(text: str, prompt: list[int], args, config) -> None:
    """Raises a ValueError for a prompt that cannot be continued, and says why."""
    from engine import check_request
    from kv_cache import PAGE_SIZE

    limits = {"max_position_embeddings of config.json": config.max_len}
    if args.max_len is not None:
        if args.max_len > config.max_len:
            raise ValueError(
                f"--max-len must be at most {config.max_len}, max_position_embeddings "
                f"of config.json, got {args.max_len}"
            )
        limits["--max-len"] = args.max_len
    if args.num_blocks is not None:
        limits["--num-blocks"] = args.num_blocks * PAGE_SIZE
    limit = min(limits, key=lambda name: limits[name])
    try:
        check_request(prompt, args.max_new_tokens, config.vocab_size, limits[limit])
    except ValueError as error:
        where = f" (--prompt {short(text)}"
        if len(prompt) + args.max_new_tokens > limits[limit]:
            where += f"; the limit is {limit}"
        elif prompt:
            where += "; is tokenizer.json that of this model?"
        else:
            where += "; the tokenizer adds no token that begins a text"
        raise ValueError(f"{error}{where})") from error


def check_memory(config, max_len, max_seqs, num_blocks, item_size, **_) -> None:
    """Raises a MemoryError for a cache that the machine has no room for: Linux would
    promise the memory, and kill the process when it is used."""
    from kv_cache import blocks_for, cache_bytes

    if num_blocks is None:
        num_blocks = max_seqs * blocks_for(max_len)
    needed = cache_bytes(
        config.num_layers, num_blocks, config.num_kv_heads, config.head_dim, item_size
    )
    needed += 3 * 4 * max_len * config.head_dim  # rotary tables, while they are made
    meminfo = Path("/proc/meminfo").read_text()
    free = 1024 * int(re.findall(r"^MemAvailable: *(\d+) kB", meminfo, re.MULTILINE)[0])
    if needed > free:
        raise MemoryError(
            f"the cache of {num_blocks} blocks must fit into {free / 2**30:.1f} GiB of "
            f"free memory, got {needed / 2**30:.1f} GiB: lower --num-blocks, --max-len "
            "or --max-batch"
        )


def report(engine, device, compile_s: float, programs: list[Program]) -> None:
    device_text, plugin_text = device_and_plugin(device)
    stats, cache = engine.stats, engine.cache
    steps = len(stats.prefill_s) + len(stats.decode_s)
    seconds = sum(stats.prefill_s) + sum(stats.decode_s)
    elsewhere = not cache.addresses()  # where none are told
    in_program = cache.nbytes_each * max(
        p.cache_copies + elsewhere * p.caches_elsewhere for p in programs
    )
    calls = [p.custom_calls for p in programs]
    copied = stats.cache_bytes_moved / steps + in_program

    def ms(times: list[float]) -> str:
        if not times:
            return "no steps"
        return (
            f"{1e3 * statistics.median(times):.2f} ms median of {len(times)} steps, "
            f"{1e3 * max(times):.2f} ms slowest"
        )

    rows = {
        "device": device_text,
        "plugin": plugin_text,
        "tokens/s": f"{stats.new_tokens / seconds:.1f} "
        f"({stats.new_tokens} new, {stats.prompt_tokens} of prompts, {seconds:.2f} s)",
        "prefill step": ms(stats.prefill_s),
        "decode step": ms(stats.decode_s),
        "warm-up": f"{compile_s:.1f} s for {len(engine.shapes)} programs",
        "cache": f"{cache.nbytes} bytes, {cache.num_buffers} buffers",
        "cache bytes copied per step": f"{copied:.0f} ("
        + ("" if elsewhere else f"addresses before and after {steps} steps; ")
        + f"optimised HLO of {len(programs)} programs)",
        "xla_ops custom calls": f"{min(calls)} to {max(calls)} a step",
        "recompilations after warm-up": stats.compilations,
    }
    if engine.parallel.size > 1:
        whole = elsewhere  # of SPMD: one tensor for all devices
        size = engine.parallel.size
        rows["cache"] += f", in {size} parts" if whole else f", of {size} processes one"
        moves = programs[0].collectives
        rows["moves between devices"] = (
            ", ".join(f"{count} {name}" for name, count in sorted(moves.items()))
            + " a step"
        )
    for name, value in rows.items():
        print(f"{name + ':':<30}{value}")


def device_and_plugin(device) -> tuple[str, str]:
    import torch_xla.runtime as xr

    from xla_ops.gpu import discover, driver

    if xr.device_type() == "CPU":
        return f"{device}, CPU, {os.cpu_count()} cores", "torch_xla's own"
    name = driver.query().devices[0].name
    found = discover.describe_plugin(discover.find_plugin())
    return f"{device}, GPU, {name}", f"xla_ops bridge over {found}"


def main(argv: list[str] | None = None) -> None:
    room = "lower --num-blocks, --max-len or --max-batch"
    with (
        errors_as_lines(room),
        tempfile.TemporaryDirectory(prefix="xla_ops_hlo_") as dump,
        contextlib.ExitStack() as stack,
    ):
        args = parse_args(argv)
        start_xla(
            args.device, 1 if args.has_ranks else args.tensor_parallel, Path(dump)
        )
        if args.has_ranks and args.rank > 0:  # the first one speaks for all
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        run(args, Path(dump))


if __name__ == "__main__":
    main()
