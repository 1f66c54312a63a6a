#!/usr/bin/env python3
"""Checks that what documents and comments point to is there: check_links.py [ROOT].

Three things, none of which needs a network:

- relative links of *.md, `[text](docs/demo.md)`, name a file or folder;
- their fragments, `docs/demo.md#options`, name a heading, as GitHub makes its anchors;
- paths from the top folder in any text, `xla_ops/cc/core/error.h`, name a file.

Prints a line a fault; exit status 1 if there are any.
"""

from __future__ import annotations

import pathlib
import re
import sys
from collections import Counter
from collections.abc import Iterator
from urllib.parse import unquote

# [text](target "title"), also of images, and [name]: target.
LINK = re.compile(r"\]\(\s*<?([^)\s>]+)[^)]*\)|^\[[^\]]+\]:\s*<?(\S+?)>?\s*$")
HEADING = re.compile(r"^ {0,3}#{1,6}\s+(.*?)\s*#*$")
FENCE = re.compile(r"^\s*(```|~~~)")
CODE = re.compile(r"`[^`]*`")
EXTERNAL = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)  # https:, mailto:

TOP = "benchmarks|docs|examples|tests|third_party|tools|xla_ops"
PATH = re.compile(
    rf"(?<![\w/.${{}}-])(?:{TOP})/[\w./-]+\.(?:bzl|cc|cuh|h|in|json|lds|lock|md|pyi?|svg)\b"
)
TEXT = {".bzl", ".cc", ".cuh", ".h", ".in", ".md", ".py", ".pyi", ".toml", ""}
# Of the installed package: what stands below xla_ops/ there is elsewhere in the tree.
INSTALLED = "xla_ops/"
# Tests that make trees of their own.
OWN_TREES = {"tests/tools/test_check_links.py", "tests/tools/test_lint.py"}
# Names of files that an author is to write.
TO_BE_WRITTEN = re.compile(r"new_op|NAME|scaled_copy")


def files(root: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields the tree's text files, but for what is hidden or built."""
    for path in sorted(root.iterdir()):
        name = path.name
        if name.startswith((".", "bazel-")) or name == "__pycache__":
            continue
        if path.is_dir() and not path.is_symlink():
            yield from files(path)
        elif path.is_file() and path.suffix in TEXT:
            yield path


def prose(text: str) -> Iterator[tuple[int, str]]:
    """Yields the lines of a markdown text outside of code blocks, numbered."""
    fence = ""
    for number, line in enumerate(text.splitlines(), 1):
        match = FENCE.match(line)
        if match and fence in ("", match[1]):
            fence = "" if fence else match[1]
        elif not fence:
            yield number, line


def anchors(text: str) -> set[str]:
    """Returns the anchors that GitHub gives the headings of a markdown text."""
    seen: Counter[str] = Counter()
    found = set()
    for _, line in prose(text):
        match = HEADING.match(line)
        if not match:
            continue
        title = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", match[1]).lower()
        slug = re.sub(r"[^\w\- ]", "", title).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found | set(re.findall(r'<a (?:id|name)="([^"]+)"', text))


def link_faults(path: pathlib.Path, text: str) -> Iterator[tuple[int, str]]:
    """Yields (line, fault) of each relative link of a markdown file."""
    for number, line in prose(text):
        for match in LINK.finditer(CODE.sub("", line)):
            link = match[1] or match[2]
            if EXTERNAL.match(link):
                continue
            name, _, fragment = link.partition("#")
            target = path.parent / unquote(name) if name else path
            if not target.exists():
                yield number, f"links to {link}, which does not exist"
            elif (
                fragment
                and target.suffix == ".md"
                and unquote(fragment) not in anchors(target.read_text())
            ):
                yield number, f"links to {link}, which has no such heading"


def path_faults(root: pathlib.Path, text: str) -> Iterator[tuple[int, str]]:
    """Yields (line, fault) of each path from the top folder that a text names."""
    for number, line in enumerate(text.splitlines(), 1):
        for match in PATH.finditer(line):
            name = match[0]
            installed = name.replace(INSTALLED, INSTALLED + "py/", 1)
            if not (
                (root / name).exists()
                or (root / installed).exists()
                or TO_BE_WRITTEN.search(name)
            ):
                yield number, f"names {name}, which does not exist"


def check(root: pathlib.Path) -> list[str]:
    """Returns the faults of a tree, a line each."""
    found = []
    for path in files(root):
        text = path.read_text()
        own = path.relative_to(root).as_posix() in OWN_TREES
        faults = [] if own else list(path_faults(root, text))
        if path.suffix == ".md":
            faults += link_faults(path, text)
        found += [f"{path.relative_to(root)}:{n}: {f}" for n, f in sorted(faults)]
    return found


def main() -> int:
    here = pathlib.Path(__file__).absolute().parent.parent
    found = check(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else here)
    print(*found, sep="\n", end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
