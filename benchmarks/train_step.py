#!/usr/bin/env python3
"""Forward and backward of a training step: right first, then tokens a second.

    train_step.py --out FILE [--shape 1b] [--tokens 16384] [--length 4096]
                  [--systems xla compile-cudnn ...] [--torch-env NAME=VALUE ...]

The model is that of examples/llm in bf16, with weights that are the same for every
system, on packed sequences of --length tokens; a step is its loss and the gradients of
all weights, without an optimizer. Systems, each a process of its own:

  xla            examples/llm/training.py's loss on XLA tensors, a lazy step
  xla-replay     the same, traced once and replayed (xla_ops.programs.replay)
  xla-reference  the same, but XLA's own sums, rotary embedding and activations
  compile-cudnn  plain torch on CUDA tensors by torch.compile, SDPA by cuDNN
  compile-flash  the same, SDPA by FlashAttention 2
  compile-ours   training.py's loss on CUDA tensors by torch.compile

Those by torch.compile may need another environment than torch_xla: --torch-env
PYTHONPATH=DIR sets a variable for them. Loss, each gradient's norm and a sample of its
elements are compared between systems; exit status 1 where they differ by more than
the roundings of bf16 explain, or a system fails. On a machine without a GPU
--device cpu runs the same on the CPU with --shape tiny.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import shapes

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "examples" / "llm"))

LLAMA = dict(model_type="llama", rms_norm_eps=1e-5, rope_theta=5e5)
SHAPES = {
    "1b": shapes.LLAMA["1b"],
    "8b": shapes.LLAMA["8b"],
    "tiny": dict(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=512,
        tie_word_embeddings=True,
    ),
}
SYSTEMS = (
    "xla",
    "xla-replay",
    "xla-reference",
    "compile-cudnn",
    "compile-flash",
    "compile-ours",
)
SAMPLE = 4096  # elements of each gradient that are compared


# ------------------------------------------------------------------ within a child
def make_decoder(config, length: int, ops: str):
    import torch

    from model import Decoder

    with torch.device("meta"):
        decoder = Decoder(config, length, ops)
    drawn = {
        name: shapes.weight(name, meta.shape, torch.bfloat16)
        for name, meta in decoder.state_dict().items()
    }
    decoder.load_state_dict(drawn, assign=True)
    return decoder.requires_grad_(True)


def make_batch(config, tokens: int, length: int):
    import torch

    from training import pack

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (tokens,), generator=generator)
    rows = [row.tolist() for row in ids.split(length)]
    return pack(rows, tokens, len(rows))


def plain_loss(decoder, batch, length: int):
    """The decoder's loss on sequences of one length, in torch's own operations."""
    import torch
    import torch.nn.functional as F

    config = decoder.config
    embedding = decoder.model.embed_tokens.weight
    cos, sin = decoder.cos_sin_cache[:length].chunk(2, dim=-1)

    def norm(x, module):
        return F.rms_norm(x, (config.hidden_size,), module.weight, module.eps)

    def heads(x):
        return x.unflatten(-1, (-1, config.head_dim)).transpose(1, 2)

    def rotate(x):
        first, second = x.float().chunk(2, dim=-1)
        pair = (first * cos - second * sin, second * cos + first * sin)
        return torch.cat(pair, dim=-1).to(x.dtype)

    x = F.embedding(batch.token_ids.view(-1, length), embedding)
    for layer in decoder.model.layers:
        attention = layer.self_attn
        h = norm(x, layer.input_layernorm)
        query, key = rotate(heads(attention.q_proj(h))), heads(attention.k_proj(h))
        out = F.scaled_dot_product_attention(
            query,
            rotate(key),
            heads(attention.v_proj(h)),
            is_causal=True,
            enable_gqa=True,
        )
        x = x + attention.o_proj(out.transpose(1, 2).flatten(2))
        h = norm(x, layer.post_attention_layernorm)
        gate, up = layer.mlp.gate_up_proj(h).chunk(2, dim=-1)
        x = x + layer.mlp.down_proj(F.silu(gate) * up)
    logits = F.linear(norm(x, decoder.model.norm), embedding).float()
    return F.cross_entropy(logits.flatten(0, 1), batch.labels)


def found_values(loss, decoder) -> dict:
    """What is compared: the loss, norms of gradients, a sample of their elements."""
    values: dict = {"loss": loss.item(), "norms": {}, "samples": {}}
    for name, parameter in decoder.named_parameters():
        grad = parameter.grad.cpu().float().flatten()
        values["norms"][name] = grad.norm().item()
        values["samples"][name] = grad[:: max(1, grad.numel() // SAMPLE)].tolist()
    return values


def timed(step, wait, steps: int) -> list[float]:
    """Seconds a step, of runs of `steps` between which is waited."""
    samples = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(steps):
            step()
        wait()
        samples.append((time.perf_counter() - start) / steps)
    return samples


def child(args: argparse.Namespace) -> dict:
    import torch

    from config import ModelConfig

    config = ModelConfig.from_dict(
        LLAMA | SHAPES[args.shape] | {"max_position_embeddings": args.length}
    )
    ops = "attention" if args.child == "xla-reference" else "all"
    batch = make_batch(config, args.tokens, args.length)
    decoder = make_decoder(config, args.length, ops)
    if ops == "attention":  # what it multiplies by the table must stay bf16
        decoder.cos_sin_cache = decoder.cos_sin_cache.bfloat16()
    measure = measure_xla if args.child.startswith("xla") else measure_torch
    start = time.perf_counter()
    found = measure(args, torch, decoder, batch)
    return found | {"seconds_in_all": time.perf_counter() - start}


def measure_xla(args, torch, decoder, batch) -> dict:
    from training import loss_of, start_xla

    device = start_xla(args.device)
    import torch_xla
    import torch_xla.core.xla_model as xm

    from xla_ops.programs.replay import replay

    decoder, batch = decoder.to(device), batch.to(device)

    def step():
        decoder.zero_grad()
        loss = loss_of(decoder, batch)
        loss.backward()
        torch_xla.sync()
        return loss

    parameters = list(decoder.parameters())

    def gradients(batch):
        with torch.enable_grad():
            loss = loss_of(decoder, batch)
            return loss.detach(), *torch.autograd.grad(loss, parameters)

    program = replay(gradients, state=[decoder])

    def replayed():
        with torch.no_grad():
            loss, *grads = program(batch)
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
        return loss

    if args.child == "xla-replay":
        step = replayed
    start = time.perf_counter()
    values = found_values(step(), decoder)
    first = time.perf_counter() - start
    step()
    xm.wait_device_ops()
    seconds = timed(step, xm.wait_device_ops, args.steps)
    found = {"seconds": seconds, "first_step_s": first, "values": values}
    if args.trace:
        import device_trace

        def traced():
            return timed(step, xm.wait_device_ops, 1)[-1] * 1e3

        with tempfile.TemporaryDirectory() as folder:
            found["trace"] = device_trace.kernels(traced, 3, folder)
    with contextlib.suppress(RuntimeError):  # the CPU client knows none
        found["memory"] = xm.get_memory_info(device)
    return found | {"torch": torch.__version__}


def measure_torch(args, torch, decoder, batch) -> dict:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from training import loss_of

    device = "cuda" if args.device == "gpu" else "cpu"
    decoder, batch = decoder.to(device), batch.to(device)
    kernel: Callable = contextlib.nullcontext
    if args.child == "compile-ours":
        compiled = torch.compile(lambda: loss_of(decoder, batch))
    else:
        cudnn = args.child == "compile-cudnn"
        if device == "cuda":
            backend = (
                SDPBackend.CUDNN_ATTENTION if cudnn else SDPBackend.FLASH_ATTENTION
            )
            kernel = functools.partial(sdpa_kernel, backend)
        compiled = torch.compile(lambda: plain_loss(decoder, batch, args.length))
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def step():
        decoder.zero_grad()
        with kernel():
            loss = compiled()
            loss.backward()
        return loss

    start = time.perf_counter()
    values = found_values(step(), decoder)
    first = time.perf_counter() - start
    step()
    wait()
    seconds = timed(step, wait, args.steps)
    found = {"seconds": seconds, "first_step_s": first, "values": values}
    if device == "cuda":
        found["memory"] = {"peak_bytes": torch.cuda.max_memory_allocated()}
    return found | {"torch": torch.__version__}


# ------------------------------------------------------------------ the parent
def difference(a: dict, b: dict) -> dict:
    """The largest differences of two systems' values, relative."""
    loss = _relative(a["loss"] - b["loss"], b["loss"])
    norms = [_relative(a["norms"][n] - v, v) for n, v in b["norms"].items()]
    samples = []
    for name, theirs in b["samples"].items():
        ours = a["samples"][name]
        size = math.hypot(*theirs)
        off = math.hypot(*(u - v for u, v in zip(ours, theirs, strict=True)))
        samples.append(_relative(off, size))
    return {"loss": loss, "norms": max(norms), "samples": max(samples)}


