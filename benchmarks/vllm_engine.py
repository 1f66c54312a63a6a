#!/usr/bin/env python3
"""vLLM's engine on XLA: right first, then how fast, on one device or several.

    PJRT_DEVICE=GPU benchmarks/vllm_engine.py --out DIR [--shape 8b] [--only PART ...]
        [--tensor-parallel-size 2]

Needs vLLM 0.13.0 (docs/vllm.md) and the installed wheel. Checks that a small random
model gives transformers' greedy tokens, then measures a model of --shape with random
weights, with token ids for prompts and the engine in a process of its own, as vLLM has
it. Writes DIR/vllm_engine.json, a line a part. Every part asserts that nothing was
recompiled and no cache has moved.

Parts: right; load; one (1 request of 128 + 128 tokens, ms a token); first (time to the
first token of a prompt of 4096); r64 and r256 (64 and 256 requests of 512 + 128,
output tokens/s); share (of a decode step of 64 requests that is not the device's);
kernels (ms of each kernel in four steps, from a device trace); long (--steps decode
steps, memory before and after); host (ms of each thing that the host does in a step);
prefill (of 64 requests of 512 tokens that come at once: each step's tokens, those of
its program, and when it was queued and its result there, until all have a token); steps
(ms of the program of a decode step, by the number of sequences); kinds (the engine's
ms of a decode step of 64 requests, by what they ask of the sampler).
"""

import argparse
import json
import os
import pathlib
import random
import statistics
import sys
import tempfile
import time

import device_trace
import shapes

os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
# The engine's process is asked by functions of this file.
os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# And one for the CPU.
SHAPES = shapes.LLAMA | {
    "tiny": dict(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=512,
    ),
}
PARTS = (
    "right",
    "one",
    "first",
    "r64",
    "r256",
    "share",
    "kernels",
    "long",
    "host",
    "prefill",
    "steps",
    "kinds",
)
# Of the part kinds.
KINDS = {
    "greedy": {},
    "temperature": {"temperature": 0.8},
    "top_k": {"temperature": 0.8, "top_k": 20},
    "top_p": {"temperature": 0.8, "top_p": 0.95},
    "penalties": {"repetition_penalty": 1.1, "presence_penalty": 0.5},
    "logit_bias": {"logit_bias": dict.fromkeys(range(10, 60), 0.5)},
    "allowed_token_ids": {"allowed_token_ids": list(range(10, 400))},
    "logprobs": {"logprobs": 5},
}


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--quantization", help="vLLM's, such as fp8")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=100_000, help="of the part long")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    return parser.parse_args()


def counters(worker):
    """In the engine's process: what must not change while a part runs."""
    import torch_xla
    import torch_xla.core.xla_model as xm
    import torch_xla.debug.metrics as met

    xm.wait_device_ops()
    pointer = torch_xla._XLAC._unsafe_buffer_pointer
    return {
        "compiled": met.counter_value("UncachedCompile") or 0,
        "caches": [pointer(cache) for cache in worker.model_runner.caches],
    }


def bytes_used(worker):
    from xla_ops.vllm import memory

    return memory.bytes_used()


def host_bytes(worker):
    """Memory of the worker's process on the host."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def run_steps(worker, count, context, new, repeats):
    """In the engine's process: ms of the program of a step, without a host.

    The step is one of `count` requests that have `context` tokens with the `new` ones.
    """
    import numpy as np
    import torch
    import torch_xla.core.xla_model as xm

    from xla_ops.vllm.step import Step

    runner = worker.model_runner
    size = runner.cache_config.block_size
    needed = context // size + 1
    table = np.arange(count * needed, dtype=np.int32).reshape(count, needed)
    row = np.arange(count, dtype=np.int32)
    positions = np.tile(np.arange(context - new, context, dtype=np.int32), count)
    pages = np.repeat(table, new, 0)[np.arange(count * new), positions // size]
    step = Step(
        np.arange(count * new, dtype=np.int32) % 1000 + 10,
        positions[None],
        None,
        np.arange(count + 1, dtype=np.int32) * new,
        np.full(count, context, np.int32),
        (row + 1) * new - 1,
        [(pages * size + positions % size, table)],
    )
    tokens = next(n for n in runner._buckets if n >= count * new)
    with torch.inference_mode(False), torch.no_grad():
        xm.wait_device_ops()
        start = time.perf_counter()
        for _ in range(repeats):
            _, tokens_of_step, *_ = runner._run(step, tokens, has_adapters=False)
        tokens_of_step.cpu()
        return (time.perf_counter() - start) / repeats * 1e3


def step_ms(worker, count, context):
    """In the engine's process: ms of the program of a decode step."""
    return min(run_steps(worker, count, context, 1, 50) for _ in range(3))


