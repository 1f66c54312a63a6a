"""Generates text from several prompts at once: the command line of the example.

SPDX-License-Identifier: Apache-2.0

    python examples/llm/generate.py --prompt "Pip the mouse" --prompt "One day"
    python examples/llm/generate.py --device gpu --model DIR --prompt "..."

DIR is a Hugging Face checkpoint folder of a Llama or Qwen3. Without --model it
is the small one beside this file, which train_tiny.py made.
"""

import argparse
import os
import statistics
import tempfile
from pathlib import Path

from hlo import Program, dump_flags, step_programs

HERE = Path(__file__).resolve().parent
PROMPTS = [
    "One rainy morning,",
    "Pip the mouse could not",
    "In the middle of the night, Hazel the hedgehog heard",
    "Otto the owl and Fern the fox were best friends.",
]
DTYPES = ("float32", "bfloat16", "float16")
OPS = ("all", "attention")
BACKENDS = ("openxla", "xla_ops")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add(
        "--model",
        type=Path,
        default=HERE / "tiny",
        metavar="DIR",
        help="Hugging Face checkpoint folder (default: the small one in the repo)",
    )
    add("--prompt", action="append", metavar="TEXT", help="repeatable")
    add("--max-new-tokens", type=int, default=64, metavar="N")
    add("--device", choices=("cpu", "gpu"), default="cpu")
    add("--dtype", choices=DTYPES, help="default: float32 on cpu, bfloat16 on gpu")
    add(
        "--ops",
        choices=OPS,
        default="all",
        help="custom calls wherever there is one (default), or for the norms and "
        "the attention alone",
    )
    add("--backend", choices=BACKENDS, default="openxla", help="of torch.compile")
    add("--temperature", type=float, default=0.0, help="0: greedy (default)")
    add("--top-p", type=float, default=1.0)
    add("--seed", type=int, default=0)
    add("--max-batch", type=int, default=8, help="sequences that run together")
    add(
        "--max-prefill-tokens",
        type=int,
        metavar="N",
        help="prompt tokens a step; default: all of the prompts', at most 256",
    )
    add(
        "--max-len",
        type=int,
        metavar="N",
        help="tokens a sequence; default: what is needed",
    )
    add(
        "--num-blocks",
        type=int,
        metavar="N",
        help="cache blocks of 16 tokens; default: enough",
    )
    return parser.parse_args(argv)  # fmt: skip


def start_xla(device: str, dump: Path) -> None:
    """Settings that XLA reads once, when torch_xla starts: so before its import."""
    os.environ["PJRT_DEVICE"] = device.upper()
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} {dump_flags(dump)}".strip()


def run(args: argparse.Namespace, dump: Path) -> None:
    import torch
    import torch_xla.backends
    from tokenizers import Tokenizer
    from tqdm import tqdm

    import weights
    from config import ModelConfig
    from engine import Engine
    from kv_cache import round_up
    from sampling import Sampling

    sampling = Sampling(args.temperature, args.top_p, args.seed)
    config = ModelConfig.from_folder(args.model)
    if not (args.model / "tokenizer.json").exists():
        raise FileNotFoundError(
            f"model: folder must hold tokenizer.json, got {args.model}"
        )
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    texts = args.prompt or PROMPTS
    prompts = [tokenizer.encode(text).ids for text in texts]
    needed = max(map(len, prompts)) + args.max_new_tokens
    prompted = sum(map(len, prompts))
    max_len = args.max_len or min(config.max_len, round_up(needed))
    dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    if args.device == "gpu" and dtype == "float32":
        # The default there rounds the inputs of fp32 products to TF32.
        torch_xla.backends.set_mat_mul_precision("highest")

    try:
        device = torch_xla.device()
    except RuntimeError as error:  # no plugin, no driver, ...: it says what to do
        raise SystemExit(f"error: {error}") from error
    print(f"loading {args.model.name} ({config.architecture}, {dtype}) on {device}")
    decoder = weights.load(
        args.model, config, max_len, getattr(torch, dtype), device, args.ops
    )
    engine = Engine(
        decoder,
        max_len=max_len,
        max_seqs=min(args.max_batch, len(prompts)),
        max_prefill_tokens=args.max_prefill_tokens or min(256, round_up(prompted)),
        num_blocks=args.num_blocks,
        backend=args.backend,
    )
    for prompt in prompts:
        engine.check(prompt, args.max_new_tokens)
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
    programs = step_programs(dump, engine.cache.shape, dtype)
    report(engine, device, compile_s, programs)


def report(engine, device, compile_s: float, programs: list[Program]) -> None:
    device_text, plugin_text = device_and_plugin(device)
    stats, cache = engine.stats, engine.cache
    steps = len(stats.prefill_s) + len(stats.decode_s)
    seconds = sum(stats.prefill_s) + sum(stats.decode_s)
    in_program = max(p.cache_copies for p in programs) * cache.nbytes_each
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
        "cache bytes copied per step": f"{copied:.0f} "
        f"(addresses before and after {steps} steps; "
        f"optimised HLO of {len(programs)} programs)",
        "xla_ops custom calls": f"{min(calls)} to {max(calls)} a step",
        "recompilations after warm-up": stats.compilations,
    }
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
    args = parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="xla_ops_hlo_") as dump:
        start_xla(args.device, Path(dump))
        try:
            run(args, Path(dump))
        except (ValueError, FileNotFoundError, MemoryError) as error:
            raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
