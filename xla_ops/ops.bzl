"""The list of ops, and what is built of each.

To add an op, add its name to OPS and its files: xla_ops/cc/ops/NAME/ and
xla_ops/py/ops/NAME.py. In xla_ops/cc/ops/NAME/ the end of a file's name says
what it is for; a file that it says nothing of is an error:

    *.h, *.cuh       contract, parameters, launchers, device code
    *_cpu.cc         the CPU kernel and handler
    *_cuda.cc        the CUDA handler
    *.cu.cc          CUDA kernels, compiled by nvcc; *_sm90.cu.cc for compute
                     capability 9.0a alone, and left out of a build without
                     it: the macro XLA_OPS_BUILT_SM90, 0 or 1, says so
    *_test.cc        C++ tests
    NAME.cc and      code of both handlers, such as checks
    *_shared.cc
"""

load("//third_party/cuda:archs.bzl", "CAPABILITY_OF_SUFFIX")
load("//third_party/cuda:cuda.bzl", "CUDA_ONLY", "cuda_objects")
load("//tools/build_defs:cc.bzl", "COPTS", "shared_object")
load("//tools/build_defs:tests.bzl", "xla_ops_cc_test")

OPS = [
    "activation",
    "apply_repetition_penalties",
    "attention",
    "attention_backward",
    "copy_blocks",
    "fp8_quant",
    "fused_add_rms_norm",
    "fused_qk_norm_rope",
    "fused_qk_norm_rope_and_cache",
    "grouped_matmul",
    "int8_quant",
    "merge_attn_states",
    "reshape_and_cache",
    "reshape_and_cache_flash",
    "rms_norm",
    "rms_norm_quant",
    "rotary_embedding",
]

# Ops whose handlers and kernels use another op's NAME.cc and headers.
_USES = {
    "attention": "fused_qk_norm_rope_and_cache",
    "attention_backward": "attention",
}

# Those that run the other op's kernels too: its kernels, and *_kernel_cpu.cc.
_RUNS = ["attention"]

# Handlers for the CPU client alone, and no ops of Python's: what XLA brings for
# GPUs itself. Their folders have no CUDA files.
HOST_OPS = ["host_collective"]

# Handlers for GPUs alone, between processes, and no ops of Python's. Their folders
# have no CPU files.
GPU_OPS = ["peer_collective"]

# Handlers of both platforms, and no ops of Python's own: what programs and the host
# hand to each other.
FEED_OPS = ["host_feed"]

# The end of a file's name, and what the file is for.
_KINDS = {
    ".h": "header",
    ".cuh": "device_header",
    "_cpu.cc": "cpu",
    "_cuda.cc": "cuda",
    "_shared.cc": "shared",
    "_test.cc": "test",
}

_KERNEL_DEPS = [
    "//third_party/cuda:built_define",
    "//xla_ops/cc/core:portable",
    "//xla_ops/cc/device",
]

def source_kind(op, file):
    """Says what a file of an op's folder is for.

    Args:
      op: the op.
      file: the file's name, without its folder.

    Returns:
      header, device_header, cpu, cuda, kernel, kernel_smXY, test or shared.
    """
    if file.endswith(".cu.cc"):
        words = file[:-len(".cu.cc")].split("_")
        archs = [w for w in words if w[:2] == "sm" and w[2:].isdigit()]
        if not archs:
            return "kernel"
        if archs == words[-1:] and archs[0] in CAPABILITY_OF_SUFFIX:
            return "kernel_" + archs[0]
        fail("%s: %s must name no architecture or end in _%s.cu.cc" %
             (op, file, " or _".join(sorted(CAPABILITY_OF_SUFFIX))))
    if file == op + ".cc":
        return "shared"
    for end, kind in _KINDS.items():
        if file.endswith(end):
            return kind
    fail("%s: %s must be %s.cc or end in one of %s or .cu.cc" %
         (op, file, op, ", ".join(sorted(_KINDS))))

