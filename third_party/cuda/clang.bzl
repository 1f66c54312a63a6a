"""@cuda12: clang with the libraries of CUDA 12, for compute capability 7.0.

The wheels of CUDA 12 have no nvcc; they have what clang needs to compile CUDA
itself, except `fatbinary`, which comes from CUDA 13. clang is the machine's
own (Debian and Ubuntu package it), since no wheel holds it: the one tool that
requirements.lock does not pin. See docs/adr/0004-compute-capability-7.0.md.
"""

load("//third_party/pip:pip.bzl", "pip_python", "run_pip_install")
load("//third_party/pip:wheels.bzl", "WHEEL_TARGET")

# Older ones refuse the headers of CUDA 12.
_CLANGS = ["clang++-%d" % version for version in [21, 20, 19, 18, 17, 16]]

# From a wheel's folder to that of the tree which clang expects.
_LAYOUT = {
    "nvidia/cu13/bin/fatbinary": "cu12/bin/fatbinary13",
    "nvidia/cuda_cccl/include": "cu12",
    "nvidia/cuda_nvcc/bin": "cu12",
    "nvidia/cuda_nvcc/include": "cu12",
    "nvidia/cuda_nvcc/nvvm": "cu12",
    "nvidia/cuda_runtime/include": "cu12",
    "nvidia/cuda_runtime/lib": "cu12",
}

def _clang_cuda_impl(ctx):
    clang = None
    for name in _CLANGS:
        clang = clang or ctx.which(name)
    if not clang:
        fail("compute capability 7.0 is built by clang, and none of %s is on " %
             ", ".join(_CLANGS) + "PATH: run `apt-get install clang-19`")
    run_pip_install(
        ctx,
        pip_python(ctx),
        ctx.path(ctx.attr.requirements),
        WHEEL_TARGET + ["--no-compile", "--target", str(ctx.path("wheels"))],
    )
    commands = ["set -eu", "mkdir -p bin cu12/bin"]
    commands += ["cp -r wheels/%s %s" % item for item in _LAYOUT.items()]
    commands += ["rm -r wheels", "chmod +x cu12/bin/*"]
    result = ctx.execute(["sh", "-c", "\n".join(commands)])
    if result.return_code:
        fail(result.stderr)
    ctx.symlink(clang, "bin/clang++")
    ctx.symlink(ctx.path(ctx.attr._curand), "cu12/include/curand_mtgp32_kernel.h")
    ctx.symlink(ctx.path(ctx.attr._fatbinary), "cu12/bin/fatbinary")
    ctx.symlink(ctx.path(ctx.attr.build_file), "BUILD")

clang_cuda = repository_rule(
    implementation = _clang_cuda_impl,
    attrs = {
        "build_file": attr.label(allow_single_file = True, mandatory = True),
        "requirements": attr.label(allow_single_file = True, mandatory = True),
        "_curand": attr.label(
            allow_single_file = True,
            default = "//third_party/cuda/clang:curand_mtgp32_kernel.h",
        ),
        "_fatbinary": attr.label(
            allow_single_file = True,
            default = "//third_party/cuda/clang:fatbinary.sh",
        ),
    },
    environ = ["XLA_OPS_PYTHON"],
    doc = "Makes @NAME//:compiler, clang with CUDA 12.",
)
