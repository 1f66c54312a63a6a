"""What the wheel says of itself: METADATA, WHEEL and entry points."""

NAME = "xla_ops"
# What an installation adds to sys.path's folder.
TOP_LEVEL = (NAME, "xla_ops_pjrt")
SUMMARY = "CUDA kernels inside PyTorch/XLA graphs, as typed-FFI custom calls"

REQUIRES = ["torch==2.9.0", "torch_xla==2.9.0"]

# The plugins that libxla_ops_pjrt.so wraps; a CUDA 13 one begins at 0.7.2.
EXTRAS = {
    "cuda12": ["jax-cuda12-pjrt>=0.7.1"],
    "cuda13": ["jax-cuda13-pjrt>=0.7.2"],
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
"""

CLASSIFIERS = [
    "Development Status :: 3 - Alpha",
    "Operating System :: POSIX :: Linux",
    "Programming Language :: C++",
    "Programming Language :: Python :: 3",
    "Topic :: Scientific/Engineering :: Artificial Intelligence",
]


def metadata(version: str, python: str, readme: str, licenses: list[str]) -> str:
    """Returns METADATA for the interpreter `python`, such as "3.11"."""
    minor = int(python.split(".")[1])
    lines = [
        "Metadata-Version: 2.4",
        f"Name: {NAME}",
        f"Version: {version}",
        f"Summary: {SUMMARY}",
        "License-Expression: Apache-2.0",
        *(f"License-File: {name}" for name in licenses),
        *(f"Classifier: {name}" for name in CLASSIFIERS),
        f"Classifier: Programming Language :: Python :: {python}",
        f"Requires-Python: >=3.{minor},<3.{minor + 1}",
        *(f"Requires-Dist: {requirement}" for requirement in REQUIRES),
    ]
    for extra, requirements in EXTRAS.items():
        lines.append(f"Provides-Extra: {extra}")
        for requirement in requirements:
            lines.append(f'Requires-Dist: {requirement}; extra == "{extra}"')
    if readme:
        lines.append("Description-Content-Type: text/markdown")
    return "\n".join(lines) + "\n\n" + readme


def wheel(tag: str) -> str:
    """Returns WHEEL for a full tag such as cp311-cp311-manylinux_2_34_x86_64."""
    return (
        "Wheel-Version: 1.0\n"
        "Generator: xla_ops tools/wheel\n"
        "Root-Is-Purelib: false\n"
        f"Tag: {tag}\n"
    )