def xla_custom_call_libraries(name):
    """Static libraries and C++ tests of an op; for //xla_ops/cc/ops/BUILD.

    Makes NAME_cpu, NAME_cuda and NAME_test. One of HOST_OPS has no NAME_cuda, and one
    of GPU_OPS no NAME_cpu.

    Args:
      name: the op.
    """
    folder = name + "/"
    sources = {}
    for path in native.glob([folder + "*"]):
        kind = source_kind(name, path[len(folder):])
        sources.setdefault(kind, []).append(path)
    if name in _USES:
        used = _USES[name]
        for kind, files in {
            "header": native.glob([used + "/*.h"]),
            "device_header": native.glob([used + "/*.cuh"]),
            "shared": ["%s/%s.cc" % (used, used)] + native.glob([used + "/*_shared.cc"]),
        }.items():
            sources.setdefault(kind, []).extend(files)
        if name in _RUNS:
            sources.setdefault("cpu", []).extend(native.glob([used + "/*_kernel_cpu.cc"]))
    headers = sources.get("header", [])
    shared = sources.get("shared", [])
    if name not in GPU_OPS:
        native.cc_library(
            name = name + "_cpu",
            srcs = shared + sources.get("cpu", []),
            hdrs = headers,
            copts = COPTS,
            linkstatic = True,
            visibility = ["//visibility:public"],
            deps = ["//xla_ops/cc/core"],
            alwayslink = True,
        )

    for test in sources.get("test", []):
        xla_ops_cc_test(
            name = test[len(folder):-len(".cc")],
            srcs = [test],
            deps = [
                ":%s_cpu" % name,
                "//xla_ops/cc/core:call_frame",
                "//xla_ops/cc/core:testing",
            ],
        )
    if name in HOST_OPS:
        return

    objects = [":%s_objects" % _USES[name]] if name in _RUNS else []
    for suffix in [""] + CAPABILITY_OF_SUFFIX.keys():
        end = "_" + suffix if suffix else ""
        kernels = sources.get("kernel" + end, [])
        if not kernels:
            continue
        objects.append(":%s_kernels%s" % (name, end))
        cuda_objects(
            name = "%s_kernels%s" % (name, end),
            srcs = kernels,
            hdrs = headers + sources.get("device_header", []),
            capability = CAPABILITY_OF_SUFFIX.get(suffix, ""),
            target_compatible_with = CUDA_ONLY,
            deps = _KERNEL_DEPS,
        )

    # In one, since a label without files may not be in a cc_library's srcs.
    native.filegroup(name = name + "_objects", srcs = objects)
    native.cc_library(
        name = name + "_cuda",
        srcs = shared + sources.get("cuda", []) + [":%s_objects" % name],
        hdrs = headers,
        copts = COPTS,
        linkstatic = True,
        target_compatible_with = CUDA_ONLY,
        visibility = ["//visibility:public"],
        deps = [
            "//third_party/cuda:built_define",
            "//third_party/cuda:cudart_static",
            "//xla_ops/cc/core",
            "//xla_ops/cc/device",
            "//xla_ops/cc/device:archs",
            "//xla_ops/cc/device:cuda_handler",
        ],
        alwayslink = True,
    )

def arch_check(name, instead = {}):
    """Kernels of every op, for a build of all architectures that stays short.

    Built without a config, that is, for the release's list, it shows that the
    code of each architecture compiles: other builds and tests take one.

    Args:
      name: a filegroup of their objects.
      instead: op -> the files that stand for all of its own, which take long.
    """
    for op, files in instead.items():
        cuda_objects(
            name = "%s_%s" % (op, name),
            srcs = [op + "/" + file for file in files],
            hdrs = native.glob([
                folder + end
                for folder in [op] + ([_USES[op]] if op in _USES else [])
                for end in ["/*.h", "/*.cuh"]
            ]),
            tags = ["manual"],
            target_compatible_with = CUDA_ONLY,
            deps = _KERNEL_DEPS,
        )
    native.filegroup(
        name = name,
        srcs = [
            ":%s_%s" % (op, name) if op in instead else ":%s_kernels" % op
            for op in OPS + GPU_OPS + FEED_OPS
        ],
        tags = ["manual"],
    )

def xla_custom_call(name):
    """The shared objects and the py_library of an op; for //xla_ops/BUILD.

    Makes libxla_ops_NAME_cpu.so, libxla_ops_NAME_cuda.so and NAME; of one of HOST_OPS
    or GPU_OPS its one library alone, and of FEED_OPS no NAME.

    Args:
      name: the op.
    """
    exports = "//tools/build_defs:exports_op.lds"
    if name not in GPU_OPS:
        shared_object(
            name = "libxla_ops_%s_cpu.so" % name,
            exports = exports,
            deps = ["//xla_ops/cc/ops:%s_cpu" % name],
        )
    if name in HOST_OPS:
        return
    shared_object(
        name = "libxla_ops_%s_cuda.so" % name,
        exports = exports,
        target_compatible_with = CUDA_ONLY,
        deps = ["//xla_ops/cc/ops:%s_cuda" % name],
    )
    if name in GPU_OPS + FEED_OPS:
        return
    native.py_library(
        name = name,
        srcs = ["//xla_ops/py:ops/%s.py" % name],
        data = [":libxla_ops_%s_cpu.so" % name] + select({
            "//third_party/cuda:cpu_only": [],
            "//conditions:default": [":libxla_ops_%s_cuda.so" % name],
        }),
        deps = ["//xla_ops/py"],
    )
