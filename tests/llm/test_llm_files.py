"""Tests what examples/llm says about broken files: which one it is, what it holds, and
what to do."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import files
import tokenizer
import weights
from checkpoints import outcome, tiny_checkpoint
from command import command_error, run_generate
from config import ModelConfig
from files import CheckpointError

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
GENERATION = "generation_config.json"
FILES = [CONFIG, GENERATION, TOKENIZER, WEIGHTS]


def read(folder) -> None:
    """Reads all that the command line reads before it loads."""
    config = ModelConfig.from_folder(folder)
    tokenizer.encode(tokenizer.load(folder), "Pip the mouse")
    weights.check(folder, config)


def refusal(folder, file) -> str:
    """What is said about that file of the folder."""
    with pytest.raises(CheckpointError) as info:
        read(folder)
    said = str(info.value)
    assert "\n" not in said
    start = f"model: {folder / file} must be "
    assert said.startswith(start), said
    return said.removeprefix(start)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("good"))


@pytest.fixture
def folder(good, tmp_path):
    shutil.copytree(good, tmp_path / "model")
    return tmp_path / "model"


def test_the_checkpoint_is_right_to_begin_with(folder):
    read(folder)


# --- Contents. ----------------------------------------------------------------
POINTER = b"""version https://git-lfs.github.com/spec/v1
oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393
size 4947
"""
CONTENTS = {
    "lfs": (POINTER, "got a Git LFS pointer to 4947 bytes: run `git lfs pull` in "),
    "old_lfs": (b"version http://git-media.io/v/2\n", "got text, 'version http"),
    "hawser": (b"version https://hawser.github.com/spec/v1\n", "a Git LFS pointer: ru"),
    "empty": (b"", "got an empty file: download it again"),
    "html": (b"\n<!DOCTYPE html>\n<html>", "got an HTML page: download it again, sig"),
    "html2": (b"\xef\xbb\xbf<HTML lang=en>", "got an HTML page: download it again"),
    "xml": (b"<?xml version='1.0'?><Error/>", "got an XML document: download it"),
    "text": (b"Entry not found", "got text, 'Entry not found': download it again"),
    "zeros": (bytes(4096), "got zeros, a download that broke off: download it again"),
    "gguf": (b"GGUF\x03\0\0\0" + bytes(99), "got a GGUF file: download it again"),
    "zip": (b"PK\x03\x04" + bytes(99), "got a zip or PyTorch file"),
    "pickle": (b"\x80\x02}q\x00" + bytes(99), "got a PyTorch file"),
    "gzip": (b"\x1f\x8b\x08" + bytes(99), "got a gzip file"),
}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("file", FILES)
def test_contents(folder, file, content):
    data, message = CONTENTS[content]
    (folder / file).write_bytes(data)
    assert message in refusal(folder, file)


@pytest.mark.parametrize("file", FILES)
def test_json_that_is_something_else(folder, file):
    (folder / file).write_text('["Repository not found"]')
    said = refusal(folder, file)
    if file in (CONFIG, GENERATION):
        assert said.startswith("a JSON object, got ['Repository not found']: download")


def test_the_answer_of_a_server_as_a_config(folder):
    (folder / CONFIG).write_text('{"error": "Repository not found"}')
    with pytest.raises(CheckpointError, match=r"model_type .* nothing among \['error"):
        read(folder)


def test_a_download_that_broke_off(folder):
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:-10])
    said = refusal(folder, WEIGHTS)
    assert f"got {len(whole) - 10} bytes where its header says {len(whole)}" in said
    (folder / WEIGHTS).write_bytes(whole + b"x")
    said = refusal(folder, WEIGHTS)
    assert f"got {len(whole) + 1} bytes where its header says {len(whole)}" in said
    (folder / WEIGHTS).write_bytes(whole[:100])  # within the header
    assert "a safetensors file, got 100 bytes of something else" in (
        refusal(folder, WEIGHTS)
    )


@settings(max_examples=100)
@given(st.sampled_from(FILES), st.data())
def test_no_damage_goes_unnamed(good, file, data):
    """A file that is cut, or has other bytes in it, is named, or it can be read."""
    folder = good.parent / "damaged"
    shutil.copytree(good, folder, dirs_exist_ok=True)
    whole = (good / file).read_bytes()
    start = data.draw(st.integers(0, len(whole) - 1))
    if data.draw(st.booleans()):
        changed = whole[:start]
    else:
        junk = data.draw(st.binary(min_size=1, max_size=9))
        changed = whole[:start] + junk + whole[start + len(junk) :]
    (folder / file).write_bytes(changed)
    _, refusal = outcome(lambda: read(folder))
    if refusal:
        assert file in refusal or (file == WEIGHTS and "weights" in refusal)
        assert "\n" not in refusal
    else:
        assert len(changed) >= len(whole.rstrip(b"\n"))


# --- Files that are not files. ------------------------------------------------
@pytest.mark.parametrize("file", FILES)
def test_a_folder_or_a_device_in_place_of_a_file(folder, file):
    (folder / file).unlink()
    (folder / file).mkdir()
    assert refusal(folder, file) == "a file, got a folder: download it again"
    (folder / file).rmdir()
    os.mkfifo(folder / file)
    assert refusal(folder, file) == "a file, got a device or a pipe"


@pytest.mark.parametrize("file", FILES)
def test_links(folder, file, tmp_path):
    """As in the cache of huggingface_hub, whose files are links."""
    (folder / file).rename(tmp_path / "blob")
    (folder / file).symlink_to("../blob")
    read(folder)
    (tmp_path / "blob").unlink()
    assert refusal(folder, file) == (
        "a file, got a link to ../blob, which is gone: download it again"
    )
    (folder / file).unlink()
    (folder / file).symlink_to(file)
    assert "Too many levels of symbolic links" in refusal(folder, file)


def denied(*_, **__):
    """In place of a call that the rights do not allow: root, as which tests may run,
    is allowed all."""
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


@pytest.mark.parametrize("file", FILES)
def test_a_file_that_may_not_be_read(folder, file, monkeypatch):
    opened = Path.open

    def open_others(path, *args, **options):
        call = denied if path == folder / file else opened
        return call(path, *args, **options)

    monkeypatch.setattr(Path, "open", open_others)
    assert refusal(folder, file) == "a file that can be read, got Permission denied"


@pytest.mark.parametrize("call", ["listdir", "stat"])
def test_a_folder_that_may_not_be_read(folder, call, monkeypatch):
    """Nor one that may be listed, and its files not be looked at."""
    monkeypatch.setattr(files.os, call, denied)
    with pytest.raises(CheckpointError, match=f"{folder}: Permission denied"):
        read(folder)


# --- Folders. -----------------------------------------------------------------
@pytest.mark.parametrize(
    "path, message",
    [
        ("no/such/folder", "no/such/folder: no such folder$"),
        ("config.json", "config.json, a file: give the folder that holds it"),
        ("config.json/x", "config.json/x, a file: give the folder"),
        ("x" * 300, "File name too long"),
    ],
)
def test_paths_that_are_no_folder(folder, path, message):
    with pytest.raises(CheckpointError, match=message):
        read(folder / path)


def test_names_of_a_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = command_error("--model", "Qwen/Qwen3-0.6B")
    assert "got Qwen/Qwen3-0.6B: no such folder; models are not downloaded here" in said
    assert "`hf download Qwen/Qwen3-0.6B --local-dir DIR`" in said
    assert "no such folder" in command_error("--model", "gpt2")
    assert "must name a folder, got ''" in command_error("--model", "")


@pytest.mark.parametrize(
    "instead, message",
    [
        ([], "with nothing: give a folder that holds it"),
        (["snapshots/"], "give the folder below snapshots/"),
        (["adapter_config.json"], "merge the adapter into its base model"),
        (["model-q4.gguf"], "with model-q4.gguf: GGUF files are not read"),
        (["params.json"], "in Hugging Face's format"),
        (list("abcdefg"), "with a, b, c, d and 3 more: give"),
    ],
)
def test_a_folder_without_a_config(tmp_path, instead, message):
    for name in instead:
        (tmp_path / name).mkdir() if name[-1] == "/" else (tmp_path / name).touch()
    with pytest.raises(CheckpointError) as info:
        read(tmp_path)
    start = f"model: folder must hold config.json, got {tmp_path} with "
    assert str(info.value).startswith(start) and message in str(info.value)


@pytest.mark.parametrize(
    "instead, message",
    [
        ([], "download it, too"),
        (["tokenizer.model"], r"AutoTokenizer.from_pretrained\(.*save_pretrained"),
        (["vocab.json", "merges.txt"], r"AutoTokenizer.from_pretrained\("),
    ],
)
def test_a_folder_without_a_tokenizer(folder, instead, message):
    (folder / TOKENIZER).unlink()
    for name in instead:
        (folder / name).touch()
    with pytest.raises(CheckpointError, match=f"must hold {TOKENIZER}, .*{message}"):
        read(folder)


@pytest.mark.parametrize(
    "instead, message",
    [
        ([], "download it, too"),
        (["pytorch_model.bin"], r"AutoModelForCausalLM.from_pretrained\("),
        (["pytorch_model-00001-of-2.bin"], r"AutoModelForCausalLM.from_pretrained\("),
        (["model-00001-of-00002.safetensors"], "download model.safetensors.index"),
        (["model.gguf"], "GGUF files are not read"),
    ],
)
def test_a_folder_without_weights(folder, instead, message):
    (folder / WEIGHTS).unlink()
    for name in instead:
        (folder / name).touch()
    must = f"must hold {WEIGHTS} or {WEIGHTS}.index.json, got "
    with pytest.raises(CheckpointError, match=f"{must}.*{message}"):
        read(folder)


def test_the_fixes_that_are_named_work(folder):
    """The commands that convert weights and tokenizer, as they are printed."""
    import subprocess
    import sys

    import torch
    from safetensors.torch import load_file

    weights_before = load_file(folder / WEIGHTS)
    torch.save(weights_before, folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    said = command_error("--model", folder)
    command = said.split("`")[1].replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, check=True, capture_output=True)
    after = load_file(folder / WEIGHTS)
    assert after.keys() == weights_before.keys()
    assert all(torch.equal(after[name], weights_before[name]) for name in after)


# --- As a user meets them. ----------------------------------------------------
def test_command_line(folder):
    (folder / WEIGHTS).write_bytes(POINTER)
    done = run_generate("--model", folder, "--prompt", "Pip")
    assert done.returncode == 2
    assert done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert last == (
        f"error: model: {folder / WEIGHTS} must be a safetensors file, got a Git LFS "
        f"pointer to 4947 bytes: run `git lfs pull` in {folder}"
    )
    assert "Traceback" not in done.stderr


def test_broken_json_says_where(folder):
    text = (folder / CONFIG).read_text()
    (folder / CONFIG).write_text(text[: len(text) // 2])
    said = refusal(folder, CONFIG)
    assert said.startswith("JSON, got broken JSON (") and " line " in said
    (folder / CONFIG).write_text("[" * 100000)
    assert refusal(folder, CONFIG).startswith("JSON, got broken JSON (")
    raw = json.dumps({"a": "\u00e9"}, ensure_ascii=False).encode("latin-1")
    (folder / CONFIG).write_bytes(raw)
    assert "can't decode byte 0xe9" in refusal(folder, CONFIG)
