#!/usr/bin/env python3
"""Checks the form of the tree, by the tools that the lock file pins.

    tools/lint                          all checks
    tools/lint --fix                    first repairs what tools can repair
    tools/lint --only ruff clang-format

tools/lint runs this program by the environment's Python, whose tools it uses. Only
buildifier comes from elsewhere, see `_buildifier`.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import check_links

ROOT = pathlib.Path(__file__).absolute().parent.parent
# Not resolved: the environment's own tools lie beside its link to an interpreter.
BIN = pathlib.Path(sys.executable).parent

CPP = {".cc", ".cuh", ".h"}
STARLARK = {"BUILD", "MODULE.bazel", "WORKSPACE", "WORKSPACE.bzlmod"}
BUILDIFIER = "8.2.1"
PROGRAMS = ("benchmarks", "examples", "tests", "third_party", "tools")
# Python that is not of this tree yet, and a program without a suffix.
TEMPLATES = "new_op_templates"
SUFFIXLESS = "tools/new_op"

MOST_LINES = 600
# Data, and what programs write.
NOT_WRITTEN = {".json", ".lock", ".safetensors", ".svg"}


class Result(NamedTuple):
    """How a check ended.

    Attributes:
        text: what is wrong, or a note on a check that passed.
        failed: whether anything is.
    """

    text: str
    failed: bool


def _run(*command: str | pathlib.Path, **env: str) -> Result:
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return Result(done.stdout if done.returncode else "", done.returncode != 0)


def _joined(*results: Result) -> Result:
    return Result("".join(r.text for r in results), any(r.failed for r in results))


def _files(root: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields the tree's files by their paths in it, but for hidden and built ones."""
    for folder, folders, names in os.walk(root):
        here = pathlib.Path(folder)
        folders[:] = [
            name
            for name in folders
            if not name.startswith((".", "bazel-"))
            and name not in ("__pycache__", "dist")
            and not (here / name).is_symlink()
        ]
        for name in names:
            path = here / name
            if not name.startswith(".") and path.suffix not in (".pyc", ".so"):
                yield path.relative_to(root)


def _ruff(fix: bool) -> Result:
    ruff = BIN / "ruff"
    if fix:
        _run(ruff, "check", "--fix-only", "--quiet")
        _run(ruff, "format", "--quiet")
    return _joined(
        _run(ruff, "check", "--quiet", "--output-format=concise"),
        _run(ruff, "format", "--check", "--quiet"),
    )


def _clang_format(fix: bool) -> Result:
    sources = [p for p in _files(ROOT) if p.suffix in CPP]
    # One fault a file: the first shift moves the rest.
    how = ["-i"] if fix else ["--dry-run", "-Werror", "--ferror-limit=1"]
    return _run(BIN / "clang-format", *how, *sources)


def _buildifier(fix: bool) -> Result:
    """Formats Starlark, where buildifier of the right version is on PATH.

    Python's registry has none: `npm install -g @bazel/buildifier@VERSION`.
    """
    program = shutil.which("buildifier")
    version = "none"
    if program:
        shown = subprocess.check_output([program, "--version"], text=True)
        version = shown.split("\n")[0].removeprefix("buildifier version: ")
    if not program or version.strip() != BUILDIFIER:
        return Result(f"not run: wants buildifier {BUILDIFIER}, found {version}", False)
    sources = [
        p for p in _files(ROOT) if p.suffix in (".bzl", ".BUILD") or p.name in STARLARK
    ]
    return _run(program, f"-mode={'fix' if fix else 'check'}", "-lint=off", *sources)


def _mypy(_: bool) -> Result:
    # What it remembers and a folder in which xla_ops/py has its installed name.
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    key = hashlib.sha256(str(ROOT).encode()).hexdigest()[:12]
    site = cache / "xla_ops" / "lint" / key / "site"
    shutil.rmtree(site, ignore_errors=True)
    site.mkdir(parents=True)
    (site / "xla_ops").symlink_to(ROOT / "xla_ops/py")
    for module in (ROOT / "xla_ops").glob("*.py"):
        (site / module.name).symlink_to(module)
    sources = [
        path
        for path in _files(ROOT)
        if path.suffix == ".py"
        and path.parts[0] in PROGRAMS
        and TEMPLATES not in path.parts
    ]
    result = _run(
        BIN / "mypy",
        f"--cache-dir={site.parent / 'mypy'}",
        "--no-error-summary",
        *sources,
        SUFFIXLESS,
        *sorted(site.iterdir()),
        MYPYPATH=str(site),
    )
    text = result.text.replace(f"{site}/xla_ops/", "xla_ops/py/")
    return result._replace(text=text.replace(f"{site}/", "xla_ops/"))


def _links(_: bool) -> Result:
    faults = check_links.check(ROOT)
    return Result("".join(f"{fault}\n" for fault in faults), bool(faults))


def long_files(root: pathlib.Path) -> list[str]:
    """Returns a line for each file that is too long to read in one sitting."""
    found = []
    for path in _files(root):
        if path.suffix not in NOT_WRITTEN:
            lines = (root / path).read_bytes().count(b"\n")
            if lines > MOST_LINES:
                found.append(f"{path}: {lines} lines, of at most {MOST_LINES}")
    return sorted(found)


def _lines(_: bool) -> Result:
    found = long_files(ROOT)
    return Result("".join(f"{line}\n" for line in found), bool(found))


CHECKS: dict[str, Callable[[bool], Result]] = {
    "ruff": _ruff,
    "clang-format": _clang_format,
    "buildifier": _buildifier,
    "mypy": _mypy,
    "links": _links,
    "lines": _lines,
}
REPAIRS = ("ruff", "clang-format", "buildifier")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="tools/lint", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--fix", action="store_true", help="repair what tools can")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS))
    args = parser.parse_args()

    def timed(name: str) -> tuple[Result, float]:
        start = time.monotonic()
        return CHECKS[name](args.fix), time.monotonic() - start

    # Those that repair go first; no two of them repair the same file.
    repairs = [name for name in args.only if name in REPAIRS]
    others = [name for name in args.only if name not in REPAIRS]
    groups = [repairs, others] if args.fix else [args.only]
    failed = []
    with ThreadPoolExecutor() as pool:
        for group in groups:
            for name, (result, seconds) in zip(
                group, pool.map(timed, group), strict=True
            ):
                state = "FAILED" if result.failed else "ok"
                print(f"{name}: {state}, {seconds:.1f} s", flush=True)
                if result.text:
                    print(result.text.rstrip(), flush=True)
                if result.failed:
                    failed.append(name)
    if failed:
        hint = "" if args.fix else "; tools/lint --fix repairs what tools can"
        print(f"lint: {', '.join(failed)} failed{hint}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
