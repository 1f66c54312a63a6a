"""tools/lint.py: what it checks by itself, and what it says of the tools that it runs.

That the tools find faults is their own affair; here programs stand in for them.
"""

import stat
import sys

import pytest

import lint


@pytest.fixture
def tree(tmp_path, monkeypatch):
    monkeypatch.setattr(lint, "ROOT", tmp_path)
    monkeypatch.setattr(lint, "BIN", tmp_path / ".bin")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".cache"))
    monkeypatch.setenv("PATH", str(tmp_path / ".bin"), prepend=":")
    (tmp_path / ".bin").mkdir()
    return tmp_path


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def stand_in(tree, name, script):
    path = tree / ".bin" / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["lint.py", *arguments])
    return lint.main()


def test_long_files(tree):
    write(tree / "a.py", "\n" * 600)
    write(tree / "b/c.cuh", "\n" * 601)
    write(tree / "b/data.json", "\n" * 601)
    write(tree / "bazel-bin/d.py", "\n" * 601)
    write(tree / ".git/e", "\n" * 601)
    assert lint.long_files(tree) == ["b/c.cuh: 601 lines, of at most 600"]


def test_a_failing_tool_fails_the_run_and_the_rest_still_runs(
    tree, monkeypatch, capsys
):
    stand_in(tree, "ruff", "echo bad; exit 1")
    stand_in(tree, "clang-format", "echo noise; exit 0")
    assert run(monkeypatch, "--only", "ruff", "clang-format", "lines") == 1
    out, err = capsys.readouterr()
    assert "ruff: FAILED" in out and "bad" in out
    assert "clang-format: ok" in out and "noise" not in out
    assert "lines: ok" in out
    assert "lint: ruff failed; tools/lint --fix repairs" in err


def test_all_is_well(tree, monkeypatch, capsys):
    for name in ("ruff", "clang-format", "mypy"):
        stand_in(tree, name, "exit 0")
    write(tree / "xla_ops/py/__init__.py", "")
    assert run(monkeypatch) == 0
    assert capsys.readouterr().err == ""


def test_fix_repairs_before_it_checks(tree, monkeypatch):
    log = tree / ".log"
    for name in ("ruff", "clang-format"):
        stand_in(tree, name, f'echo {name} "$@" >>{log}')
    write(tree / "a.cc", "")
    assert run(monkeypatch, "--fix", "--only", "ruff", "clang-format") == 0
    calls = log.read_text().splitlines()
    assert "clang-format -i a.cc" in calls
    ruff = [call for call in calls if call.startswith("ruff")]
    assert [call.split()[1:3] for call in ruff] == [
        ["check", "--fix-only"],
        ["format", "--quiet"],
        ["check", "--quiet"],
        ["format", "--check"],
    ]


def test_buildifier_of_another_version_is_left_alone(tree, monkeypatch, capsys):
    stand_in(
        tree, "buildifier", "echo 'buildifier version: 1.2.3 '; [ $1 = --version ]"
    )
    assert run(monkeypatch, "--only", "buildifier") == 0
    assert f"wants buildifier {lint.BUILDIFIER}, found 1.2.3" in capsys.readouterr().out


def test_buildifier_reads_all_starlark(tree, monkeypatch):
    log = tree / ".log"
    stand_in(
        tree,
        "buildifier",
        f'if [ "$1" = --version ]; then echo "buildifier version: {lint.BUILDIFIER} ";'
        f' else echo "$@" >{log}; fi',
    )
    for name in ("BUILD", "a/b.bzl", "a/c.BUILD", "a/d.py"):
        write(tree / name, "")
    assert run(monkeypatch, "--only", "buildifier") == 0
    mode, warnings, *files = log.read_text().split()
    assert (mode, warnings) == ("-mode=check", "-lint=off")
    assert sorted(files) == ["BUILD", "a/b.bzl", "a/c.BUILD"]


def test_mypy_reads_the_package_by_its_name(tree, monkeypatch, capsys):
    stand_in(tree, "mypy", 'echo "$MYPYPATH/xla_ops/op.py:1: error"; echo "$@"; exit 1')
    write(tree / "xla_ops/py/op.py", "")
    write(tree / "xla_ops/entry.py", "")
    write(tree / "tests/test_a.py", "")
    write(tree / "tools/new_op_templates/new_op.py", "")
    assert run(monkeypatch, "--only", "mypy") == 1
    out = capsys.readouterr().out
    assert "xla_ops/py/op.py:1: error" in out
    assert "tests/test_a.py tools/new_op xla_ops/entry.py" in out
    assert "templates" not in out
