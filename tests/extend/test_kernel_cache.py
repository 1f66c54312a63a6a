"""Compiled kernels on disk: what is kept, what is not trusted, and where."""

import json
import threading
import warnings

import pytest

from xla_ops.extend import kernel_cache
from xla_ops.extend.kernel_cache import Code

CODE = Code(b"\x7fELF code", "_Z5scalef", ("u64", "f32"), {"log": "a warning"})


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XLA_OPS_CACHE_DIR", str(tmp_path))
    kernel_cache._tell_unwritable.cache_clear()
    return tmp_path / "kernels"


def test_keeps_code_by_its_digest(folder):
    assert kernel_cache.load("key") is None
    kernel_cache.store("key", CODE)
    assert kernel_cache.load("key") == CODE
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted([f"{CODE.digest}.cubin", "key.json"])


@pytest.mark.parametrize(
    "data", [b"", b"\x7fELF", b"\x7fELF cod!", b"longer than that"]
)
def test_code_that_does_not_fit_its_name_is_not_taken(folder, data):
    kernel_cache.store("key", CODE)
    (folder / f"{CODE.digest}.cubin").write_bytes(data)
    assert kernel_cache.load("key") is None
    kernel_cache.store("key", CODE)
    assert kernel_cache.load("key") == CODE


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"digest": 3, "kernel": "k"}', "\x00"]
)
def test_note_that_cannot_be_read_is_not_taken(folder, text):
    kernel_cache.store("key", CODE)
    (folder / "key.json").write_text(text)
    assert kernel_cache.load("key") is None


def test_code_that_is_gone_is_not_taken(folder):
    kernel_cache.store("key", CODE)
    (folder / f"{CODE.digest}.cubin").unlink()
    assert kernel_cache.load("key") is None


def test_threads_share_a_folder(folder):
    def work(number):
        for i in range(50):
            code = Code(b"image %d" % (i % 5), "k", ())
            kernel_cache.store(f"key{i % 5}", code)
            found.append(kernel_cache.load(f"key{i % 5}") == code)

    found = []
    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 200
    assert len(list(folder.iterdir())) == 10, "no draft is left"


def test_folder_that_cannot_be_written_is_told_once(folder):
    folder.write_text("a file in its place")
    with pytest.warns(
        UserWarning, match="compiled in every process, because .*kernels"
    ):
        kernel_cache.store("key", CODE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernel_cache.store("key", CODE)
    assert kernel_cache.load("key") is None


def test_a_full_disk_leaves_nothing_behind(folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kernel_cache.pathlib.Path, "replace", full)
    with pytest.warns(UserWarning, match="No space left on device"):
        kernel_cache.store("key", CODE)
    assert not list(folder.iterdir())


def test_place_follows_the_environment(monkeypatch):
    for name, value, wanted in (
        ("XLA_OPS_CACHE_DIR", "/x", "/x/kernels"),
        ("XDG_CACHE_HOME", "/c", "/c/xla_ops/kernels"),
        ("HOME", "/h", "/h/.cache/xla_ops/kernels"),
    ):
        monkeypatch.setenv(name, value)
        assert str(kernel_cache.folder()) == wanted
        monkeypatch.delenv(name)
        for other in ("XDG_CACHE_HOME", "HOME"):
            if name == "XLA_OPS_CACHE_DIR":
                monkeypatch.delenv(other, raising=False)
    assert kernel_cache.folder() is None
    kernel_cache.store("key", CODE)
    assert kernel_cache.load("key") is None


def test_keys_tell_parts_apart():
    keys = {
        kernel_cache.key_of("a", "bc"),
        kernel_cache.key_of("ab", "c"),
        kernel_cache.key_of("abc"),
        kernel_cache.key_of(("a", "bc")),
        kernel_cache.key_of("1"),
        kernel_cache.key_of(1),
        kernel_cache.key_of(1.0),
        kernel_cache.key_of(True),
    }
    assert len(keys) == 8


def test_parameters_are_read_from_ptx():
    ptx = """
.visible .entry one(
    .param .u64 one_param_0,
    .param .u64 .ptr .global .align 1 one_param_1,
    .param .align 2 .b8 one_param_2[2],
    .param .f64 one_param_3
)
{ ret; }
.entry one_more()
{ ret; }
.weak .entry none
{ ret; }
"""
    read = kernel_cache.parameters_of
    assert read(ptx, "one") == ("u64", "u64", "b8[2]", "f64")
    assert read(ptx, "one_more") == ()
    assert read(ptx, "none") == ()
    assert read(ptx, "absent") is None


def test_notes_are_json(folder):
    kernel_cache.store_note("key", {"config": 3})
    assert json.loads((folder / "key.json").read_text()) == {"config": 3}
    assert kernel_cache.load_note("key") == {"config": 3}
