"""Holds the example's tensor parallelism over two CPU devices to transformers, and what
moves between devices to two all-reduces a layer; likewise over processes."""

import os
import sys

os.environ.setdefault("CPU_NUM_DEVICES", "2")

import pytest
import torch_xla
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from checkpoints import (
    LLM,
    NEW_TOKENS,
    PROMPTS,
    make_checkpoint,
    make_engine,
    reference,
    tiny_checkpoint,
)
from command import command_error, reported, run, run_generate
from config import ModelConfig
from hlo import collectives, inputs_elsewhere, step_programs
from parallel import Sharded
from sampling import Sampling

SIZES = dict(
    vocab_size=98,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    eos_token_id=95,
)
CASES = {
    "llama": LlamaConfig(**SIZES, head_dim=16, tie_word_embeddings=False),
    "llama_biases": LlamaConfig(
        **SIZES,
        head_dim=64,
        tie_word_embeddings=True,
        attention_bias=True,
        mlp_bias=True,
    ),
    "qwen2_odd_vocabulary": Qwen2Config(
        **SIZES | dict(hidden_size=64, vocab_size=97), tie_word_embeddings=True
    ),
    "qwen3": Qwen3Config(**SIZES, head_dim=64, tie_word_embeddings=False),
}


@pytest.mark.parametrize("where", ["host", "peer"])
def test_calls_between_processes_are_collectives(where):
    call = f'custom_call_target="xla_ops.{where}_collective", backend_config='
    hlo = "\n".join(
        f"  %c{i} = f32[8] custom-call(%a, %b), {call}{{gathers = {gathers}}}"
        for i, gathers in enumerate(["true", "false", "false"])
    )
    assert collectives(hlo) == {"all-gather": 1, "all-reduce": 2}


def test_a_sum_that_is_normed_is_an_all_reduce():
    call = 'custom_call_target="xla_ops.peer_add_rms_norm", backend_config={}'
    hlo = f"  %c = (f32[8], f32[8]) custom-call(%a, %b, %r, %w), {call}"
    assert collectives(hlo) == {"all-reduce": 1}
    assert collectives("") == {}


def make_parallel_engine(folder, **options):
    parallel = Sharded(2, ModelConfig.from_folder(folder))
    return make_engine(folder, parallel=parallel, **options)


@pytest.mark.parametrize(
    "name, ops",
    [*((name, "all") for name in CASES), ("qwen3", "attention")],
)
def test_tokens_equal_transformers(name, ops, tmp_path, hlo_dump):
    folder = make_checkpoint(CASES[name], tmp_path)
    before = set(os.listdir(hlo_dump))
    engine = make_parallel_engine(folder, ops=ops, backend="replay")
    assert engine.generate(PROMPTS, NEW_TOKENS) == reference(folder, PROMPTS)
    assert engine.stats.compilations == 0
    programs = [
        program
        for program in step_programs(hlo_dump, engine.cache.part_shape, "float32")
        if program.name not in before
    ]
    assert len(programs) >= len(engine.shapes)
    for program in programs:
        # Two a layer. With an embedding and a head in parts one behind the embedding,
        # and the values and places of each device's largest logits are gathered.
        split = {"all-reduce": 2 * 3 + 1, "all-gather": 2}
        whole = {"all-reduce": 2 * 3}
        assert program.collectives == (whole if "odd" in name else split)
        assert program.cache_copies == program.caches_elsewhere == 0
        text = (hlo_dump / program.name).read_text()
        moved = [line for line in text.splitlines() if " all-gather(" in line]
        assert all(f"[{engine.max_seqs},2]" in line for line in moved), moved


def test_a_device_has_its_part_alone(tmp_path):
    folder = make_checkpoint(CASES["qwen3"], tmp_path)
    engine = make_parallel_engine(folder, backend="replay")
    split = {
        name: torch_xla._XLAC._get_xla_sharding_spec(tensor)
        for name, tensor in (
            *engine.decoder.named_parameters(),
            *((f"cache{i}", t) for i, t in enumerate(engine.cache._tensors())),
        )
        if tensor.dim() > 1
    }
    assert all("devices=[" in spec for spec in split.values()), split


def test_sampling(tmp_path):
    folder = make_checkpoint(CASES["llama"], tmp_path)
    engine = make_parallel_engine(folder, backend="replay")
    likeliest = Sampling(temperature=1.0, top_p=1e-6)
    expected = reference(folder, PROMPTS)
    assert engine.generate(PROMPTS, NEW_TOKENS, likeliest) == expected


def answer(done) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout[done.stdout.index("> ") : done.stdout.index("device:")]


