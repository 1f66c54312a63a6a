"""tools/check_links.py finds what points nowhere, and nothing else."""

import sys

import pytest

import check_links

README = """\
# The Project

## What it's for, and `why`
## Twice
## Twice
See [docs](docs/guide.md), [part](docs/guide.md#a-part), [here](#twice-1),
[why](#what-its-for-and-why), ![picture](docs/a%20b.svg "title"), [web](https://x.y/z)
and <a href="mailto:a@b.c">mail</a>. Code is no link: `[a](b)`.

[kept]: docs/guide.md
```
[neither](is-this.md)
```
"""


@pytest.fixture
def tree(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "xla_ops/py/core").mkdir(parents=True)
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "docs/guide.md").write_text("# Guide\n## A [part](guide.md)\n")
    (tmp_path / "docs/a b.svg").touch()
    (tmp_path / "xla_ops/py/core/op.py").write_text(
        "# docs/guide.md, xla_ops/core/op.py when installed, xla_ops/py/ops/NAME.py\n"
    )
    return tmp_path


def test_a_good_tree(tree):
    assert check_links.check(tree) == []


@pytest.mark.parametrize(
    "line, fault",
    [
        ("[x](docs/none.md)", "links to docs/none.md, which does not exist"),
        ("![x](none.svg)", "links to none.svg, which does not exist"),
        ("[x]: none.md", "links to none.md, which does not exist"),
        ("[x](#none)", "links to #none, which has no such heading"),
        ("[x](#twice-2)", "links to #twice-2, which has no such heading"),
        ("[x](docs/guide.md#b)", "links to docs/guide.md#b, which has no such heading"),
        ("of `tests/none.py`", "names tests/none.py, which does not exist"),
    ],
)
def test_a_fault_is_found_where_it_is(tree, line, fault):
    path = tree / "docs" / "new.md"
    path.write_text(f"# New\n\n{line}\n".replace("docs/", "../docs/"))
    fault = fault.replace("to docs/", "to ../docs/")
    assert check_links.check(tree) == [f"docs/new.md:3: {fault}"]


def test_paths_are_looked_for_in_sources(tree):
    (tree / "xla_ops/BUILD").write_text("# See docs/gone.md.\n")
    (tree / "bazel-out").mkdir()
    (tree / "bazel-out/x.md").write_text("[x](none)")
    assert check_links.check(tree) == [
        "xla_ops/BUILD:1: names docs/gone.md, which does not exist"
    ]


def test_exit_status(tree, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["check_links.py", str(tree)])
    assert check_links.main() == 0
    (tree / "docs/guide.md").unlink()
    assert check_links.main() == 1
    out = capsys.readouterr().out
    assert "README.md:6: links to docs/guide.md, which does not exist" in out
