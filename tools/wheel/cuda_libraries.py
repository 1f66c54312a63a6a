#!/usr/bin/env python3
"""Says what XLA's CUDA plugin opens of CUDA, and which wheels carry it.

    python3 tools/wheel/cuda_libraries.py FILE...

A FILE is xla_cuda_plugin.so or the wheel that it is in, jax_cuda1N_pjrt-*.whl. Exit
status 1 if the table (xla_ops/py/gpu/cuda_libraries.py), of which
tests/tools/test_extras.py makes sure that the extras of xla_ops bring it all, lacks
something.

The plugin links to none of it, and its wheel requires none: it opens a library by name
when a program first needs it, and reads the compiler's files from a folder beside it.
So what is missing is found out by the first matmul, not by pip.
"""

import argparse
import importlib.util
import pathlib
import re
import sys
import zipfile

# The table is the package's own, for its doctor: loaded by its path, since the package
# needs torch.
_TABLE = pathlib.Path(__file__).parents[2] / "xla_ops/py/gpu/cuda_libraries.py"
_spec = importlib.util.spec_from_file_location("xla_ops_cuda_libraries", _TABLE)
assert _spec is not None and _spec.loader is not None
_table = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_table)

# What the plugin opens that comes with the driver.
_OF_THE_DRIVER = ("CudaDriver", "Nvml")


def wheels(cuda: int) -> set[str]:
    """Returns the names of all wheels that carry something for CUDA 12 or 13."""
    return {part.places[cuda].wheel for part in _table.PARTS}


def opened(plugin: bytes) -> dict[str, str]:
    """Returns what `plugin` opens, each with its wheel, "the driver" or "unknown".

    Raises:
        ValueError: it is no such plugin.
    """
    cuda = 13 if b"../nvidia/cu13\0" in plugin else 12
    names = re.findall(rb"Get([A-Z]\w+?)DsoHandleEv", plugin)
    if not names:
        raise ValueError("must be XLA's CUDA plugin, got a file without its loader")
    known = dict.fromkeys(_OF_THE_DRIVER, "the driver")
    known |= {p.loaders[0]: p.places[cuda].wheel for p in _table.PARTS if p.loaders}
    found = {}
    for name in sorted({name.decode() for name in names}):
        found[name] = known.get(name, "unknown")
    for part in _table.PARTS:
        file = pathlib.PurePath(part.places[cuda].path).name
        if not part.loaders and file.encode() in plugin:
            found[file] = part.places[cuda].wheel
    return found


def read_plugin(path: pathlib.Path) -> bytes:
    if path.suffix != ".whl":
        return path.read_bytes()
    with zipfile.ZipFile(path) as wheel:
        (name,) = [n for n in wheel.namelist() if n.endswith("/xla_cuda_plugin.so")]
        return wheel.read(name)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=pathlib.Path, nargs="+", metavar="FILE")
    status = 0
    for path in parser.parse_args(argv).files:
        try:
            found = opened(read_plugin(path))
        except (OSError, ValueError) as error:
            print(f"{path}: {error}", file=sys.stderr)
            return 1
        print(f"{path.name}:")
        for name, wheel in found.items():
            print(f"  {name:16} {wheel}")
            status = 1 if wheel == "unknown" else status
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
