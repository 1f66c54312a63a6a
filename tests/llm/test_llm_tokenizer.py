"""Tests that examples/llm feeds a model the tokens of the prompt and no others,
whatever settings of training tokenizer.json has kept."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

import tokenizer
from checkpoints import LLM, edit_json, tiny_checkpoint
from command import command_error, run_generate
from files import CheckpointError

PLAIN = LLM / "tiny" / "tokenizer.json"
TEXT = "Pip the mouse could not"
PADDING = dict(
    strategy={"Fixed": 32},
    direction="Right",
    pad_to_multiple_of=None,
    pad_id=0,
    pad_type_id=0,
    pad_token="<s>",
)
TRUNCATION = dict(direction="Right", max_length=3, strategy="LongestFirst", stride=0)
NO_BOS = dict(post_processor=None)
EOS_TOO = dict(
    post_processor=dict(
        type="TemplateProcessing",
        single=[
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": "</s>", "type_id": 0}},
        ],
        pair=[{"Sequence": {"id": "A", "type_id": 0}}],
        special_tokens={
            token: {"id": token, "ids": [number], "tokens": [token]}
            for number, token in enumerate(["<s>", "</s>"])
        },
    )
)


def added(number: int, content: str) -> dict:
    flags = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
    return dict(id=number, content=content, special=True, **flags)


def with_settings(folder, **changes):
    """A folder whose tokenizer.json is that of the demo's model, with changes."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(json.loads(PLAIN.read_text())))
    edit_json(folder / "tokenizer.json", **changes)
    return folder


def ids(folder, text=TEXT) -> list[int]:
    return tokenizer.encode(tokenizer.load(folder), text)


# --- Stored settings. ---------------------------------------------------------
plain = Tokenizer.from_file(str(PLAIN))
directions = st.sampled_from(["Left", "Right"])
paddings = st.none() | st.fixed_dictionaries(
    dict(
        strategy=st.sampled_from(["BatchLongest", {"Fixed": 0}, {"Fixed": 50}]),
        direction=directions,
        pad_to_multiple_of=st.none() | st.integers(1, 64),
        pad_id=st.integers(0, 99),
        pad_type_id=st.just(0),
        pad_token=st.just("x"),
    )
)
truncations = st.none() | st.fixed_dictionaries(
    dict(
        direction=directions,
        max_length=st.integers(1, 9),
        strategy=st.sampled_from(["LongestFirst", "OnlyFirst", "OnlySecond"]),
        stride=st.just(0),
    )
)


@settings(max_examples=40)
@given(paddings, truncations, st.none() | st.floats(0, 1), st.text(max_size=60))
def test_no_setting_changes_the_tokens(tmp_path_factory, padding, cut, dropout, text):
    model = json.loads(PLAIN.read_text())["model"] | {"dropout": dropout}
    folder = tmp_path_factory.getbasetemp() / "settings"
    with_settings(folder, padding=padding, truncation=cut, model=model)
    loaded = tokenizer.load(folder)
    expected = plain.encode(text).ids
    assert tokenizer.encode(loaded, text) == expected
    assert loaded.decode(expected) == plain.decode(expected)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(padding=PADDING),
        dict(truncation=TRUNCATION),
        dict(padding=PADDING, truncation=TRUNCATION, **NO_BOS),
        NO_BOS,
        EOS_TOO,
        dict(added_tokens=[added(0, "<s>"), added(1, "</s>"), added(700, "mouse")]),
    ],
)
@pytest.mark.parametrize(
    "config", [{}, {"add_bos_token": False}, {"add_bos_token": True}]
)
def test_tokens_are_those_of_transformers(tmp_path, changes, config):
    folder = with_settings(tmp_path / "model", **changes)
    config |= dict(tokenizer_class="PreTrainedTokenizerFast", bos_token="<s>")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = AutoTokenizer.from_pretrained(folder)
    for text in (TEXT, "", "</s>mouse<s>"):
        assert ids(folder, text) == theirs(text).input_ids


# --- Refused. -----------------------------------------------------------------
@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(model=...), "something else (.*Model missing"),
        (dict(model={"type": "New"}), "something else (.*ModelUntagged"),
        (dict(padding=5), "something else (.*PaddingParams"),
        (
            dict(
                post_processor=EOS_TOO["post_processor"] | {"special_tokens": {}},
            ),
            "something else (",
        ),
    ],
)
def test_broken_settings_are_named(tmp_path, changes, message):
    """The last one makes the library's Rust code panic, once it is used."""
    folder = with_settings(tmp_path / "model", **changes)
    must = f"model: {folder / 'tokenizer.json'} must be a tokenizer, got "
    must += message.replace("(", r"\(")
    with pytest.raises(CheckpointError, match=must):
        tokenizer.load(folder)


def test_texts_that_no_token_stands_for(tmp_path):
    vocab = {"Pip": 0, "a": 1}
    model = dict(type="WordLevel", vocab=vocab, unk_token="<unk>")
    folder = with_settings(tmp_path / "model", model=model, added_tokens=[], **NO_BOS)
    edit_json(folder / "tokenizer.json", pre_tokenizer={"type": "Whitespace"})
    assert ids(folder, "Pip a") == [0, 1]
    with pytest.raises(ValueError, match="text that tokenizer.json takes, got 'Otto'"):
        ids(folder, "Otto")
    with pytest.raises(ValueError, match=r"prompt must be UTF-8, got 'a\\udcff'"):
        ids(folder, "a\udcff")


def test_a_tokenizer_of_another_model(tmp_path):
    """Its tokens are refused where the prompt has them, before weights load."""
    folder = tiny_checkpoint(tmp_path)
    tokens = [added(0, "<s>"), added(1, "</s>"), added(768, "mouse")]
    with_settings(folder, added_tokens=tokens)
    (folder / "model.safetensors").unlink()
    said = command_error("--model", folder, "--prompt", TEXT)
    assert said == (
        "generate: prompt tokens must be in 0..767, got 768 (--prompt "
        f"'{TEXT}'; is tokenizer.json that of this model?)"
    )
    assert "model.safetensors" in command_error("--model", folder, "--prompt", "Pip")


# --- As a user meets them. ----------------------------------------------------
def test_command_line(tmp_path):
    folder = tiny_checkpoint(tmp_path)
    with_settings(folder, padding=PADDING, truncation=TRUNCATION)
    done = run_generate(
        *("--model", folder, "--prompt", TEXT, "--max-new-tokens", 3),
        *("--max-len", 32, "--max-batch", 10**9, "--max-prefill-tokens", 10**9),
    )
    assert done.returncode == 0, done.stderr
    counts = re.search(r"\((\d+) new, (\d+) of prompts", done.stdout)
    assert int(counts[2]) == len(plain.encode(TEXT).ids) == 7
    assert f"\n{TEXT}\033[1m" in done.stdout