def kernels_of_step(worker, count, context, new, repeats, folder):
    """In the engine's process: each kernel's ms in a step, from a device trace."""
    run_steps(worker, count, context, new, 2)
    return device_trace.kernels(
        lambda: run_steps(worker, count, context, new, repeats), repeats, folder
    )


# What a step of the engine does on the host, by the function that does it; what is
# indented is a part of what is above it. The last two are other threads'.
PHASES = {
    "schedule": "vllm.v1.core.sched.scheduler:Scheduler.schedule",
    "execute": "xla_ops.vllm.runner:XlaModelRunner.execute_model",
    "  prepare": "xla_ops.vllm.runner:XlaModelRunner._prepare_inputs",
    "  program": "xla_ops.vllm.runner:XlaModelRunner._run",
    "    pack": "xla_ops.vllm.step:Layout.pack",
    "    protect": "xla_ops.core.ownership:protect",
    "    run": "xla_ops.programs.replay:run_cached",
    "    adopt": "xla_ops.core.in_place:adopt",
    "sample": "xla_ops.vllm.runner:XlaModelRunner.sample_tokens",
    "wait": "concurrent.futures:Future.result",
    "update": "vllm.v1.core.sched.scheduler:Scheduler.update_from_output",
    "fetch": "xla_ops.vllm.results:AsyncOutput.get_output",
    "encode": "vllm.v1.serial_utils:MsgpackEncoder.encode_into",
}


def time_phases(worker):
    """In the engine's process: starts to time what a step does on the host."""
    import functools
    import importlib

    worker.phases = {name: [] for name in PHASES}

    def timed(function, times):
        @functools.wraps(function)
        def call(*args, **kwargs):
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                times.append(time.perf_counter() - start)

        return call

    for name, place in PHASES.items():
        module, path = place.split(":")
        owner = importlib.import_module(module)
        *parents, function = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        original = getattr(owner, function)
        original = getattr(original, "__wrapped__", original)
        setattr(owner, function, timed(original, worker.phases[name]))


def phases(worker):
    """In the engine's process: ms a step of each phase."""
    steps = len(worker.phases["update"])
    return {name: sum(times) / steps * 1e3 for name, times in worker.phases.items()}


def note_steps(worker):
    """In the engine's process: starts to note each step's tokens and times."""
    import functools

    from xla_ops.vllm.results import AsyncOutput

    worker.steps, worker.fetched = [], []
    run, fetch = worker.model_runner._run, AsyncOutput.synchronize

    @functools.wraps(run)
    def noted_run(step, bucket, *args, **kwargs):
        result = run(step, bucket, *args, **kwargs)
        worker.steps.append((len(step.token_ids), bucket, time.perf_counter()))
        return result

    @functools.wraps(fetch)
    def noted_fetch(output):
        is_first = not output._is_there
        fetch(output)
        if is_first:
            worker.fetched.append(time.perf_counter())

    worker.model_runner._run, AsyncOutput.synchronize = noted_run, noted_fetch


def noted_steps(worker):
    """In the engine's process: (tokens, bucket, when queued, when its result came)."""
    steps = [
        (*step, there)
        for step, there in zip(worker.steps, worker.fetched, strict=False)
    ]
    worker.steps.clear()
    worker.fetched.clear()
    return steps


def ask(llm, function, *args):
    """What the first worker says; all are asked."""
    return llm.collective_rpc(function, args=args)[0]


def random_prompts(count, length, vocab, seed=0):
    rng = random.Random(seed)
    return [
        {"prompt_token_ids": [rng.randrange(10, vocab) for _ in range(length)]}
        for _ in range(count)
    ]


def config(folder, shape, max_len):
    """Writes a Llama configuration; weights are vLLM's dummies."""
    from transformers import LlamaConfig

    made = LlamaConfig(
        **SHAPES[shape],
        max_position_embeddings=max_len,
        architectures=["LlamaForCausalLM"],
        torch_dtype="bfloat16",
        bos_token_id=0,
        eos_token_id=1,
    )
    made.save_pretrained(folder)
    return folder


