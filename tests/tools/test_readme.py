"""README.md as the wheel holds it: each link leads somewhere from a package index."""

import importlib
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
REPOSITORY = "https://example.org/us/it"


@pytest.fixture
def absolute(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools" / "wheel"))
    tool = importlib.import_module("readme")
    return lambda text: tool.absolute_links(text, REPOSITORY, "v1.2")


@pytest.mark.parametrize(
    "given, expected",
    [
        ("[a](pages/a.md)", f"[a]({REPOSITORY}/blob/v1.2/pages/a.md)"),
        ("[a](./pages/a.md#part)", f"[a]({REPOSITORY}/blob/v1.2/pages/a.md#part)"),
        ("[`a.py`](/a.py)", f"[`a.py`]({REPOSITORY}/blob/v1.2/a.py)"),
        ('[a](pages "title")', f'[a]({REPOSITORY}/blob/v1.2/pages "title")'),
        ("[a](a) · [b](b)", "[a]({0}a) · [b]({0}b)".format(f"{REPOSITORY}/blob/v1.2/")),
        ("![plot](x/a.svg)", f"![plot]({REPOSITORY}/raw/v1.2/x/a.svg)"),
        (
            "[![plot](a.svg)](a.json)",
            f"[![plot]({REPOSITORY}/raw/v1.2/a.svg)]({REPOSITORY}/blob/v1.2/a.json)",
        ),
        ("[a]: pages/a.md", f"[a]: {REPOSITORY}/blob/v1.2/pages/a.md"),
        ('<img src="a.svg">', f'<img src="{REPOSITORY}/raw/v1.2/a.svg">'),
        ('<a href="a.md">', f'<a href="{REPOSITORY}/blob/v1.2/a.md">'),
    ],
)
def test_relative_targets_become_absolute(absolute, given, expected):
    assert absolute(f"Text.\n\n{given}\n") == f"Text.\n\n{expected}\n"


@pytest.mark.parametrize(
    "text",
    [
        "[a](https://example.org/a.md)",
        "[a](mailto:a@example.org)",
        "[a](#part)",
        "plain text, f(x)[0] (y) aside",
        "```python\nx = table[0](row)  # [a](b.md)\n```",
    ],
)
def test_the_rest_stays(absolute, text):
    assert absolute(text) == text


def test_readme_has_relative_links_and_keeps_none(absolute):
    text = (ROOT / "README.md").read_text()
    relative = re.compile(r"\]\((?![a-z]+:|#)[^)]*\)|(?:src|href)=\"(?![a-z]+:|#)")
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    assert relative.search(prose)
    shown = re.sub(r"^```.*?^```$", "", absolute(text), flags=re.MULTILINE | re.DOTALL)
    assert not relative.findall(shown)
