"""Tests the options of examples/llm's command line: each value is followed or refused,
0 is never "not given", and an answer comes before anything expensive."""

import argparse
import re
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

import generate
import options
from checkpoints import (
    MAX_LEN,
    edit_json,
    load,
    make_engine,
    reference,
    tiny_checkpoint,
)
from command import command_error, run_generate
from engine import Engine
from files import CheckpointWarning


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint whose weights are not there: nothing may look for them."""
    folder = tiny_checkpoint(tmp_path_factory.mktemp("model"))
    (folder / "model.safetensors").unlink()
    return folder


def refused(folder, *arguments) -> str:
    return command_error("--model", folder, *arguments)


# --- Numbers. -----------------------------------------------------------------
INTEGERS = {
    "--max-new-tokens": 1,
    "--max-batch": 1,
    "--max-prefill-tokens": 1,
    "--max-len": 1,
    "--num-blocks": 1,
    "--seed": 0,
}


@pytest.mark.parametrize("value", ["-1", "1.5", "", "x", "1e3", "nan", "9" * 5000])
@pytest.mark.parametrize("option", INTEGERS)
def test_integers(option, value):
    said = command_error(f"{option}={value}")
    assert said.startswith(
        f"argument {option}: must be an integer of at least {INTEGERS[option]}, "
        f"got '{value[:40]}'"
    )


@pytest.mark.parametrize("option", [o for o, least in INTEGERS.items() if least])
def test_zero_is_a_value(option):
    assert f"argument {option}: must be an integer of at least 1, got '0'" in (
        command_error(option, "0")
    )


@given(st.text(max_size=8) | st.integers().map(str), st.integers(0, 1))
def test_an_integer_is_one_or_the_type_says_so(text, least):
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value >= least:
        assert options.integer(least)(text) == value
        return
    with pytest.raises(argparse.ArgumentTypeError) as info:
        options.integer(least)(text)
    assert f"of at least {least}, got {text!r}" in str(info.value)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--temperature", "-0.1"], "temperature must be finite and .* 0, got -0.1"),
        (["--temperature", "nan"], "temperature must be finite and .* 0, got nan"),
        (["--temperature", "inf"], "temperature must be finite and .* 0, got inf"),
        (["--temperature", "x"], "argument --temperature: invalid float value: 'x'"),
        (["--top-p", "0"], r"sampling: top_p must be in \(0, 1\], got 0.0"),
        (["--top-p", "1.01"], r"sampling: top_p must be in \(0, 1\], got 1.01"),
        (["--seed", str(2**64)], "sampling: seed must be in .* got 1844674407370955"),
        (["--max-len", "257"], "--max-len must be at most 256, max_position_embedd"),
        (["--max-len", "9"], "at most 9 tokens .*; the limit is --max-len"),
        (["--num-blocks", "1"], "at most 16 tokens .*; the limit is --num-blocks"),
        (
            ["--max-new-tokens", "2000"],
            "max_new_tokens must be at most 256 tokens together, got 6 [+] 2000 .*; "
            "the limit is max_position_embeddings of config.json",
        ),
        (["--max-new-tokens", "9" * 30], "must be at most 256 tokens together"),
    ],
)
def test_values_that_are_refused(folder, arguments, message):
    assert re.search(message, refused(folder, *arguments))


def test_a_cache_larger_than_the_memory(folder):
    """Refused by its size: asking for it would end the process, or the machine's
    other ones."""
    said = refused(folder, "--num-blocks", 10**12)
    assert "the cache of 1000000000000 blocks must fit into" in said
    assert "GiB: lower --num-blocks, --max-len or --max-batch" in said


def test_the_device_may_have_less_memory(folder, monkeypatch):
    def run(args, dump):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while 1.5G\nmore")

    monkeypatch.setattr(generate, "run", run)
    said = refused(folder)
    assert (
        "got RESOURCE_EXHAUSTED: Out of memory while 1.5G: lower --num-blocks" in said
    )


def test_other_errors_of_the_runtime_keep_their_traceback(folder, monkeypatch):
    def run(args, dump):
        raise RuntimeError("INTERNAL: a bug")

    monkeypatch.setattr(generate, "run", run)
    with pytest.raises(RuntimeError, match="a bug"):
        command_error("--model", folder)


@pytest.mark.parametrize(
    "name, value",
    [("WORLD_SIZE", "x"), ("WORLD_SIZE", "0"), ("RANK", "x"), ("RANK", "-1")],
)
def test_what_a_launcher_sets_is_looked_at(folder, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert re.fullmatch(
        f"{name} must be an integer of at least ., got '{value}'", refused(folder)
    )


@pytest.mark.parametrize("rank", [None, "", "2"])
def test_a_process_without_a_place_among_several(folder, monkeypatch, rank):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    assert refused(folder) == (
        f"RANK must be from 0 to 1 where WORLD_SIZE is 2, got {rank or ''!r}: start "
        "the processes by torchrun, or unset WORLD_SIZE"
    )


def test_a_rank_left_over_by_another_job_does_not_silence(folder, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(generate, "run", lambda args, dump: print("heard"))
    generate.main(["--model", str(folder)])
    assert capsys.readouterr().out == "heard\n"


# --- Prompts. -----------------------------------------------------------------
def test_an_empty_prompt_needs_a_tokenizer_that_begins_it(tmp_path):
    folder = tiny_checkpoint(tmp_path)
    (folder / "model.safetensors").unlink()
    assert "model.safetensors" in refused(folder, "--prompt", "")  # <s> is a token
    edit_json(folder / "tokenizer.json", post_processor=None)
    for prompts in (["--prompt", ""], ["--prompt", "Pip", "--prompt="]):
        assert refused(folder, *prompts) == (
            "generate: prompt must have at least 1 token, got 0 (--prompt ''; the "
            "tokenizer adds no token that begins a text)"
        )


def test_a_prompt_in_another_encoding(folder):
    assert "prompt must be UTF-8, got '\\udcff'" in (
        refused(folder, "--prompt", "\udcff")
    )


# --- Options that have no effect, or are none. --------------------------------
def test_options_without_effect_are_said(folder, capsys):
    def said(*arguments):
        generate.sampling_options(generate.parse_args(list(arguments)))
        return capsys.readouterr().err

    warning = "warning: --{} has no effect without a --temperature above 0\n"
    assert said("--top-p", "0.5") == warning.format("top-p")
    assert said("--seed", "0") == warning.format("seed")
    assert said("--seed", "1", "--temperature", "0.5") == ""
    assert said() == ""


@pytest.mark.parametrize(
    "arguments",
    [["--max-new", "3"], ["--dev", "cpu"], ["--gpu"], ["Pip"], ["--device", "tpu"]],
)
def test_options_that_are_none(arguments):
    """An abbreviation of --device would pass tools/demo by unseen."""
    assert (
        "unrecognized" in (said := command_error(*arguments)) or "choose from" in said
    )


def test_the_models_folder_may_be_below_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    said = command_error("--model=~/models/none")
    assert f"got {tmp_path}/models/none: no such folder" in said


# --- The engine's own. --------------------------------------------------------
def test_zero_blocks_are_not_enough_blocks(tmp_path):
    decoder = load(tiny_checkpoint(tmp_path))
    for option in ("max_len", "max_seqs", "max_prefill_tokens", "num_blocks"):
        with pytest.raises(ValueError, match=f"{option} must be at least 1, got 0"):
            Engine(decoder, **dict(max_len=MAX_LEN) | {option: 0})


# --- Followed. ----------------------------------------------------------------
def test_every_option_is_followed(tmp_path):
    folder = tiny_checkpoint(tmp_path)
    edit_json(folder / "config.json", eos_token_id=None)
    edit_json(folder / "generation_config.json", eos_token_id=None)
    done = run_generate(
        *("--model", folder, "--prompt", "Pip the mouse", "--prompt", ""),
        *("--max-new-tokens", 5, "--max-batch", 1, "--max-prefill-tokens", 2),
        *("--max-len", 48, "--num-blocks", 7, "--dtype", "float32"),
        *("--temperature", "1e-300", "--top-p", "1e-9", "--seed", 2**64 - 1),
    )
    assert done.returncode == 0, done.stderr
    assert not re.search("^warning: ", done.stderr, re.MULTILINE)
    # Of 7 blocks of 16 tokens of one head of 16, for K and V of one layer, in fp32.
    assert f"{2 * 7 * 16 * 16 * 4} bytes, 2 buffers" in done.stdout
    # Prompts of 5 and 1 tokens, two a step; one sequence at a time; 5 tokens each.
    assert "median of 4 steps" in done.stdout and "median of 8 steps" in done.stdout
    # Such a temperature is as good as none.
    answer = reference(folder, [[0]], 5)
    assert make_engine(folder).generate([[0]], 5) == answer
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert f"> \n\033[1m{tokenizer.decode([0, *answer[0]])}\033[0m\n" in done.stdout


def test_warnings_are_lines_of_their_own(folder, monkeypatch, capsys):
    with options.plain_warnings():
        for _ in range(2):
            warnings.warn("config.json: twice", CheckpointWarning, stacklevel=1)
    assert capsys.readouterr().err == "warning: config.json: twice\n" * 2
    with pytest.warns(UserWarning, match="another"), options.plain_warnings():
        warnings.warn("another", stacklevel=1)
