#!/usr/bin/env python3
"""Says what XLA's CUDA plugin opens of CUDA, and which wheels carry it.

    python3 tools/wheel/cuda_libraries.py FILE...

A FILE is xla_cuda_plugin.so or the wheel that it is in, jax_cuda1N_pjrt-*.whl. Exit
status 1 if the tables below, of which tests/tools/test_extras.py makes sure that the
extras of xla_ops bring it all, lack something.

The plugin links to none of it, and its wheel requires none: it opens a library by name
when a program first needs it, and reads the compiler's files from a folder beside it.
So what is missing is found out by the first matmul, not by pip.
"""

import argparse
import pathlib
import re
import sys
import zipfile

CUDAS = (12, 13)

# From the name in the plugin's symbols (GetCublasLtDsoHandle) to the wheels of CUDA 12
# and CUDA 13; None for what comes with the driver.
LIBRARIES = {
    "Cublas": ("nvidia-cublas-cu12", "nvidia-cublas"),
    "CublasLt": ("nvidia-cublas-cu12", "nvidia-cublas"),
    "CudaDriver": None,
    "CudaRuntime": ("nvidia-cuda-runtime-cu12", "nvidia-cuda-runtime"),
    "Cudnn": ("nvidia-cudnn-cu12", "nvidia-cudnn-cu13"),
    "Cufft": ("nvidia-cufft-cu12", "nvidia-cufft"),
    "Cupti": ("nvidia-cuda-cupti-cu12", "nvidia-cuda-cupti"),
    "Cusolver": ("nvidia-cusolver-cu12", "nvidia-cusolver"),
    "Nccl": ("nvidia-nccl-cu12", "nvidia-nccl-cu13"),
    "NvJitLink": ("nvidia-nvjitlink-cu12", "nvidia-nvjitlink"),
    "Nvml": None,
    "Nvrtc": ("nvidia-cuda-nvrtc-cu12", "nvidia-cuda-nvrtc"),
    "Nvshmem": ("nvidia-nvshmem-cu12", "nvidia-nvshmem-cu13"),
}

# Files of the compiler, which the plugin names in strings. It also looks for nvlink,
# which no wheel of CUDA 12 has, and links in one piece without it.
FILES = {
    "ptxas": ("nvidia-cuda-nvcc-cu12", "nvidia-cuda-nvcc"),
    "libdevice.10.bc": ("nvidia-cuda-nvcc-cu12", "nvidia-nvvm"),
}

# What the libraries above link to themselves.
INDIRECT = {
    "libcusparse": ("nvidia-cusparse-cu12", "nvidia-cusparse"),
}


def wheels(cuda: int) -> set[str]:
    """Returns the names of all wheels that carry something for CUDA 12 or 13."""
    tables = [*LIBRARIES.values(), *FILES.values(), *INDIRECT.values()]
    return {entry[CUDAS.index(cuda)] for entry in tables if entry is not None}


def opened(plugin: bytes) -> dict[str, str]:
    """Returns what `plugin` opens, each with its wheel, "the driver" or "unknown".

    Raises:
        ValueError: it is no such plugin.
    """
    column = CUDAS.index(13 if b"../nvidia/cu13\0" in plugin else 12)
    names = re.findall(rb"Get([A-Z]\w+?)DsoHandleEv", plugin)
    if not names:
        raise ValueError("must be XLA's CUDA plugin, got a file without its loader")
    found = {}
    for name in sorted({name.decode() for name in names}):
        entry = LIBRARIES.get(name, ("unknown", "unknown"))
        found[name] = "the driver" if entry is None else entry[column]
    for name, entry in FILES.items():
        if name.encode() in plugin:
            found[name] = entry[column]
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
