"""Holds examples/llm to transformers: same checkpoint, same greedy tokens, fp32.

Checkpoints are made here, with random weights everywhere (biases and norms
too, which transformers would leave at 0 and 1), so that each feature of the
two architectures has an effect on what comes out.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch_xla
import torch_xla.runtime as xr
from torch_xla.backends import set_mat_mul_precision
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

LLM = Path(__file__).resolve().parents[2] / "examples" / "llm"
sys.path.insert(0, str(LLM))

import weights  # noqa: E402
from config import ModelConfig  # noqa: E402
from engine import Engine, prefill_buckets  # noqa: E402
from hlo import step_programs  # noqa: E402
from sampling import Sampling  # noqa: E402

MAX_LEN = 96
NEW_TOKENS = 20
# Of different lengths: one token, one page, longer than a prefill step.
PROMPTS = [
    [3],
    [(7 * i + 1) % 96 for i in range(16)],
    [(5 * i + 2) % 96 for i in range(43)],
    [90, 2, 90, 2, 90],
    [(11 * i) % 96 for i in range(20)],
]

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


def make_checkpoint(config, folder: Path, **save_options) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(noise * 0.15 + (parameter.mean() > 0.5))
    model.save_pretrained(folder, **save_options)
    return folder


def make_engine(folder: Path, **options) -> Engine:
    config = ModelConfig.from_folder(folder)
    device = torch_xla.device()
    if xr.device_type() != "CPU":  # where fp32 products are TF32 otherwise
        set_mat_mul_precision("highest")
    ops = options.pop("ops", "all")
    decoder = weights.load(folder, config, MAX_LEN, torch.float32, device, ops)
    defaults = dict(max_len=MAX_LEN, max_seqs=3, max_prefill_tokens=32)
    engine = Engine(decoder, **defaults | options)
    engine.warm_up()
    return engine


def reference(folder: Path, prompts, new_tokens: int = NEW_TOKENS) -> list[list[int]]:
    """Greedy tokens by transformers, one prompt at a time: no padding there."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        answers.append(out[0, len(prompt) :].tolist())
    return answers


@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_equal_transformers(name, tmp_path):
    folder = make_checkpoint(CASES[name], tmp_path)
    assert make_engine(folder).generate(PROMPTS, NEW_TOKENS) == reference(
        folder, PROMPTS
    )


@pytest.mark.parametrize(
    ("ops", "backend"),
    [("attention", "openxla"), ("attention", "xla_ops"), ("all", "xla_ops")],
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


def test_sampling_is_repeatable_and_follows_the_seed(engine, expected):
    def draw(seed):
        how = Sampling(temperature=1.0, top_p=0.9, seed=seed)
        return engine.generate(PROMPTS, NEW_TOKENS, how)

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    # A tiny top_p leaves the likeliest token alone: greedy again.
    greedy = Sampling(temperature=1.0, top_p=1e-6)
    assert engine.generate(PROMPTS, NEW_TOKENS, greedy) == expected


@pytest.mark.parametrize(
    ("prompts", "new_tokens", "message"),
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


# --- Checkpoints that must be refused, or read in another spelling. ----------
def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    raw = json.loads(path.read_text()) | changes
    raw = {k: v for k, v in raw.items() if v is not ...}
    path.write_text(json.dumps(raw))


def test_old_and_new_spelling_of_rope_agree(tmp_path):
    new = make_checkpoint(CASES["llama_llama3_rope"], tmp_path / "new")
    expected = ModelConfig.from_folder(new)
    old = {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_theta"}
    edit_config(new, rope_parameters=..., rope_theta=10000.0, rope_scaling=old)
    assert ModelConfig.from_folder(new) == expected
    assert expected.rope.kind == "llama3" and expected.rope.original_max_len == 32


def test_end_tokens_come_from_generation_config_first(tmp_path):
    folder = make_checkpoint(CASES["llama_untied"], tmp_path)
    (folder / "generation_config.json").write_text('{"eos_token_id": [4, 5]}')
    assert ModelConfig.from_folder(folder).eos_token_ids == {4, 5}
    (folder / "generation_config.json").unlink()
    assert ModelConfig.from_folder(folder).eos_token_ids == {95}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model_type="gpt2"), "model_type must be one of llama, qwen3, got 'gpt2'"),
        (dict(hidden_act="gelu"), "hidden_act must be silu, got 'gelu'"),
        (dict(rope_parameters=dict(rope_type="yarn")), "rope type must be .* 'yarn'"),
        (dict(rope_parameters=..., rope_scaling=dict(type="dynamic")), "'dynamic'"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor must be 1, got 0.5"),
        (dict(quantization_config=dict(bits=4)), "quantization_config must be absent"),
        (dict(hidden_size=...), "hidden_size must be present, got None"),
    ],
)
def test_bad_configs(tmp_path, changes, message):
    folder = make_checkpoint(CASES["llama_untied"], tmp_path)
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_folder(folder)


def load(folder: Path):
    config = ModelConfig.from_folder(folder)
    return weights.load(folder, config, MAX_LEN, torch.float32, torch.device("cpu"))


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="must hold config.json"):
        ModelConfig.from_folder(tmp_path)
    folder = make_checkpoint(CASES["llama_untied"], tmp_path, max_shard_size="50KB")
    gone = weights.weight_files(folder)[1]
    gone.unlink()
    with pytest.raises(FileNotFoundError, match=f"every file .* without {gone.name}"):
        load(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match="must hold model.safetensors or"):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_hidden_layers=1), r"must be known, got model\.layers\.1\."),
        (dict(num_hidden_layers=3), r"without 9 of 30, model\.layers\.2\."),
        (dict(intermediate_size=64), r"must have shape \(.*64.*\), got \(.*80.*\)"),
    ],
)
def test_weights_of_another_model(tmp_path, changes, message):
    folder = make_checkpoint(CASES["llama_untied"], tmp_path)
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        load(folder)