def test_command_line(tmp_path):
    """As one device writes."""
    folder = tiny_checkpoint(
        tmp_path, num_attention_heads=4, num_key_value_heads=4, num_hidden_layers=2
    )
    arguments = ["--model", folder, "--prompt", "One day", "--max-new-tokens", "12"]
    # torch_xla notes in the environment that this process is one of SPMD.
    one = run_generate(*arguments, CPU_NUM_DEVICES="1", XLA_USE_SPMD="0")
    four = run_generate(*arguments, "--tensor-parallel", "4", XLA_USE_SPMD="0")
    assert answer(four) == answer(one)
    report = reported(four.stdout)
    assert report["cache"].endswith(", in 4 parts")
    moves = report["moves between devices"]
    assert moves == "2 all-gather, 5 all-reduce a step"
    copied = report["cache bytes copied per step"]
    assert copied.startswith("0 (optimised HLO of"), copied
    assert "moves between devices" not in reported(one.stdout)


def torchrun(size, *arguments):
    program = [*(sys.executable, "-m", "torch.distributed.run"), "--standalone"]
    return run(
        *(*program, "--nproc_per_node", size, LLM / "generate.py", *arguments),
        XLA_USE_SPMD="0",
        CPU_NUM_DEVICES="1",
    )


@pytest.mark.parametrize(
    "changes, options",
    [
        # One KV head, which both processes have.
        (dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True), ()),
        # Drawn from all logits, of which a process has a part; the likeliest alone.
        (
            dict(num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2),
            ("--temperature", 1, "--top-p", 1e-6),
        ),
    ],
)
def test_processes(changes, options, tmp_path):
    folder = tiny_checkpoint(tmp_path, **changes)
    prompts = ["--prompt", "One day", "--prompt", "Pip the mouse could not"]
    arguments = ["--model", folder, *prompts, "--max-new-tokens", "12"]
    one = run_generate(*arguments, CPU_NUM_DEVICES="1", XLA_USE_SPMD="0")
    two = torchrun(2, *arguments, *options)
    assert answer(two) == answer(one)
    report = reported(two.stdout)
    assert report["cache"].endswith(", of 2 processes one")
    sums = 2 * changes.get("num_hidden_layers", 1) + 1
    moves = report["moves between devices"]
    assert moves == f"1 all-gather, {sums} all-reduce a step"
    assert report["cache bytes copied per step"].startswith("0 (addresses")
    assert report["recompilations after warm-up"] == "0"


def test_processes_refuse(tmp_path):
    two = torchrun(2, "--tensor-parallel", 3)
    assert two.returncode != 0
    said = "argument --tensor-parallel: must be the number of processes, 2, got 3"
    assert said in two.stderr
    two = torchrun(2, "--backend", "openxla")
    assert "--backend: must be replay under torchrun, got openxla" in two.stderr


@pytest.mark.parametrize(
    "size, changes, message",
    [
        (3, {}, "must divide num_attention_heads of config.json, 2, got 3"),
        (2, {}, "must divide num_key_value_heads of config.json, 1, got 2"),
        (
            2,
            dict(num_key_value_heads=2, intermediate_size=49),
            "must divide intermediate_size of config.json, 49, got 2",
        ),
        (
            4,
            dict(num_attention_heads=4, num_key_value_heads=4),
            "must be the number of devices, 2, got 4",
        ),
    ],
)
def test_refused(size, changes, message, tmp_path):
    folder = tiny_checkpoint(tmp_path, **changes)
    error = command_error("--model", folder, "--tensor-parallel", size)
    assert error == f"--tensor-parallel {message}"


def test_inputs_elsewhere_counts():
    """One cache is updated where it lies, the other is not."""
    hlo = """HloModule m, input_output_alias={ {1}: (0, {}, must-alias) }

%fused (p: f32[4,2]) -> f32[4,2] {
  ROOT %p = f32[4,2]{1,0} parameter(0)
}

ENTRY %main (a: f32[4,2], b: f32[4,2], c: s32[4]) -> (f32[4,2], f32[4,2]) {
  %a = f32[4,2]{1,0} parameter(0)
  %b = f32[4,2]{1,0} parameter(1)
  %c = s32[4]{0} parameter(2)
  ROOT %t = (f32[4,2]{1,0}, f32[4,2]{1,0}) tuple(%b, %a)
}
"""
    assert inputs_elsewhere("f32[4,2]", hlo) == 1
    assert inputs_elsewhere("s32[4]", hlo) == 1
    assert inputs_elsewhere("f32[4,2]", hlo.replace("(0, {}", "(1, {}")) == 1
    assert inputs_elsewhere("f32[9,2]", hlo) == 0