def generate(llm, prompts, tokens, **asked):
    """Returns seconds and the requests' token ids; `asked` are SamplingParams'."""
    from vllm import SamplingParams

    asked = {"temperature": 0} | asked
    params = SamplingParams(max_tokens=tokens, ignore_eos=True, **asked)
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    return seconds, [list(o.outputs[0].token_ids) for o in outputs]


def check(folder, tensor_parallel_size):
    """Greedy tokens of a small model in float32, against transformers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from vllm import LLM

    config(folder, "tiny", 512)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder)).float()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.normal_(0, 0.15)
    model.save_pretrained(folder)
    llm = LLM(
        model=folder,
        dtype="float32",
        skip_tokenizer_init=True,
        max_model_len=256,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        kv_cache_memory_bytes=64 << 20,
        tensor_parallel_size=tensor_parallel_size,
    )
    prompts = [
        random_prompts(1, 3 + 5 * i, SHAPES["tiny"]["vocab_size"], i)[0]
        for i in range(12)
    ]
    _, tokens = generate(llm, prompts, 40)
    right = 0
    for prompt, got in zip(prompts, tokens, strict=True):
        ids = torch.tensor([prompt["prompt_token_ids"]])
        wanted = model.generate(
            ids, max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        right += wanted[0, ids.shape[1] :].tolist() == got
    stop(llm)
    return {"equal": right, "of": len(prompts)}


def stop(llm):
    import gc

    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()


def measure_one(llm, vocab, lengths=(128, 128)):
    prompts = random_prompts(1, lengths[0], vocab, 1)
    generate(llm, prompts, lengths[1])
    short = min(generate(llm, prompts, 1)[0] for _ in range(3))
    whole = [generate(llm, prompts, lengths[1])[0] for _ in range(3)]
    per_token = [(seconds - short) / (lengths[1] - 1) * 1e3 for seconds in whole]
    return {"ms_per_token": statistics.median(per_token), "all": per_token}


def measure_first(llm, vocab, length):
    seconds = [
        generate(llm, random_prompts(1, length, vocab, 10 + i), 1)[0] for i in range(4)
    ]
    return {"ms": statistics.median(seconds[1:]) * 1e3, "prompt": length}


def measure_many(llm, vocab, count, lengths=(512, 128)):
    rates = []
    for i in range(2):
        prompts = random_prompts(count, lengths[0], vocab, 100 + i)
        seconds, _ = generate(llm, prompts, lengths[1])
        rates.append(count * lengths[1] / seconds)
    return {"output_tokens_per_s": max(rates), "all": rates, "requests": count}


def measure_step(llm, vocab, count, **asked):
    """Engine's ms of a decode step, of requests with 512 to 642 tokens."""
    generate(llm, random_prompts(count, 512, vocab, 7), 2, **asked)
    short = generate(llm, random_prompts(count, 512, vocab, 8), 2, **asked)[0]
    long = generate(llm, random_prompts(count, 512, vocab, 9), 130, **asked)[0]
    return (long - short) / 128 * 1e3


def measure_kinds(llm, vocab, count=64):
    return {
        kind: measure_step(llm, vocab, count, **asked) for kind, asked in KINDS.items()
    }


def measure_share(llm, vocab, count=64):
    """Engine's ms a decode step beside those of the program alone."""
    engine = measure_step(llm, vocab, count)
    program = ask(llm, step_ms, count, 576)
    return {
        "engine_ms": engine,
        "program_ms": program,
        "share": max(0.0, 1 - program / engine),
        "requests": count,
    }


def measure_steps(llm, most, context=576):
    counts = [count for count in (1, 8, 16, 32, 64, 128, 256) if count <= most]
    return {count: ask(llm, step_ms, count, context) for count in counts}


def measure_kernels(llm, most):
    """Steps of 1, 64 and 256 sequences, and of 16 prompts: what their time goes to."""
    steps = {}
    for name, count, context, new in (
        ("decode_1", 1, 256, 1),
        ("decode_64", 64, 576, 1),
        ("decode_256", 256, 576, 1),
        ("prefill_16x512", 16, 512, 512),
    ):
        if count > most:
            continue
        with tempfile.TemporaryDirectory() as folder:
            repeats = 4 if new > 1 else 20
            steps[name] = ask(
                llm, kernels_of_step, count, context, new, repeats, folder
            )
    return steps


def measure_host(llm, vocab):
    """What the host does in a step of 1 and of 64 requests; timing adds to it."""
    found = {}
    for count in (1, 64):
        ask(llm, time_phases)
        seconds, _ = generate(llm, random_prompts(count, 16, vocab, count), 256)
        found[count] = {"step": seconds / 256 * 1e3} | ask(llm, phases)
    return found


