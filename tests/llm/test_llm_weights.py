"""Tests which tensors examples/llm takes out of a checkpoint: those that transformers
takes, or an error that names the tensor and the file, before anything is read."""

import json
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, Qwen3Config

import weights
from checkpoints import (
    MAX_LEN,
    NEW_TOKENS,
    PROMPTS,
    TINY,
    edit_config,
    edit_json,
    load,
    make_checkpoint,
    make_engine,
    reference,
)
from config import ModelConfig
from files import CheckpointError, CheckpointWarning

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def make(folder, config_class=LlamaConfig, **changes):
    return make_checkpoint(config_class(**TINY | changes), folder)


def edit_weights(folder, file=SINGLE, **changes):
    """Sets tensors of a file (dots of a name as __); `...` takes one out."""
    stored = load_file(folder / file)
    for name, value in changes.items():
        stored[name.replace("__", ".")] = value
    kept = {name: value.clone() for name, value in stored.items()
            if value is not ...}  # fmt: skip
    save_file(kept, folder / file, metadata={"format": "pt"})


def shard(folder, *parts):
    """Splits a checkpoint: the names that begin with parts[i] go into file i, the rest
    into the last. Returns the files' names."""
    stored = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    files, weight_map = [], {}
    for i, part in enumerate([*parts, ""]):
        file = f"model-{i + 1:05}-of-{len(parts) + 1:05}.safetensors"
        chosen = {name: stored.pop(name) for name in list(stored) if part in name}
        save_file(chosen, folder / file, metadata={"format": "pt"})
        files.append(file)
        weight_map |= dict.fromkeys(chosen, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return files


def assert_same_as_transformers(folder, warns=None):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CheckpointWarning)
        answers = make_engine(folder).generate(PROMPTS[:2], NEW_TOKENS)
    assert answers == reference(folder, PROMPTS[:2])
    texts = [str(w.message) for w in caught if w.category is CheckpointWarning]
    assert len(texts) == (warns is not None) and all(warns in t for t in texts), texts
    return answers


@pytest.fixture(autouse=True)
def _fresh():
    """In place of conftest's: what Dynamo compiled stays."""
    torch.manual_seed(0)


# --- Tied embeddings. ---------------------------------------------------------
@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen3Config])
def test_a_stored_head_counts_though_the_config_says_tied(tmp_path, config_class):
    folder = make(tmp_path, config_class, tie_word_embeddings=True)
    tied = assert_same_as_transformers(folder)
    edit_weights(folder, lm_head__weight=torch.randn(TINY["vocab_size"], 32))
    untied = assert_same_as_transformers(folder, warns=f"{HEAD} and {EMBEDDING}")
    assert untied != tied


def test_a_stored_head_that_is_the_embedding_says_nothing(tmp_path):
    folder = make(tmp_path, tie_word_embeddings=True)
    tied = assert_same_as_transformers(folder)
    embedding = load_file(folder / SINGLE)[EMBEDDING]
    edit_weights(folder, lm_head__weight=embedding)
    assert assert_same_as_transformers(folder) == tied
    assert not hasattr(load(folder), "lm_head")


def test_heads_are_compared_as_they_are_computed_with(tmp_path):
    """Stored in other types, and equal in the one that both become."""
    folder = make(tmp_path, tie_word_embeddings=True)
    embedding = load_file(folder / SINGLE)[EMBEDDING]
    edit_weights(
        folder,
        model__embed_tokens__weight=embedding.bfloat16(),
        lm_head__weight=embedding,
    )
    with pytest.warns(CheckpointWarning, match=HEAD):
        assert hasattr(load(folder, torch.float32), "lm_head")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not hasattr(load(folder, torch.bfloat16), "lm_head")


def test_a_tied_embedding_may_be_stored_as_the_head(tmp_path):
    folder = make(tmp_path, tie_word_embeddings=True)
    tied = assert_same_as_transformers(folder)
    embedding = load_file(folder / SINGLE)[EMBEDDING]
    edit_weights(folder, model__embed_tokens__weight=..., lm_head__weight=embedding)
    assert assert_same_as_transformers(folder) == tied


def test_a_tied_head_of_another_shape_is_refused(tmp_path):
    folder = make(tmp_path, tie_word_embeddings=True)
    edit_weights(folder, lm_head__weight=torch.zeros(769, 32))
    message = rf"{HEAD} in .* must have shape \(768, 32\) .* got \(769, 32\)"
    with pytest.raises(CheckpointError, match=message):
        load(folder)


@pytest.mark.parametrize("tied", [True, False])
def test_neither_embedding_nor_head(tmp_path, tied):
    folder = make(tmp_path, tie_word_embeddings=tied)
    gone = dict(model__embed_tokens__weight=..., lm_head__weight=...)
    edit_weights(folder, **gone)
    with pytest.raises(CheckpointError, match=f"missing .*{EMBEDDING}"):
        load(folder)


