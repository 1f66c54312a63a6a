"""What of CUDA XLA's plugin opens, where it looks, and which wheels bring it.

The plugin links to none of it, and its wheel requires none: it opens a library by name
when a program first needs it, and reads the compiler's files from a folder beside it.
So what is missing is found out by the first matmul, not by pip.

The one table of this. The wheel's extras are held to it (tests/tools/test_extras.py),
and tools/wheel/cuda_libraries.py holds it to the plugins. It imports nothing of the
package, so that tools can load it by its path.

Tested by tests/gpu/test_cuda_libraries.py.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import mmap
import os
import pathlib
import re
import shlex
from collections.abc import Iterable, Mapping
from typing import NamedTuple


class Place(NamedTuple):
    """Where a wheel has a part, below its folder nvidia/."""

    path: str
    wheel: str


class Part(NamedTuple):
    """One file that XLA:GPU opens.

    Attributes:
        name: what people call it.
        use: what fails without it.
        loaders: what of the plugin opens it, as its symbols name that
            (Get<loader>DsoHandle): the part's own, then those of parts that link to it
            or open it. None where the plugin reads the file itself.
        places: of each CUDA, 12 and 13.
        optional: whether no program fails without it.
    """

    name: str
    use: str
    loaders: tuple[str, ...]
    places: dict[int, Place]
    optional: bool = False


def _part(
    name: str,
    use: str,
    loaders: tuple[str, ...],
    cuda12: tuple[str, str],
    cuda13: tuple[str, str],
    optional: bool = False,
) -> Part:
    return Part(name, use, loaders, {12: Place(*cuda12), 13: Place(*cuda13)}, optional)


# ptxas compiles every kernel: the plugins 0.7.2 and 0.11.2 are built without
# libnvptxcompiler and libnvjitlink. They also look for nvlink, which no wheel of CUDA
# 12 has, and link in one piece without it.
PARTS = (
    _part(
        "CUDA runtime",
        "every program",
        ("CudaRuntime",),
        ("cuda_runtime/lib/libcudart.so.12", "nvidia-cuda-runtime-cu12"),
        ("cu13/lib/libcudart.so.13", "nvidia-cuda-runtime"),
    ),
    _part(
        "ptxas",
        "every kernel that XLA makes",
        (),
        ("cuda_nvcc/bin/ptxas", "nvidia-cuda-nvcc-cu12"),
        ("cu13/bin/ptxas", "nvidia-cuda-nvcc"),
    ),
    _part(
        "libdevice",
        "exp, tanh and other functions",
        (),
        ("cuda_nvcc/nvvm/libdevice/libdevice.10.bc", "nvidia-cuda-nvcc-cu12"),
        ("cu13/nvvm/libdevice/libdevice.10.bc", "nvidia-nvvm"),
    ),
    _part(
        "cuBLAS",
        "matrix products",
        ("Cublas",),
        ("cublas/lib/libcublas.so.12", "nvidia-cublas-cu12"),
        ("cu13/lib/libcublas.so.13", "nvidia-cublas"),
    ),
    _part(
        "cuBLASLt",
        "matrix products",
        ("CublasLt",),
        ("cublas/lib/libcublasLt.so.12", "nvidia-cublas-cu12"),
        ("cu13/lib/libcublasLt.so.13", "nvidia-cublas"),
    ),
    _part(
        "cuDNN",
        "convolutions, and fusions of matrix products",
        ("Cudnn",),
        ("cudnn/lib/libcudnn.so.9", "nvidia-cudnn-cu12"),
        ("cudnn/lib/libcudnn.so.9", "nvidia-cudnn-cu13"),
    ),
    _part(
        "NVRTC",
        "kernels that cuDNN makes",
        ("Nvrtc", "Cudnn"),
        ("cuda_nvrtc/lib/libnvrtc.so.12", "nvidia-cuda-nvrtc-cu12"),
        ("cu13/lib/libnvrtc.so.13", "nvidia-cuda-nvrtc"),
    ),
    _part(
        "NCCL",
        "collectives over several GPUs",
        ("Nccl",),
        ("nccl/lib/libnccl.so.2", "nvidia-nccl-cu12"),
        ("nccl/lib/libnccl.so.2", "nvidia-nccl-cu13"),
    ),
    _part(
        "cuFFT",
        "Fourier transforms",
        ("Cufft",),
        ("cufft/lib/libcufft.so.11", "nvidia-cufft-cu12"),
        ("cu13/lib/libcufft.so.12", "nvidia-cufft"),
    ),
    _part(
        "cuSOLVER",
        "decompositions",
        ("Cusolver",),
        ("cusolver/lib/libcusolver.so.11", "nvidia-cusolver-cu12"),
        ("cu13/lib/libcusolver.so.12", "nvidia-cusolver"),
    ),
    _part(
        "cuSPARSE",
        "decompositions",
        ("Cusparse", "Cusolver"),
        ("cusparse/lib/libcusparse.so.12", "nvidia-cusparse-cu12"),
        ("cu13/lib/libcusparse.so.12", "nvidia-cusparse"),
    ),
    _part(
        "nvJitLink",
        "decompositions",
        ("NvJitLink", "Cusolver"),
        ("nvjitlink/lib/libnvJitLink.so.12", "nvidia-nvjitlink-cu12"),
        ("cu13/lib/libnvJitLink.so.13", "nvidia-nvjitlink"),
    ),
    _part(
        "CUPTI",
        "profiles",
        ("Cupti",),
        ("cuda_cupti/lib/libcupti.so.12", "nvidia-cuda-cupti-cu12"),
        ("cu13/lib/libcupti.so.13", "nvidia-cuda-cupti"),
        optional=True,
    ),
    _part(
        "NVSHMEM",
        "collectives by NVSHMEM",
        ("Nvshmem",),
        ("nvshmem/lib/libnvshmem_host.so.3", "nvidia-nvshmem-cu12"),
        ("nvshmem/lib/libnvshmem_host.so.3", "nvidia-nvshmem-cu13"),
        optional=True,
    ),
)


def loaders_of(plugin: pathlib.Path) -> set[str]:
    """What the plugin's symbols name as opening something; takes a second."""
    with open(plugin, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return set()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            found = re.findall(rb"Get([A-Z]\w+?)DsoHandleEv", data)
    return {name.decode() for name in found}


def opened(plugin: pathlib.Path) -> list[Part]:
    """The parts that the plugin at `plugin` opens; all where it does not tell."""
    found = loaders_of(plugin)
    return [p for p in PARTS if not (found and p.loaders) or found & set(p.loaders)]


def missing(plugin: pathlib.Path, cuda: int, environ: Mapping[str, str]) -> list[Part]:
    """What the plugin at `plugin`, for CUDA 12 or 13, would look for in vain."""
    return [p for p in opened(plugin) if find(p, plugin, cuda, environ) is None]


def beside(plugin: pathlib.Path, cuda: int) -> list[tuple[Part, str]]:
    """What NVIDIA's wheels beside the plugin have of the parts, and where."""
    found = []
    for part in PARTS:
        files = (base / part.places[cuda].path for base in _beside(plugin))
        file = _first(file for file in files if file.is_file())
        if file is not None:
            found.append((part, file))
    return found


def pip_line(parts: Iterable[Part], cuda: int, *, anew: bool = False) -> str:
    """The command that brings the parts, in the versions that xla_ops asks for.

    Args:
        parts: what is to be brought.
        cuda: 12 or 13.
        anew: whether pip takes them for installed, as where a file is broken.
    """
    wheels = dict.fromkeys(part.places[cuda].wheel for part in parts)
    line = ["pip install", *(["--force-reinstall --no-deps"] if anew else [])]
    return " ".join([*line, *(shlex.quote(_requirement(w)) for w in wheels)])


def _requirement(wheel: str) -> str:
    """The wheel with the bounds that the extras of xla_ops have for it."""
    try:
        texts = importlib.metadata.requires("xla_ops") or []
    except importlib.metadata.PackageNotFoundError:
        texts = []
    for text in texts:
        requirement = text.partition(";")[0].strip()
        if re.split(r"[^\w.-]", requirement)[0] == wheel:
            return requirement.replace(" ", "")
    return wheel


def find(
    part: Part, plugin: pathlib.Path, cuda: int, environ: Mapping[str, str]
) -> str | None:
    """Where the plugin would find a part; None if nowhere.

    A library: in NVIDIA's wheels beside the plugin (its RPATH), then wherever the
    loader looks; a name is enough where this process has it already. ptxas: in the
    folder that XLA_FLAGS names, on PATH, then in the roots of CUDA. libdevice: in the
    first of those folders that has any.
    """
    place = part.places[cuda]
    relative = pathlib.PurePosixPath(place.path)
    folder, *below = relative.parts
    if part.name == "ptxas":
        path = environ.get("PATH", "").split(os.pathsep)
        roots = _roots(plugin, folder, environ)
        first, *others = [root.joinpath(*below) for root in roots]
        candidates = [first, *(pathlib.Path(p, "ptxas") for p in path if p), *others]
        return _first(p for p in candidates if p.is_file() and os.access(p, os.X_OK))
    if part.name == "libdevice":
        files = (root.joinpath(*below) for root in _roots(plugin, folder, environ))
        first_folder = next((file for file in files if file.parent.is_dir()), None)
        return _first(f for f in (first_folder,) if f is not None and f.is_file())
    for base in _beside(plugin):
        if (base / relative).is_file():
            return str(base / relative)
    try:
        ctypes.CDLL(relative.name)
    except OSError:
        return None
    return relative.name


def _first(paths: Iterable[pathlib.Path]) -> str | None:
    return next((str(path) for path in paths), None)


def _beside(plugin: pathlib.Path) -> list[pathlib.Path]:
    """The folders nvidia/ that the plugin looks into."""
    return [folder / "nvidia" for folder in plugin.parents[1:3]]


def _roots(
    plugin: pathlib.Path, folder: str, environ: Mapping[str, str]
) -> list[pathlib.Path]:
    """Where XLA looks for the files of a CUDA toolkit, in its order."""
    flag = r"--xla_gpu_cuda_data_dir=(\S+)"
    chosen = re.findall(flag, environ.get("XLA_FLAGS", "")) or ["./cuda_sdk_lib"]
    return [
        pathlib.Path(chosen[-1]),
        pathlib.Path("/usr/local/cuda"),
        pathlib.Path("/opt/cuda"),
        *(base / folder for base in _beside(plugin)),
        plugin.parent / "cuda",
    ]
