#!/usr/bin/env python3
"""Times what the host does for one decode step of a deep model.

    step.py [--layers 32] [--steps 1000] [--out results.json]

The model is examples/llm's decoder with a hidden size so small that the device has next
to nothing to do: 32 layers, 64 cache tensors, 259 weights and tables. `host_ms` is the
time until the step's call returns, when the device may begin; `step_ms` until it has
finished. Both are 20th percentiles, with the medians beside them: other programs on the
machine only ever add to them. A step must trace nothing, compile nothing and move no
cache; the counts say so.
"""

import argparse
import json
import pathlib
import statistics
import sys
import time

import torch
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.runtime as xr

import xla_ops

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1] / "examples" / "llm"))

from config import ModelConfig
from engine import compilations
from kv_cache import PAGE_SIZE, PagedKVCache
from model import Decoder, StepInputs

SEQS, HEAD_DIM, VOCAB = 4, 64, 64
# What a step is run by: lazily, with a sync after the step, or a Dynamo backend.
MODES = ("lazy", "openxla", "xla_ops")


def make_decoder(layers: int, ops: str, device: torch.device) -> Decoder:
    config = ModelConfig.from_dict(
        {
            "model_type": "llama",
            "vocab_size": VOCAB,
            "hidden_size": HEAD_DIM,
            "intermediate_size": HEAD_DIM,
            "num_hidden_layers": layers,
            "num_attention_heads": 1,
            "head_dim": HEAD_DIM,
            "tie_word_embeddings": True,
        }
    )
    decoder = Decoder(config, 2 * PAGE_SIZE, ops).requires_grad_(False)
    for parameter in decoder.parameters():
        parameter.normal_(std=0.1)
    return decoder.eval().to(device)


def make_inputs(device: torch.device) -> StepInputs:
    """Sequence s has one block, s, and decodes its second token."""
    rows = torch.arange(SEQS, dtype=torch.int32)
    inputs = StepInputs(
        token_ids=rows,
        positions=torch.ones(SEQS, dtype=torch.int64),
        slot_mapping=rows.long() * PAGE_SIZE + 1,
        block_tables=rows[:, None],
        context_lens=torch.full((SEQS,), 2, dtype=torch.int32),
        query_start_loc=torch.arange(SEQS + 1, dtype=torch.int32),
        num_seqs=torch.tensor([SEQS], dtype=torch.int32),
        last_token=rows,
    )
    return StepInputs(*(t.to(device) for t in inputs))


@torch.no_grad()
def measure(
    mode: str = "xla_ops", layers: int = 32, steps: int = 1000, ops: str = "all"
) -> dict:
    """Runs `steps` decode steps.

    Args:
        mode: one of MODES.
        layers: of the model, with two cache tensors each.
        steps: after the warm-up.
        ops: "all" or "attention", see examples/llm/layer_ops.py.

    Returns:
        The fields of a row of the table: times in milliseconds, counts over all steps.
    """
    device = torch_xla.device()
    torch.manual_seed(0)
    decoder = make_decoder(layers, ops, device)
    cache = PagedKVCache(layers, SEQS, 1, HEAD_DIM, torch.float32, device)
    inputs = make_inputs(device)
    torch_xla.sync(wait=True)

    def decode(inputs):
        return decoder(inputs, cache.layers).argmax(-1)

    if mode == "lazy":

        def step():
            out = decode(inputs)
            torch_xla.sync()
            return out

    else:
        compiled = torch.compile(decode, backend=mode, fullgraph=True)
        step = lambda: compiled(inputs)  # noqa: E731

    for _ in range(5):
        out = step()
        xm.wait_device_ops()
    before, compiled_before = cache.addresses(), compilations()
    host, whole = [], []
    for _ in range(steps):
        start = time.perf_counter()
        out = step()
        host.append(1e3 * (time.perf_counter() - start))
        xm.wait_device_ops()
        whole.append(1e3 * (time.perf_counter() - start))
        del out
    return {
        "mode": mode,
        "ops": ops,
        "layers": layers,
        "cache_tensors": cache.num_buffers,
        "steps": steps,
        "host_ms": statistics.quantiles(host, n=5)[0],
        "host_ms_median": statistics.median(host),
        "step_ms": statistics.quantiles(whole, n=5)[0],
        "step_ms_median": statistics.median(whole),
        "retraces_and_recompilations": compilations() - compiled_before,
        "cache_bytes_moved": cache.bytes_moved(before),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--ops", nargs="+", default=["all"])
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    rows = []
    print("mode     ops        host ms  (median)  step ms  recompiled  bytes moved")
    for ops in args.ops:
        for mode in args.modes:
            torch._dynamo.reset()
            # A lazy step traces its program anew, which takes long.
            steps = args.steps if mode != "lazy" else max(10, args.steps // 20)
            row = measure(mode, args.layers, steps, ops)
            rows.append(row)
            print(
                f"{mode:8s} {ops:10s} {row['host_ms']:7.2f}"
                f" {row['host_ms_median']:9.2f} {row['step_ms']:8.2f}"
                f" {row['retraces_and_recompilations']:11d}"
                f" {row['cache_bytes_moved']:12d}",
                flush=True,
            )
    if args.out:
        result = {
            "device": xr.device_type(),
            "version": xla_ops.__version__,
            "rows": rows,
        }
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