def test_an_untied_model_needs_its_head(tmp_path):
    folder = make(tmp_path, tie_word_embeddings=True)
    edit_config(folder, tie_word_embeddings=False)
    message = rf"got 1 that are missing \({HEAD}\): .* tie_word_embeddings true into"
    with pytest.raises(CheckpointError, match=message):
        load(folder)
    edit_config(folder, tie_word_embeddings=...)  # false is what Llama has by default
    with pytest.raises(CheckpointError, match=message):
        load(folder)


# --- Several files. -----------------------------------------------------------
@pytest.mark.parametrize("tied", [True, False])
def test_a_stored_head_counts_in_another_file_too(tmp_path, tied):
    folder = make(tmp_path)  # untied
    expected = assert_same_as_transformers(folder)
    edit_config(folder, tie_word_embeddings=tied)
    shard(folder, "lm_head", "mlp")
    warns = HEAD if tied else None
    assert assert_same_as_transformers(folder, warns) == expected


def test_one_file_goes_before_an_index(tmp_path):
    """As in transformers: an index may be left over from before a conversion."""
    folder = make(tmp_path)
    whole = (folder / SINGLE).read_bytes()
    files = shard(folder, "lm_head")
    edit_weights(folder, files[0], lm_head__weight=torch.zeros(768, 32))
    (folder / SINGLE).write_bytes(whole)
    assert_same_as_transformers(folder)
    assert [path.name for path in weights.weight_files(folder)] == [SINGLE]


def test_an_index_may_name_the_wrong_file_of_several(tmp_path):
    """Nothing is unclear about it, and transformers reads it."""
    folder = make(tmp_path)
    files = shard(folder, "lm_head", "mlp")
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    edit_json(folder / INDEX, weight_map=weight_map | {HEAD: files[1]})
    with pytest.raises(CheckpointError, match=f"1 that are missing \\({HEAD}\\)"):
        load(folder)  # no name leads to files[0] now
    weight_map = weight_map | {HEAD: files[1], EMBEDDING: files[0]}
    edit_json(folder / INDEX, weight_map=weight_map)
    assert_same_as_transformers(folder)


def test_missing_files_of_an_index(tmp_path):
    folder = make(tmp_path)
    files = shard(folder, "lm_head", "mlp", "norm")
    (folder / files[1]).unlink()
    message = rf"every file of {INDEX}, got .* without {files[1]} \(1 of 4\)"
    with pytest.raises(CheckpointError, match=message):
        load(folder)
    (folder / files[2]).unlink()
    with pytest.raises(CheckpointError, match=f"without {files[1]}, {files[2]} "):
        load(folder)
    (folder / INDEX).unlink()
    message = f"must hold {SINGLE} or {INDEX}, got .* with .*: download {INDEX}, too"
    with pytest.raises(CheckpointError, match=message):
        load(folder)


@pytest.mark.parametrize(
    "index",
    [
        {},
        {"weight_map": {}},
        {"weight_map": [SINGLE]},
        {"weight_map": {HEAD: None}},
        {"weight_map": {HEAD: "../model.safetensors"}},
        {"weight_map": {HEAD: "/etc/passwd"}},
    ],
)
def test_bad_indexes(tmp_path, index):
    folder = make(tmp_path)
    (folder / SINGLE).unlink()
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"{INDEX} must hold a weight_map"):
        load(folder)


def test_a_weight_in_two_files(tmp_path):
    folder = make(tmp_path)
    expected = assert_same_as_transformers(folder)
    norm = "model.norm.weight"
    files = shard(folder, "lm_head", norm)
    value = load_file(folder / files[1])[norm]
    edit_weights(folder, files[0], model__norm__weight=value)
    assert assert_same_as_transformers(folder) == expected
    edit_weights(folder, files[0], model__norm__weight=value + 1)
    message = f"{norm} must have one value, got two: .*{files[0]} and .*{files[1]}"
    with pytest.raises(CheckpointError, match=message):
        load(folder)


# --- Types. -------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_stored_types_are_converted(tmp_path, dtype):
    folder = make(tmp_path)
    stored = load_file(folder / SINGLE)
    changes = {name.replace(".", "__"): t.to(dtype) for name, t in stored.items()}
    edit_weights(folder, **changes)
    assert_same_as_transformers(folder)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.bool])
def test_types_of_no_weight_are_refused(tmp_path, dtype):
    folder = make(tmp_path)
    edit_weights(folder, model__norm__weight=torch.ones(32).to(dtype))
    message = rf"norm.weight in .*{SINGLE} must have one of the types .* got \w+: quant"
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_weights_too_large_for_float16_are_refused(tmp_path):
    folder = make(tmp_path)
    edit_weights(folder, model__norm__weight=torch.full((32,), 65504.0))
    assert load(folder, torch.float16).model.norm.weight[0] == 65504
    edit_weights(folder, model__norm__weight=torch.full((32,), -7e4))
    message = "norm.weight must be at most 65504 to be float16, got 70000: take bfloat"
    with pytest.raises(CheckpointError, match=message):
        load(folder, torch.float16)
    assert load(folder, torch.bfloat16).model.norm.weight[0] == -70144


