"""A shared library without content, for a linker to find versions in."""

load("@bazel_tools//tools/cpp:toolchain_utils.bzl", "find_cpp_toolchain")

def _stand_in_library_impl(ctx):
    out = ctx.actions.declare_file(ctx.label.name)
    source = ctx.actions.declare_file(ctx.label.name + ".S")
    versions = ctx.actions.declare_file(ctx.label.name + ".lds")
    names = [n for symbols in ctx.attr.symbols.values() for n in symbols]
    ctx.actions.write(source, "".join([
        ".globl {0}\n.type {0}, @function\n{0}:\n".format(name)
        for name in names
    ]) + ".section .note.GNU-stack, \"\", @progbits\n")
    ctx.actions.write(versions, "".join([
        "%s { global: %s; };\n" % (version, "; ".join(symbols))
        for version, symbols in ctx.attr.symbols.items()
    ]))
    cc_toolchain = find_cpp_toolchain(ctx)
    ctx.actions.run(
        executable = cc_toolchain.compiler_executable,
        arguments = [
            "-shared",
            "-nostdlib",
            "-fuse-ld=bfd",
            "-Wl,-soname," + ctx.label.name,
            "-Wl,--version-script=" + versions.path,
            source.path,
            "-o",
            out.path,
        ],
        inputs = depset([source, versions], transitive = [cc_toolchain.all_files]),
        outputs = [out],
        env = {"PATH": "/usr/bin:/bin"},
        mnemonic = "StandInLibrary",
    )
    return [DefaultInfo(files = depset([out]))]

stand_in_library = rule(
    implementation = _stand_in_library_impl,
    attrs = {
        "symbols": attr.string_list_dict(
            doc = "From a version's name to the functions that have it.",
            mandatory = True,
        ),
        "_cc_toolchain": attr.label(
            default = "@bazel_tools//tools/cpp:current_cc_toolchain",
        ),
    },
    toolchains = ["@bazel_tools//tools/cpp:toolchain_type"],
    doc = "Makes a shared library that defines versioned symbols, each " +
          "nowhere. Its name is the target's. Nothing ever loads it.",
)
