#!/usr/bin/env python3
"""Resolves requirements.in into requirements.lock, section by section.

Run it with `uv` on PATH (`pip install uv`):

    python3 third_party/update_lock.py [--upgrade]

Each section is installed on its own, so each is resolved on its own, but a
section with the option --on=OTHER is installed over another: it takes that
one's versions where they fit, and holds only what differs. Without --upgrade,
versions that the present lock holds and that still fit are kept.
"""

import argparse
import pathlib
import re
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
SECTION = re.compile(r"^# \[(\w+)\](.*)$")
HEADER = """\
# Generated from requirements.in by third_party/update_lock.py, which runs, for
# each section with the options named there,
#   uv pip compile --universal --python-version=3.10 --generate-hashes \\
#     --only-binary=:all: --no-header --no-emit-index-url SECTION.in
# Universal for CPython 3.10 to 3.13: markers choose the version, hashes cover
# every wheel of it. Both WORKSPACE and MODULE.bazel read this file.
"""


def sections(text: str) -> list[tuple[str, list[str], str]]:
    """Splits requirements.in into (name, uv options, requirements)."""
    found: list[tuple[str, list[str], list[str]]] = []
    for line in text.splitlines():
        match = SECTION.match(line)
        if match:
            options = [w for w in match[2].split() if w.startswith("--")]
            found.append((match[1], options, []))
        elif found and line.strip():
            found[-1][2].append(line)
    return [(name, opts, "\n".join(lines) + "\n") for name, opts, lines in found]


def locked_sections(text: str) -> dict[str, str]:
    """Splits requirements.lock into {section name: its text}."""
    parts = re.split(r"^# \[(\w+)\]\n", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def packages(text: str) -> dict[str, str]:
    """Splits a section of the lock into {package: all its entries}."""
    found: dict[str, str] = {}
    for entry in re.split(r"^(?=\S)", text, flags=re.MULTILINE):
        if entry.strip():
            name = entry.split("==")[0]
            found[name] = found.get(name, "") + entry
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--upgrade", action="store_true", help="take newest versions")
    args = parser.parse_args()

    lock_path = HERE / "requirements.lock"
    old = {}
    if lock_path.exists() and not args.upgrade:
        old = locked_sections(lock_path.read_text())

    resolved: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as tmp_name:
        tmp = pathlib.Path(tmp_name)
        for name, options, requirements in sections(
            (HERE / "requirements.in").read_text()
        ):
            source, target = tmp / f"{name}.in", tmp / f"{name}.txt"
            source.write_text(requirements)
            base = {}
            for option in [o for o in options if o.startswith("--on=")]:
                options.remove(option)
                base = packages(resolved[option.removeprefix("--on=")])
            kept = base | packages(old.get(name, ""))  # uv keeps what it finds here
            target.write_text("".join(kept.values()))
            command = ["uv", "pip", "compile", "--quiet", "--universal"]
            if not any(o.startswith("--python-version") for o in options):
                command.append("--python-version=3.10")
            command += ["--generate-hashes", "--only-binary=:all:", "--no-header"]
            command += ["--no-emit-index-url", *options]
            command += [source.name, f"--output-file={target.name}"]
            subprocess.run(command, check=True, cwd=tmp)
            text = target.read_text()
            # The comments name temporary files: noise.
            text = re.sub(r"^    #.*\n", "", text, flags=re.MULTILINE)
            resolved[name] = "".join(
                entries
                for package, entries in packages(text).items()
                if base.get(package) != entries
            )
    out = HEADER + "".join(f"\n# [{n}]\n{text}" for n, text in resolved.items())
    lock_path.write_text(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