# --- Other weights than those of the config. ----------------------------------
@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(num_hidden_layers=2),
            r"the 21 weights of config.json, got 9 that are missing \(model.layers.1",
        ),
        (dict(intermediate_size=64), r"must have shape \(.*64.*\) .* got \(.*48.*\)"),
        (dict(num_key_value_heads=2), r"k_proj.weight in .* \(32, 32\) .* \(16, 32\)"),
        (dict(vocab_size=770), r"shape \(770, 32\) by config.json, got \(768, 32\)"),
        (
            dict(attention_bias=True),
            r"got 4 that are missing \(.*k_proj.bias.*mlp_bias of config.json ask",
        ),
        (
            dict(mlp_bias=True, attention_bias=True),
            r"got 7 that are missing \(.*bias, .* and 3 more\)",
        ),
        (dict(model_type="qwen2"), r"got 3 that are missing \(.*k_proj.bias"),
        (dict(model_type="qwen3"), r"got 2 that are missing \(.*k_norm.weight, .*q_no"),
    ],
)
def test_weights_of_another_model(tmp_path, changes, message):
    folder = make(tmp_path)
    edit_config(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_layers_that_the_config_does_not_have(tmp_path):
    folder = make(tmp_path, num_hidden_layers=2)
    edit_config(folder, num_hidden_layers=1)
    message = r"got 9 that are unknown \(model.layers.1.*, .* and 5 more\)$"
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_biases_that_the_config_does_not_have(tmp_path):
    folder = make(tmp_path, attention_bias=True)
    edit_config(folder, attention_bias=False)
    message = r"got 4 that are unknown \(.*\): attention_bias .* ask for none"
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_quantised_and_headless_checkpoints_are_called_so(tmp_path):
    folder = make(tmp_path)
    stored = load_file(folder / SINGLE)
    edit_weights(
        folder,
        model__layers__0__mlp__up_proj__qweight=torch.zeros(4, 4, dtype=torch.int32),
        model__layers__0__mlp__up_proj__weight=...,
    )
    with pytest.raises(CheckpointError, match="quantised checkpoints are not read"):
        load(folder)
    bare = {k.removeprefix("model."): v for k, v in stored.items() if k != HEAD}
    save_file(bare, folder / SINGLE)
    with pytest.raises(CheckpointError, match="save it with its head"):
        load(folder)


def test_stored_inverse_frequencies_are_no_weights(tmp_path):
    """Old checkpoints have them in every layer; config.json says them again."""
    folder = make(tmp_path)
    expected = assert_same_as_transformers(folder)
    inv_freq = dict.fromkeys(
        [
            "model__layers__0__self_attn__rotary_emb__inv_freq",
            "model__rotary_emb__inv_freq",
        ],
        torch.full((8,), 7.0),
    )
    edit_weights(folder, **inv_freq)
    assert assert_same_as_transformers(folder) == expected


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make(tmp_path_factory.mktemp("tiny"), tie_word_embeddings=False)


@settings(max_examples=40)
@given(st.data())
def test_every_difference_is_found_before_reading_and_named(tiny, data):
    stored = load_file(tiny / SINGLE)
    names = st.sets(st.sampled_from(sorted(stored)), max_size=4)
    gone, reshaped = data.draw(names), data.draw(names)
    extra = data.draw(st.sets(st.text("abc.", min_size=1, max_size=6), max_size=3))
    changed = {}
    for name, tensor in stored.items():
        if name not in gone:
            changed[name] = tensor.reshape(-1)[:1] if name in reshaped else tensor
    changed |= {name: torch.zeros(1) for name in extra}
    reshaped -= gone
    folder = tiny / "changed"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes((tiny / "config.json").read_bytes())
    save_file(changed, folder / SINGLE)
    config = ModelConfig.from_folder(folder)
    if not gone and not extra and not reshaped:
        assert weights.check(folder, config).keys() == stored.keys()
        return
    with pytest.raises(CheckpointError) as info:
        weights.check(folder, config)
    said = str(info.value)
    assert str(folder / SINGLE) in said and "\n" not in said
    if not gone and not extra:
        assert any(f"{name} in " in said for name in reshaped)
        return
    for names, what in ((gone, "missing"), (extra, "unknown")):
        assert (f"{len(names)} that are {what}" in said) == bool(names)
        assert not names or any(name in said for name in names)


def test_the_decoder_holds_what_is_stored(tiny):
    stored = load_file(tiny / SINGLE)
    loaded = weights.unpacked(load(tiny).state_dict())
    assert loaded.keys() == stored.keys()
    assert all(torch.equal(loaded[name], stored[name]) for name in stored)
    assert load(tiny).cos_sin_cache.shape == (MAX_LEN, TINY["head_dim"])