def measure_prefill(llm, vocab, count=64, length=512):
    """Each step of `count` prompts that come at once, in ms from when they came."""
    ask(llm, note_steps)
    runs = []
    for i in range(3):
        prompts = random_prompts(count, length, vocab, 300 + i)
        start = time.perf_counter()  # one clock for all processes of a host
        seconds, _ = generate(llm, prompts, 2)
        steps = [
            (tokens, bucket, (queued - start) * 1e3, (there - start) * 1e3)
            for tokens, bucket, queued, there in ask(llm, noted_steps)
        ]
        runs.append({"ms": seconds * 1e3, "steps": steps})
    best = min(runs, key=lambda run: run["ms"])
    used, padded = (sum(step[i] for step in best["steps"]) for i in (0, 1))
    return best | {"tokens": used, "padded_tokens": padded}


def measure_long(llm, vocab, steps):
    """Memory over many decode steps of 8 requests."""
    length = 512
    rounds = max(1, steps // length)
    generate(llm, random_prompts(8, 16, vocab, 3), length)
    used = ask(llm, bytes_used)
    host = [ask(llm, host_bytes)]
    start = time.perf_counter()
    for i in range(rounds):
        generate(llm, random_prompts(8, 16, vocab, i), length)
        if (i + 1) % max(1, rounds // 4) == 0:
            host.append(ask(llm, host_bytes))
    return {
        "steps": rounds * length,
        "seconds": time.perf_counter() - start,
        "bytes_before": used,
        "bytes_after": ask(llm, bytes_used),
        "host_bytes": host,
    }


def main():
    args = parse()
    args.out.mkdir(parents=True, exist_ok=True)
    import torch_xla
    import vllm

    import xla_ops

    record = {
        "vllm": vllm.__version__,
        "torch_xla": torch_xla.__version__,
        "xla_ops": xla_ops.__version__,
        "shape": args.shape,
        "quantization": args.quantization,
        "tensor_parallel_size": args.tensor_parallel_size,
        "parts": {},
    }

    def save(name, result):
        record["parts"][name] = result
        print(f"{name}: {json.dumps(result)[:3000]}", flush=True)
        (args.out / "vllm_engine.json").write_text(json.dumps(record, indent=1))

    with tempfile.TemporaryDirectory() as folder:
        if "right" in args.only:
            result = check(os.path.join(folder, "small"), args.tensor_parallel_size)
            save("right", result)
            if result["equal"] != result["of"]:
                return 1
        if set(args.only) == {"right"}:
            return 0
        vocab = SHAPES[args.shape]["vocab_size"]
        start = time.perf_counter()
        llm = vllm.LLM(
            model=config(os.path.join(folder, "model"), args.shape, 8192),
            dtype="bfloat16",
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=8192,
            enable_prefix_caching=False,
            quantization=args.quantization,
            max_num_seqs=args.max_num_seqs,
            max_num_batched_tokens=args.max_num_batched_tokens,
            gpu_memory_utilization=args.gpu_memory_utilization,
            tensor_parallel_size=args.tensor_parallel_size,
        )
        seconds = time.perf_counter() - start
        save("load", {"seconds": seconds, "bytes": llm.collective_rpc(bytes_used)})
        before = llm.collective_rpc(counters)
        measures = {
            "one": lambda: measure_one(llm, vocab),
            "first": lambda: measure_first(llm, vocab, 4096),
            "r64": lambda: measure_many(llm, vocab, 64),
            "r256": lambda: measure_many(llm, vocab, 256),
            "share": lambda: measure_share(llm, vocab),
            "kernels": lambda: measure_kernels(llm, args.max_num_seqs),
            "host": lambda: measure_host(llm, vocab),
            "long": lambda: measure_long(llm, vocab, args.steps),
            "prefill": lambda: measure_prefill(llm, vocab),
            "steps": lambda: measure_steps(llm, args.max_num_seqs),
            "kinds": lambda: measure_kinds(llm, vocab),
        }
        for name in PARTS[1:]:
            if name not in args.only:
                continue
            save(name, measures[name]())
            after = llm.collective_rpc(counters)
            if after != before:
                print(f"{name}: recompiled or moved: {before} {after}")
                return 1
        stop(llm)
    return 0


if __name__ == "__main__":
    sys.exit(main())
