"""Attention starts from the fused projection wherever vLLM's models hand it over.

Held in the programs of a step, as XLA has optimised them. That answers stay those of
transformers is shown by test_models.py, and what is found when by
tests/vllm/test_find_projection.py.
"""

import os
import re

import pytest

import vllm_session

HLO = vllm_session.FOLDER / "projection_hlo"
# Before XLA starts: vllm_session has taken these out.
os.environ["XLA_FLAGS"] += f" --xla_dump_to={HLO} --xla_dump_hlo_as_text"

from vllm_in_process import caches, engine, generate, greedy  # noqa: E402

TOGETHER = "fused_qk_norm_rope_and_paged_attention"
APART = ("rms_norm", "rotary_embedding", "reshape_and_cache_flash_stacked")
PROMPTS = [[9, 8, 7], [30 + i % 50 for i in range(70)]]


def steps_of(family, **options):
    """How many layers a model has, and its programs of steps, as text."""
    before = set(HLO.glob("*")) if HLO.exists() else set()
    with engine(vllm_session.checkpoint(family), **options) as llm:
        generate(llm, PROMPTS, greedy(3))
        layers = len(caches(llm))
    texts = (f.read_text() for f in set(HLO.glob("*after_optimizations.txt")) - before)
    steps = [t for t in texts if {TOGETHER, "paged_attention"}.intersection(calls(t))]
    assert steps, "no program was dumped"
    return layers, steps


def calls(program):
    return re.findall(r'custom_call_target="xla_ops\.(\w+)"', program)


def slices(program):
    """Parts of rows of floats."""
    return re.findall(r" = (?:f32|bf16)\[\d+,\d+\]\S* slice\(", program)


@pytest.mark.parametrize(
    "family, options",
    [
        ("llama", {}),
        ("llama", {"kv_cache_dtype": "fp8"}),
        ("llama", {"dtype": "bfloat16"}),
        ("qwen2", {}),  # a bias
        ("qwen3", {}),  # norms of heads
        ("gpt_oss", {}),  # sinks, windows, two KV groups
    ],
)
def test_one_call(family, options):
    layers, steps = steps_of(family, **options)
    for program in steps:
        found = calls(program)
        assert found.count(TOGETHER) == layers
        for name in APART:
            assert found.count(name) == (name == "rms_norm")  # before the first layer
        assert not slices(program)


def test_norms_of_another_kind():
    """Gemma 3's add one to their weights."""
    layers, steps = steps_of("gemma3")
    for program in steps:
        found = calls(program)
        assert found.count(TOGETHER) == 0
        assert found.count("rotary_embedding") == layers
        assert found.count("reshape_and_cache_flash_stacked") == layers
        assert slices(program)
