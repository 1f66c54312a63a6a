"""Compiles CUDA sources with the pinned compiler."""

load("@bazel_tools//tools/cpp:toolchain_utils.bzl", "find_cpp_toolchain")
load(":archs.bzl", "CudaArchsInfo", "archs_of_capability")

# What CUDA targets carry, so that `--config=cpu` skips them.
CUDA_ONLY = select({
    "//third_party/cuda:cpu_only": ["//third_party/cuda:disabled"],
    "//conditions:default": [],
})

_COMMON_OPTIONS = ["-c", "-std=c++17", "-O3"]

_NVCC_OPTIONS = [
    "-x",
    "cu",
    # constexpr functions of the standard library in device code.
    "--expt-relaxed-constexpr",
    # Every warning is an error, the device compilers' and the host's.
    "--Werror=all-warnings",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra,-Werror",
    # Code of several architectures is compiled at once. What each compiler prints
    # goes through files in TMPDIR, which is set below.
    "--threads=2",
    # Beside the object file, as the names end up in it.
    "--objdir-as-tempdir",
]

_CLANG_OPTIONS = [
    "-x",
    "cuda",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Werror",
    # clang's own view of CUDA 12.9, and what it alone warns of: nvcc is the
    # compiler that keeps the sources free of warnings.
    "-Wno-unknown-cuda-version",
    "-Wno-unknown-attributes",
    "-Wno-sign-compare",
    "-Wno-unused-parameter",
    "--no-cuda-include-ptx=all",
]

def _nvcc_options(archs, host_compiler):
    options = _NVCC_OPTIONS + ["-ccbin", host_compiler]
    for arch in archs:
        code = "sm_" + arch.sm
        if arch.ptx:
            code = "[%s,compute_%s]" % (code, arch.sm)
        options.append("-gencode=arch=compute_%s,code=%s" % (arch.sm, code))
    return options

def _clang_options(archs, compiler):
    # Beside bin/clang++: see clang.bzl.
    root = compiler.dirname[:-len("bin")] + "cu12"
    options = _CLANG_OPTIONS + ["--cuda-path=" + root]
    for arch in archs:
        options.append("--cuda-gpu-arch=sm_" + arch.sm)
        if arch.ptx:
            options.append("--cuda-include-ptx=sm_" + arch.sm)
    return options

def _include_options(context):
    options = []

    # nvcc knows no -iquote.
    for folder in context.quote_includes.to_list() + context.includes.to_list():
        options += ["-I", folder]
    for folder in context.system_includes.to_list():
        options += ["-isystem", folder]
    return options

def _cuda_objects_impl(ctx):
    archs = ctx.attr._archs[CudaArchsInfo].archs
    if ctx.attr.capability:
        archs = archs_of_capability(archs, ctx.attr.capability, ctx.label)
        if not archs:
            return [DefaultInfo()]
    cc_toolchain = find_cpp_toolchain(ctx)
    context = cc_common.merge_cc_infos(
        cc_infos = [dep[CcInfo] for dep in ctx.attr.deps],
    ).compilation_context

    objects = []
    for source in ctx.files.srcs:
        # A linker takes .pic.o into shared objects without asking.
        output = ctx.actions.declare_file("%s/%s.pic.o" % (
            ctx.label.name,
            source.basename[:-len(".cu.cc")],
        ))
        arguments = ctx.actions.args()
        arguments.add_all(_COMMON_OPTIONS)
        if ctx.file._compiler.basename == "nvcc":
            arguments.add_all(
                _nvcc_options(archs, cc_toolchain.compiler_executable),
            )
        else:
            arguments.add_all(_clang_options(archs, ctx.file._compiler))
        arguments.add_all(["-D" + d for d in context.defines.to_list()])
        arguments.add_all(_include_options(context))
        arguments.add_all(ctx.attr.copts)
        arguments.add(source)
        arguments.add("-o", output)

        # Sandboxes share /tmp, and number their processes alike: two compilers
        # would give their files one name there. Bazel sets TMPDIR to /tmp whatever
        # `env` says, hence env(1), which sets it last.
        ctx.actions.run(
            executable = "/usr/bin/env",
            arguments = [
                "TMPDIR=" + output.dirname,
                ctx.file._compiler.path,
                arguments,
            ],
            inputs = depset(
                [source, ctx.file._compiler] + ctx.files.hdrs,
                transitive = [
                    context.headers,
                    ctx.attr._compiler_files.files,
                    cc_toolchain.all_files,
                ],
            ),
            outputs = [output],
            env = {"PATH": "/usr/bin:/bin"},
            mnemonic = "CudaCompile",
            progress_message = "Compiling %s for %s" % (
                source.short_path,
                " ".join([arch.text for arch in archs]),
            ),
        )
        objects.append(output)
    return [DefaultInfo(files = depset(objects))]

cuda_objects = rule(
    implementation = _cuda_objects_impl,
    attrs = {
        "capability": attr.string(
            doc = "The one compute capability that the sources are for, such " +
                  "as 9.0a; all, if empty. Where //third_party/cuda:archs " +
                  "lacks it there are no objects: what calls the sources " +
                  "must ask XLA_OPS_BUILT_SM90 or its like.",
        ),
        "copts": attr.string_list(doc = "Further options of the compiler."),
        "deps": attr.label_list(
            doc = "C++ libraries of which headers are included.",
            providers = [CcInfo],
        ),
        "hdrs": attr.label_list(
            allow_files = [".h", ".cuh"],
            doc = "Headers that the sources include.",
        ),
        "srcs": attr.label_list(allow_files = [".cu.cc"], mandatory = True),
        "_archs": attr.label(
            default = "//third_party/cuda:archs",
            providers = [CudaArchsInfo],
        ),
        "_cc_toolchain": attr.label(
            default = "@bazel_tools//tools/cpp:current_cc_toolchain",
        ),
        "_compiler": attr.label(
            allow_single_file = True,
            default = "//third_party/cuda:compiler",
        ),
        "_compiler_files": attr.label(
            default = "//third_party/cuda:compiler_files",
        ),
    },
    toolchains = ["@bazel_tools//tools/cpp:toolchain_type"],
    doc = "Compiles each .cu.cc into an object, for the `srcs` of a " +
          "cc_binary or cc_library.",
)
