"""The list of ops, and what is built of each.

To add an op, add its name to OPS and its files: xla_ops/cc/ops/NAME/ and
xla_ops/py/ops/NAME.py. In xla_ops/cc/ops/NAME/ the file's name says what it is
for:

    *.h, *.cuh       contract, parameters, launchers, device code
    *_cpu.cc         the CPU kernel and handler
    *_cuda.cc        the CUDA handler
    *.cu.cc          CUDA kernels, compiled by nvcc; *_sm90.cu.cc for compute
                     capability 9.0a alone
    *_test.cc        C++ tests
    any other *.cc   code of both handlers, such as checks
"""

load("//third_party/cuda:cuda.bzl", "CUDA_ONLY", "cuda_objects")
load("//tools/build_defs:cc.bzl", "COPTS", "shared_object")
load("//tools/build_defs:tests.bzl", "xla_ops_cc_test")

OPS = [
    "activation",
    "attention",
    "copy_blocks",
    "fp8_quant",
    "fused_add_rms_norm",
    "int8_quant",
    "merge_attn_states",
    "reshape_and_cache_flash",
    "rms_norm",
    "rms_norm_quant",
    "rotary_embedding",
]

# The end of a .cu.cc file's name, and the capabilities that it is for.
_ARCHS_OF_SUFFIX = {
    "_sm90": ["9.0a"],
    "_sm100": ["10.0a"],
}

def xla_custom_call_libraries(name):
    """Static libraries and C++ tests of an op; for //xla_ops/cc/ops/BUILD.

    Makes NAME_cpu, NAME_cuda and NAME_test.

    Args:
      name: the op.
    """
    folder = name + "/"
    headers = native.glob([folder + "*.h"])
    device_headers = native.glob([folder + "*.cuh"])
    shared = native.glob(
        [folder + "*.cc"],
        exclude = [folder + e for e in ["*_cpu.cc", "*_cuda.cc", "*.cu.cc", "*_test.cc"]],
    )
    native.cc_library(
        name = name + "_cpu",
        srcs = shared + native.glob([folder + "*_cpu.cc"]),
        hdrs = headers,
        copts = COPTS,
        linkstatic = True,
        visibility = ["//visibility:public"],
        deps = ["//xla_ops/cc/core"],
        alwayslink = True,
    )

    kernels = native.glob([folder + "*.cu.cc"])
    groups = {}
    for source in kernels:
        suffix = ""
        for candidate in _ARCHS_OF_SUFFIX:
            if source.endswith(candidate + ".cu.cc"):
                suffix = candidate
        groups.setdefault(suffix, []).append(source)
    objects = []
    for suffix, sources in groups.items():
        objects.append(":%s_kernels%s" % (name, suffix))
        cuda_objects(
            name = "%s_kernels%s" % (name, suffix),
            srcs = sources,
            hdrs = headers + device_headers,
            archs_only = _ARCHS_OF_SUFFIX.get(suffix, []),
            target_compatible_with = CUDA_ONLY,
            deps = [
                "//xla_ops/cc/core:portable",
                "//xla_ops/cc/device",
            ],
        )
    native.cc_library(
        name = name + "_cuda",
        srcs = shared + native.glob([folder + "*_cuda.cc"]) + objects,
        hdrs = headers,
        copts = COPTS,
        linkstatic = True,
        target_compatible_with = CUDA_ONLY,
        visibility = ["//visibility:public"],
        deps = [
            "//third_party/cuda:cudart_static",
            "//xla_ops/cc/core",
            "//xla_ops/cc/device",
            "//xla_ops/cc/device:archs",
            "//xla_ops/cc/device:cuda_handler",
        ],
        alwayslink = True,
    )

    for test in native.glob([folder + "*_test.cc"]):
        xla_ops_cc_test(
            name = test[len(folder):-len(".cc")],
            srcs = [test],
            deps = [
                ":%s_cpu" % name,
                "//xla_ops/cc/core:call_frame",
                "//xla_ops/cc/core:testing",
            ],
        )

def xla_custom_call(name):
    """The shared objects and the py_library of an op; for //xla_ops/BUILD.

    Makes libxla_ops_NAME_cpu.so, libxla_ops_NAME_cuda.so and NAME.

    Args:
      name: the op.
    """
    exports = "//tools/build_defs:exports_op.lds"
    shared_object(
        name = "libxla_ops_%s_cpu.so" % name,
        exports = exports,
        deps = ["//xla_ops/cc/ops:%s_cpu" % name],
    )
    shared_object(
        name = "libxla_ops_%s_cuda.so" % name,
        exports = exports,
        target_compatible_with = CUDA_ONLY,
        deps = ["//xla_ops/cc/ops:%s_cuda" % name],
    )
    native.py_library(
        name = name,
        srcs = ["//xla_ops/py:ops/%s.py" % name],
        data = [":libxla_ops_%s_cpu.so" % name] + select({
            "//third_party/cuda:cpu_only": [],
            "//conditions:default": [":libxla_ops_%s_cuda.so" % name],
        }),
        deps = ["//xla_ops/py"],
    )
