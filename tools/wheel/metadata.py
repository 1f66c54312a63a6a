"""What the wheel says of itself: METADATA, WHEEL and entry points.

`metadata.py EXTRA` prints what an extra asks for, one requirement a line.
"""

import sys

import readme

NAME = "xla_ops"
# What an installation adds to sys.path's folder.
TOP_LEVEL = (NAME, "xla_ops_pjrt", "xla_ops_vllm")
SUMMARY = "CUDA kernels inside PyTorch/XLA graphs, as typed-FFI custom calls"
AUTHOR = "The xla_ops authors"
KEYWORDS = ["attention", "cuda", "custom call", "ffi", "kv cache", "llm", "pjrt"]
KEYWORDS += ["pytorch", "torch_xla", "xla"]

# Where the sources are; the one place that says so.
REPOSITORY = "https://github.com/xla-ops/xla_ops"
URLS = {
    "Source": REPOSITORY,
    "Documentation": f"{REPOSITORY}/tree/main/docs",
    "Changelog": f"{REPOSITORY}/blob/main/CHANGELOG.md",
    "Issues": f"{REPOSITORY}/issues",
}

REQUIRES = ["torch==2.9.0", "torch_xla==2.9.0"]

# The plugins that libxla_ops_pjrt.so wraps, from the oldest to the newest line that
# were looked at, and all that they open (cuda_libraries.py): their own wheels ask for
# nothing. Lower bounds are those of JAX, upper ones the next major version.
# What torch 2.9.0 pins for CUDA 12 fits (docs/adr/0003-hermetic-cuda.md). NVIDIA's
# bindings are for xla_ops.extend, which compiles by NVRTC.
EXTRAS = {
    "cuda12": [
        "cuda-bindings>=12.9,<13",
        "jax-cuda12-pjrt>=0.7.1,<0.13",
        "nvidia-cublas-cu12>=12.1.3.1,<13",
        "nvidia-cuda-cupti-cu12>=12.1.105,<13",
        "nvidia-cuda-nvcc-cu12>=12.6.85,<13",
        "nvidia-cuda-nvrtc-cu12>=12.1.55,<13",
        "nvidia-cuda-runtime-cu12>=12.1.105,<13",
        "nvidia-cudnn-cu12>=9.10.2.21,<10",
        "nvidia-cufft-cu12>=11.0.2.54,<12",
        "nvidia-cusolver-cu12>=11.4.5.107,<12",
        "nvidia-cusparse-cu12>=12.1.0.106,<13",
        "nvidia-nccl-cu12>=2.18.1,<3",
        "nvidia-nvjitlink-cu12>=12.1.105,<13",
        "nvidia-nvshmem-cu12>=3.2.5,<4",
    ],
    "cuda13": [
        "cuda-bindings>=13.0,<14",
        "jax-cuda13-pjrt>=0.7.2,<0.13",
        "nvidia-cublas>=13.0.0.19,<14",
        "nvidia-cuda-cupti>=13.0.48,<14",
        "nvidia-cuda-nvcc>=13.0.48,<14",
        "nvidia-cuda-nvrtc>=13.0.48,<14",
        "nvidia-cuda-runtime>=13.0.48,<14",
        "nvidia-cudnn-cu13>=9.12.0.46,<10",
        "nvidia-cufft>=12.0.0.15,<13",
        "nvidia-cusolver>=12.0.3.29,<13",
        "nvidia-cusparse>=12.6.2.49,<13",
        "nvidia-nccl-cu13>=2.27.7,<3",
        "nvidia-nvjitlink>=13.0.39,<14",
        "nvidia-nvshmem-cu13>=3.3.20,<4",
        "nvidia-nvvm>=13.0.48,<14",
    ],
    # What xla_ops.jax runs with; JAX's own extras bring its CUDA plugin.
    "jax": ["jax>=0.7.1,<0.13"],
}

# torch_xla registers the plugin under these names when it is imported, so
# PJRT_DEVICE=GPU and PJRT_DEVICE=CUDA both work. torch.compile looks a backend up
# by its name here.
ENTRY_POINTS = """\
[torch_dynamo_backends]
xla_ops = xla_ops.programs.backend:backend

[torch_xla.plugins]
CUDA = xla_ops_pjrt:GpuPlugin
GPU = xla_ops_pjrt:GpuPlugin

[vllm.platform_plugins]
xla_ops = xla_ops_vllm:register
"""

CLASSIFIERS = [
    "Development Status :: 3 - Alpha",
    "Operating System :: POSIX :: Linux",
    "Programming Language :: C++",
    "Programming Language :: Python :: 3",
    "Topic :: Scientific/Engineering :: Artificial Intelligence",
]


def metadata(version: str, python: str, description: str, licenses: list[str]) -> str:
    """Returns METADATA for the interpreter `python`, such as "3.11".

    Args:
        version: of the package.
        python: the interpreter's version.
        description: README.md, or nothing.
        licenses: file names.
    """
    minor = int(python.split(".")[1])
    lines = [
        "Metadata-Version: 2.4",
        f"Name: {NAME}",
        f"Version: {version}",
        f"Summary: {SUMMARY}",
        f"Author: {AUTHOR}",
        f"Keywords: {','.join(KEYWORDS)}",
        *(f"Project-URL: {label}, {url}" for label, url in URLS.items()),
        "License-Expression: Apache-2.0",
        *(f"License-File: {name}" for name in licenses),
        *(f"Classifier: {name}" for name in CLASSIFIERS),
        f"Classifier: Programming Language :: Python :: {python}",
        f"Requires-Python: >=3.{minor},<3.{minor + 1}",
        *(f"Requires-Dist: {requirement}" for requirement in REQUIRES),
    ]
    for extra, requirements in EXTRAS.items():
        lines.append(f"Provides-Extra: {extra}")
        lines += [f'Requires-Dist: {r}; extra == "{extra}"' for r in requirements]
    if description:
        lines.append("Description-Content-Type: text/markdown")
        description = readme.absolute_links(description, REPOSITORY, f"v{version}")
    return "\n".join(lines) + "\n\n" + description


def wheel(tag: str) -> str:
    """Returns WHEEL for a full tag such as cp311-cp311-manylinux_2_34_x86_64."""
    return (
        "Wheel-Version: 1.0\n"
        "Generator: xla_ops tools/wheel\n"
        "Root-Is-Purelib: false\n"
        f"Tag: {tag}\n"
    )


if __name__ == "__main__":
    print("\n".join(EXTRAS[sys.argv[1]]))