def _relative(off: float, size: float) -> float:
    """Infinite where either is no number: no bound may hold then."""
    if not (math.isfinite(off) and math.isfinite(size)):
        return math.inf
    return abs(off / size) if size else float(off != 0)


# Relative, of loss, norms and samples. bf16 rounds each activation by 2^-9, the systems
# at different places; plain torch by cuDNN and by FlashAttention differ as much.
BOUNDS = {"loss": 2e-3, "norms": 3e-2, "samples": 0.15}


def run(system: str, args: argparse.Namespace, folder: pathlib.Path) -> dict:
    out = folder / f"{system}.json"
    env = dict(os.environ, PYTHONDONTWRITEBYTECODE="1")
    if system.startswith("compile"):
        for setting in args.torch_env:
            name, _, value = setting.partition("=")
            env[name] = value
    command = [sys.executable, __file__, "--child", system, "--out", str(out)]
    for option in ("shape", "tokens", "length", "steps", "device"):
        command += [f"--{option}", str(getattr(args, option))]
    if args.trace:
        command.append("--trace")
    try:
        subprocess.run(command, env=env, check=True, timeout=args.timeout)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        return {"failed": f"{type(error).__name__}: {str(error)[-300:]}"}
    return json.loads(out.read_text())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="gpu")
    parser.add_argument("--torch-env", nargs="+", default=[], metavar="NAME=VALUE")
    parser.add_argument("--trace", action="store_true", help="kernels of XLA's steps")
    parser.add_argument("--timeout", type=float, default=600, help="seconds a system")
    parser.add_argument("--child", choices=SYSTEMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.tokens % args.length:
        parser.error("argument --tokens: must be a multiple of --length")
    if args.child:
        args.out.write_text(json.dumps(child(args)))
        return 0

    record: dict = {
        "command": " ".join(["train_step.py", *sys.argv[1:]]),
        "systems": {},
    }
    values: dict = {}
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        for system in args.systems:
            found = run(system, args, pathlib.Path(folder))
            if "failed" in found:
                failed.append(f"{system}: {found['failed']}")
            else:
                values[system] = found.pop("values")
                found["loss"] = values[system]["loss"]
                found["tokens_per_s"] = args.tokens / statistics.median(
                    found["seconds"]
                )
            record["systems"][system] = found
            args.out.write_text(json.dumps(record, indent=1) + "\n")
    first = next(iter(values), None)
    for system, theirs in values.items():
        found = record["systems"][system]
        line = f"{system:14} {found['tokens_per_s']:10.0f} tokens/s"
        line += f" {args.tokens / found['tokens_per_s'] * 1e3:9.1f} ms a step"
        line += f"  first step {found['first_step_s']:.0f} s"
        if system != first:
            off = difference(values[first], theirs)
            found["difference"] = off
            ratio = record["systems"][first]["tokens_per_s"] / found["tokens_per_s"]
            line += f"  {first} is {ratio:.2f} as fast; off "
            line += ", ".join(f"{name} {value:.1e}" for name, value in off.items())
            if any(off[name] > bound for name, bound in BOUNDS.items()):
                failed.append(f"{system}: values differ from {first}'s: {off}")
        print(line)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    for line in failed:
        print(f"FAILED: {line}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
