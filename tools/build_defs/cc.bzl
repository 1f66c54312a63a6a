"""How C++ of this project is compiled and linked."""

COPTS = [
    "-std=c++17",
    "-O3",
    "-march=x86-64-v2",
    "-ffunction-sections",
    "-fdata-sections",
    "-fvisibility=hidden",
    "-fvisibility-inlines-hidden",
    "-Wall",
    "-Wextra",
    "-Werror",
]

def shared_object(name, exports, needs_all_symbols = True, linkopts = [], **kwargs):
    """A shared object for the wheel: few exports, nothing undefined.

    libstdc++ is linked statically by an option in .bazelrc.

    Args:
      name: file name.
      exports: linker version script that lists the exported symbols.
      needs_all_symbols: False for Python extensions, whose interpreter
        brings symbols that no library holds.
      linkopts: further options of the linker.
      **kwargs: further arguments of cc_binary.
    """
    defs = ["-Wl,-z,defs"] if needs_all_symbols else []
    native.cc_binary(
        name = name,
        additional_linker_inputs = [exports],
        copts = COPTS,
        linkopts = [
            "-Wl,--version-script=$(location %s)" % exports,
            "-Wl,--as-needed",
            # Unused parts of libstdc++.a would ask for a newer glibc. gold,
            # which Bazel prefers, drops the code and keeps the demand.
            "-Wl,--gc-sections",
            "-fuse-ld=bfd",
            "-static-libgcc",
        ] + defs + linkopts,
        linkshared = True,
        linkstatic = True,
        **kwargs
    )
