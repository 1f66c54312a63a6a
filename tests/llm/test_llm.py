"""Holds examples/llm to transformers: same checkpoint, same greedy tokens, fp32.

Checkpoints that are refused or odd: test_llm_config.py, test_llm_weights.py.
"""

from pathlib import Path

import pytest
import torch
import torch_xla
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

import weights
from checkpoints import (
    LLM,
    MAX_LEN,
    NEW_TOKENS,
    PROMPTS,
    make_checkpoint,
    make_engine,
    reference,
)
from engine import Engine, prefill_buckets
from hlo import step_programs
from sampling import Sampling

SMALL = dict(
    vocab_size=96,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=256,
    eos_token_id=95,
)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
YARN_ROPE = dict(
    rope_type="yarn",
    rope_theta=10000.0,
    factor=4.0,
    original_max_position_embeddings=32,
)
CASES = {
    "llama_untied": LlamaConfig(**SMALL, tie_word_embeddings=False),
    "llama_tied_mha": LlamaConfig(
        **SMALL | dict(num_key_value_heads=4), tie_word_embeddings=True
    ),
    "llama_biases_theta": LlamaConfig(
        **SMALL,
        attention_bias=True,
        mlp_bias=True,
        rms_norm_eps=1e-5,
        rope_parameters=dict(rope_type="default", rope_theta=500000.0),
    ),
    "llama_llama3_rope": LlamaConfig(**SMALL, rope_parameters=LLAMA3_ROPE),
    "llama_linear_rope": LlamaConfig(
        **SMALL,
        rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=4.0),
    ),
    "llama_yarn_rope": LlamaConfig(
        **SMALL | dict(head_dim=16), rope_parameters=YARN_ROPE
    ),
    "mistral_window": MistralConfig(**SMALL, sliding_window=12),
    "mistral_full_tied": MistralConfig(
        **SMALL | dict(head_dim=16), sliding_window=None, tie_word_embeddings=True
    ),
    "qwen2_tied": Qwen2Config(
        **{k: v for k, v in SMALL.items() if k != "head_dim"} | dict(hidden_size=64),
        tie_word_embeddings=True,
    ),
    "qwen2_window_untied": Qwen2Config(
        **{k: v for k, v in SMALL.items() if k != "head_dim"} | dict(hidden_size=64),
        use_sliding_window=True,
        sliding_window=12,
        max_window_layers=1,
    ),
    "qwen3_tied_mqa": Qwen3Config(
        **SMALL | dict(num_key_value_heads=1), tie_word_embeddings=True
    ),
    "qwen3_untied_bias": Qwen3Config(
        **SMALL | dict(head_dim=128),
        tie_word_embeddings=False,
        attention_bias=True,
        rope_parameters=dict(rope_type="default", rope_theta=1000000.0),
    ),
    "qwen3_window": Qwen3Config(
        **SMALL, use_sliding_window=True, sliding_window=12, max_window_layers=1
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_equal_transformers(name, tmp_path):
    folder = make_checkpoint(CASES[name], tmp_path)
    assert make_engine(folder).generate(PROMPTS, NEW_TOKENS) == reference(
        folder, PROMPTS
    )


@pytest.mark.parametrize(
    "ops, backend",
    [
        *(("attention", "openxla"), ("attention", "xla_ops")),
        *(("all", "xla_ops"), ("all", "replay")),
    ],
)
def test_other_ops_and_backends_write_the_same(ops, backend, tmp_path):
    """The tests above run all ops, by openxla."""
    folder = make_checkpoint(CASES["qwen3_untied_bias"], tmp_path)
    engine = make_engine(folder, ops=ops, backend=backend)
    assert engine.generate(PROMPTS, NEW_TOKENS) == reference(folder, PROMPTS)
    assert engine.stats.cache_bytes_moved == 0


def test_shipped_checkpoint():
    """The demo's own model: bf16 weights, computed in fp32; real text."""
    from tokenizers import Tokenizer

    folder = LLM / "tiny"
    assert sum(f.stat().st_size for f in folder.iterdir()) <= 4_000_000
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = ["The", "One rainy morning,", "Pip the mouse could not"]
    prompts = [tokenizer.encode(text).ids for text in texts]
    engine = make_engine(folder)
    answers = engine.generate(prompts, 60)
    assert answers == reference(folder, prompts, 60)
    words = tokenizer.decode(answers[1]).split()
    corpus = set((LLM / "stories.py").read_text().replace('"', " ").split())
    known = [w for w in words if w.strip('.,!?"') in corpus or w in corpus]
    assert len(known) > 0.8 * len(words), words  # it writes words, not noise


@pytest.fixture(autouse=True)
def _fresh():
    """In place of conftest's: what Dynamo compiled stays, the engine is warm."""
    return


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_checkpoint(CASES["qwen3_tied_mqa"], tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def engine(folder) -> Engine:
    return make_engine(folder)


@pytest.fixture(scope="module")
def expected(folder) -> list[list[int]]:
    return reference(folder, PROMPTS)


def test_sharded_checkpoint(tmp_path, expected):
    folder = make_checkpoint(CASES["qwen3_tied_mqa"], tmp_path, max_shard_size="100KB")
    assert len(weights.weight_files(folder)) > 1
    assert make_engine(folder).generate(PROMPTS, NEW_TOKENS) == expected


def test_nothing_compiles_and_nothing_is_copied_after_warm_up(
    engine, expected, hlo_dump
):
    engine.reset_stats()
    for prompts in (PROMPTS, PROMPTS[:1], PROMPTS[1:3]):
        engine.generate(prompts, NEW_TOKENS)
    assert engine.stats.compilations == 0
    assert engine.stats.cache_bytes_moved == 0
    assert len(engine.stats.decode_s) > NEW_TOKENS
    programs = step_programs(hlo_dump, engine.cache.shape, "float32")
    assert len(programs) >= len(engine.shapes)
    # 2 layers: 4 norms each (q and k too), rotary, two writes, attend, gate; then the
    # last norm.
    for program in programs:
        assert program.cache_copies == 0, program
        assert program.custom_calls == 2 * (4 + 5) + 1, program
    assert engine.generate(PROMPTS, NEW_TOKENS) == expected  # state is clean again
    assert engine.cache.allocator.num_free == engine.cache.allocator.num_blocks


def test_the_counters_count(engine, folder):
    engine.reset_stats()
    other = make_engine(folder, max_seqs=2, max_prefill_tokens=16)
    engine.generate(PROMPTS[:1], 1)
    # Each new shape is traced once and compiled once.
    assert engine.stats.compilations >= 2 * len(other.shapes)
    before = engine.cache.addresses()
    key, value = engine.cache.layers[1]
    engine.cache.layers[1] = (torch.zeros_like(key), value)
    torch_xla.sync(wait=True)
    assert engine.cache.bytes_moved(before) == engine.cache.nbytes_each
    engine.cache.layers[1] = (key, value)


def test_a_small_cache_makes_requests_wait(folder, expected):
    """Room for one long sequence at a time: the others wait for its blocks."""
    engine = make_engine(folder, num_blocks=4)
    assert engine.generate(PROMPTS, NEW_TOKENS) == expected


def test_batch_does_not_change_an_answer(engine, expected):
    assert engine.generate(PROMPTS[::-1], NEW_TOKENS) == expected[::-1]
    assert engine.generate(PROMPTS[2:3], NEW_TOKENS) == expected[2:3]


def test_on_token_sees_every_token(engine, expected):
    seen = [[] for _ in PROMPTS]
    engine.generate(
        PROMPTS, NEW_TOKENS, on_token=lambda index, token: seen[index].append(token)
    )
    assert seen == expected


def test_sampling_is_repeatable_and_follows_the_seed(engine, folder, expected):
    def draw(seed):
        how = Sampling(temperature=1.0, top_p=0.9, seed=seed)
        return engine.generate(PROMPTS, NEW_TOKENS, how)

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    # Whether a prompt goes in at once or in parts makes no difference.
    whole = make_engine(folder, max_prefill_tokens=64)
    how = Sampling(temperature=1.0, top_p=0.9, seed=1)
    assert whole.generate(PROMPTS, NEW_TOKENS, how) == draw(1)
    # A tiny top_p leaves the likeliest token alone: greedy again.
    greedy = Sampling(temperature=1.0, top_p=1e-6)
    assert engine.generate(PROMPTS, NEW_TOKENS, greedy) == expected


@pytest.mark.parametrize(
    "prompts, new_tokens, message",
    [
        ([[]], 1, "prompt must have at least 1 token, got 0"),
        ([[1, 96]], 1, r"prompt tokens must be in 0..95, got 96"),
        ([[1, -1]], 1, r"prompt tokens must be in 0..95, got -1"),
        ([[1]], 0, "max_new_tokens must be at least 1, got 0"),
        ([[1] * 90], 7, "must be at most 96 tokens together, got 90 [+] 7"),
    ],
)
def test_bad_requests(engine, prompts, new_tokens, message):
    with pytest.raises(ValueError, match=message):
        engine.generate(prompts, new_tokens)
    assert engine.cache.allocator.num_free == engine.cache.allocator.num_blocks


@pytest.mark.parametrize("option", ["max_seqs", "max_prefill_tokens", "max_len"])
def test_bad_engine_options(engine, option):
    with pytest.raises(ValueError, match=f"{option} must be at least 1, got 0"):
        Engine(engine.decoder, **dict(max_len=MAX_LEN) | {option: 0})
    with pytest.raises(ValueError, match="max_len must be at most the decoder's 96"):
        Engine(engine.decoder, max_len=97)


def test_prefill_buckets():
    assert prefill_buckets(256) == (16, 64, 256)
    assert prefill_buckets(100) == (16, 64, 100)
    assert prefill_buckets(16) == (16,)
    assert prefill_buckets(1) == (1,)
