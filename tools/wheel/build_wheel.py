"""Packs a wheel; the action behind the `wheel` rule.

    build_wheel.py --out=DIR --python-tag=cp311 --version-file=.../version.py
        [--readme=FILE] [--license=FILE]... --file=DESTINATION=SOURCE...

Writes DIR/xla_ops-VERSION-cp311-cp311-manylinux_2_N_x86_64.whl. N is the newest
glibc version that any of the shared objects needs. The same inputs give the
same bytes: names are sorted, times and permissions fixed.
"""

import argparse
import base64
import dataclasses
import hashlib
import pathlib
import re
import sys
import zipfile

from elftools.elf.dynamic import DynamicSegment
from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerNeedSection

import metadata

# What a manylinux wheel may take from the system (PEP 600), less libstdc++,
# which is linked statically.
SYSTEM_LIBRARIES = {
    "ld-linux-x86-64.so.2",
    "libc.so.6",
    "libdl.so.2",
    "libgcc_s.so.1",
    "libm.so.6",
    "libpthread.so.0",
    "librt.so.1",
}
# What the wheel's requirements bring, and the process has loaded before.
OF_TORCH = {"libxla_ops_torch_op.so": {"libc10.so", "libtorch_cpu.so"}}
OLDEST_GLIBC = 28  # torch 2.9.0 and torch_xla 2.9.0 need 2.28 themselves
TIME = (1980, 1, 1, 0, 0, 0)


@dataclasses.dataclass(frozen=True)
class Needs:
    """What a shared object needs at run time."""

    libraries: set[str]  # "libc.so.6"
    versions: set[str]  # "GLIBC_2.14"


def read_needs(path: pathlib.Path) -> Needs:
    """Reads the needs of the shared object at `path`."""
    libraries: set[str] = set()
    versions: set[str] = set()
    with path.open("rb") as file:
        elf = ELFFile(file)
        for segment in elf.iter_segments():
            if isinstance(segment, DynamicSegment):
                tags = segment.iter_tags("DT_NEEDED")
                # The attribute has its name from the tag's.
                libraries.update(tag.needed for tag in tags)  # type: ignore[attr-defined]
        for section in elf.iter_sections():
            if isinstance(section, GNUVerNeedSection):
                for _, needed in section.iter_versions():
                    versions.update(version.name for version in needed)
    return Needs(libraries, versions)


def platform_tag(objects: list[pathlib.Path]) -> str:
    """Returns the platform on which all of `objects` load.

    Raises:
        ValueError: one needs a library that a wheel may not take for granted.
    """
    newest = OLDEST_GLIBC
    for path in objects:
        needs = read_needs(path)
        known = SYSTEM_LIBRARIES | OF_TORCH.get(path.name, set())
        foreign = sorted(needs.libraries - known)
        if foreign:
            raise ValueError(
                f"{path.name} must need only {sorted(SYSTEM_LIBRARIES)}, got {foreign}"
            )
        for version in needs.versions:
            match = re.fullmatch(r"GLIBC_2\.(\d+)(\.\d+)*", version)
            if match:
                newest = max(newest, int(match[1]))
    return f"manylinux_2_{newest}_x86_64"


def read_version(path: pathlib.Path) -> str:
    match = re.search(r'^__version__ = "([^"]+)"$', path.read_text(), re.MULTILINE)
    if not match:
        raise ValueError(f'{path} must hold a line `__version__ = "X.Y.Z"`')
    return match[1]


def write_wheel(path: pathlib.Path, info: str, contents: dict[str, bytes]) -> None:
    """Writes `contents` and, last, the RECORD of them in the folder `info`."""
    record = []
    for name, data in sorted(contents.items()):
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=")
        record.append(f"{name},sha256={digest.decode()},{len(data)}\n")
    record.append(f"{info}/RECORD,,\n")
    entries = [*sorted(contents.items()), (f"{info}/RECORD", "".join(record).encode())]

    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries:
            entry = zipfile.ZipInfo(name, date_time=TIME)
            entry.compress_type = zipfile.ZIP_DEFLATED
            mode = 0o755 if name.endswith(".so") else 0o644
            entry.external_attr = (0o100000 | mode) << 16
            entry.create_system = 3  # Unix: the permissions above count
            archive.writestr(entry, data)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], fromfile_prefix_chars="@"
    )
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--python-tag", required=True)
    parser.add_argument("--version-file", type=pathlib.Path, required=True)
    parser.add_argument("--readme", type=pathlib.Path)
    parser.add_argument("--license", type=pathlib.Path, action="append", default=[])
    parser.add_argument("--file", action="append", default=[])
    args = parser.parse_args(argv)

    sources = {}
    for item in args.file:
        destination, _, source = item.partition("=")
        if destination in sources:
            raise ValueError(f"{destination} must stand in the wheel once")
        sources[destination] = pathlib.Path(source)
    contents = {name: path.read_bytes() for name, path in sources.items()}

    version = read_version(args.version_file)
    python = f"{args.python_tag[2]}.{args.python_tag[3:]}"
    platform = platform_tag([p for n, p in sources.items() if n.endswith(".so")])
    tag = f"{args.python_tag}-{args.python_tag}-{platform}"

    info = f"{metadata.NAME}-{version}.dist-info"
    contents[f"{info}/METADATA"] = metadata.metadata(
        version,
        python,
        args.readme.read_text() if args.readme else "",
        [path.name for path in args.license],
    ).encode()
    contents[f"{info}/WHEEL"] = metadata.wheel(tag).encode()
    contents[f"{info}/entry_points.txt"] = metadata.ENTRY_POINTS.encode()
    contents[f"{info}/top_level.txt"] = "".join(
        f"{name}\n" for name in metadata.TOP_LEVEL
    ).encode()
    for path in args.license:
        contents[f"{info}/licenses/{path.name}"] = path.read_bytes()

    args.out.mkdir(parents=True, exist_ok=True)
    write_wheel(args.out / f"{metadata.NAME}-{version}-{tag}.whl", info, contents)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
