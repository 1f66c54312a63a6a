"""How C++ of this project is compiled and linked."""

COPTS = [
    "-std=c++17",
    "-O3",
    "-march=x86-64-v2",
    # A square root is one instruction, and no call for the sake of errno.
    "-fno-math-errno",
    "-ffunction-sections",
    "-fdata-sections",
    "-fvisibility=hidden",
    "-fvisibility-inlines-hidden",
    "-Wall",
    "-Wextra",
    "-Werror",
]

# In place of what this machine's glibc calls so.
_STAND_INS = [
    "//third_party/glibc:libdl.so.2",
    "//third_party/glibc:libpthread.so.0",
    "//third_party/glibc:librt.so.1",
]

def shared_object(
        name,
        exports,
        needs_all_symbols = True,
        deps = [],
        linkopts = [],
        finds = [],
        **kwargs):
    """A shared object for the wheel: few exports, nothing undefined.

    It loads with glibc 2.28, whatever this machine has (docs/adr/0002):
    libstdc++ is linked statically, glibc by the versions that it had then.

    Args:
      name: file name.
      exports: linker version script that lists the exported symbols.
      needs_all_symbols: False for Python extensions, whose interpreter
        brings symbols that no library holds.
      deps: libraries, linked statically.
      linkopts: further options of the linker.
      finds: stand-ins of libraries that the process has; what is missing is
        taken from them when the object is loaded.
      **kwargs: further arguments of cc_binary.
    """
    defs = ["-Wl,-z,defs"] if needs_all_symbols and not finds else []
    found = ["-Wl,--no-as-needed"] if finds else []
    found += ["$(location %s)" % f for f in finds]
    native.cc_binary(
        name = name,
        additional_linker_inputs = [exports] + _STAND_INS + finds,
        copts = COPTS,
        linkopts = [
            "-Wl,--version-script=$(location %s)" % exports,
            "-Wl,--as-needed",
            # Unused parts of libstdc++.a would ask for a newer glibc. gold,
            # which Bazel prefers, drops the code and keeps the demand.
            "-Wl,--gc-sections",
            "-fuse-ld=bfd",
            # --as-needed takes what is asked for so far: libstdc++ comes first.
            "-l:libstdc++.a",
        ] + ["-Wl,$(location %s)" % s for s in _STAND_INS] + defs + linkopts + found,
        linkshared = True,
        linkstatic = True,
        deps = deps + ["//third_party/glibc:added"],
        **kwargs
    )
