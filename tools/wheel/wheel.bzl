"""Rules that pack a wheel, gather several, and unpack one.

Their outputs are folders, since a wheel's file name holds the platform tag,
which is read from the binaries when they are there. The interpreter is the one
that the wheel is for, given by path, and with pyelftools is all that packing
needs.
"""

# Where the sources of the Python package lie; a module beside it in the tree is
# one beside it in the installation.
_PACKAGE = "xla_ops/py/"
_BESIDE = "xla_ops/"

def _destination(file):
    path = file.short_path
    if not path.startswith(_PACKAGE):
        if path.startswith(_BESIDE) and "/" not in path[len(_BESIDE):]:
            return path[len(_BESIDE):]
        fail("srcs must lie in %s or %s, got %s" % (_PACKAGE, _BESIDE, path))
    return "xla_ops/" + path[len(_PACKAGE):]

def _header_destination(file):
    """Returns where a header goes, so that one -I finds all of them."""
    path = file.short_path
    if path.startswith("../"):
        _, _, path = path.partition("/include/")
    if not path:
        fail("headers of others must lie in include/, got %s" % file.short_path)
    return "xla_ops/include/" + path

def _wheel_impl(ctx):
    out = ctx.actions.declare_directory(ctx.label.name)
    arguments = ctx.actions.args()
    arguments.add(ctx.file._build_wheel)
    arguments.add("--out=" + out.path)
    arguments.add("--python-tag=" + ctx.attr.tag)
    versions = [f for f in ctx.files.srcs if f.short_path == _PACKAGE + "version.py"]
    if len(versions) != 1:
        fail("srcs must hold %sversion.py" % _PACKAGE)
    arguments.add("--version-file=" + versions[0].path)
    for file in ctx.files.readme:
        arguments.add("--readme=" + file.path)
    for file in ctx.files.license_files:
        arguments.add("--license=" + file.path)
    for file in ctx.files.srcs:
        arguments.add("--file=%s=%s" % (_destination(file), file.path))
    for file in ctx.files.libs:
        arguments.add("--file=xla_ops/lib/%s=%s" % (file.basename, file.path))
    for file in ctx.files.headers:
        arguments.add("--file=%s=%s" % (_header_destination(file), file.path))
    for file in ctx.files.extension:
        arguments.add("--file=xla_ops/%s=%s" % (file.basename, file.path))
    ctx.actions.run(
        executable = ctx.attr.interpreter,
        arguments = ["-s", arguments],
        env = {
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONPATH": ctx.file._elftools_init.dirname + "/..",
        },
        inputs = ctx.files.srcs + ctx.files.libs + ctx.files.extension +
                 ctx.files.headers +
                 ctx.files.license_files + ctx.files.readme +
                 [ctx.file._build_wheel] + ctx.files._modules +
                 ctx.files._elftools,
        outputs = [out],
        mnemonic = "Wheel",
        progress_message = "Packing the wheel for " + ctx.attr.tag,
    )
    return [DefaultInfo(
        files = depset([out]),
        runfiles = ctx.runfiles(files = [out]),
    )]

wheel = rule(
    implementation = _wheel_impl,
    attrs = {
        "extension": attr.label(
            allow_files = [".so"],
            doc = "The Python extension; goes beside the package's modules.",
        ),
        "headers": attr.label_list(
            allow_files = [".h", ".cuh"],
            doc = "For libraries built elsewhere; go into include/.",
        ),
        "interpreter": attr.string(
            doc = "Path of the interpreter that the wheel is for.",
            mandatory = True,
        ),
        "libs": attr.label_list(
            allow_files = [".so"],
            doc = "Shared objects; go into lib/.",
        ),
        "license_files": attr.label(allow_files = True),
        "readme": attr.label(allow_files = True),
        "srcs": attr.label_list(allow_files = True, mandatory = True),
        "tag": attr.string(doc = "Such as cp311.", mandatory = True),
        "_build_wheel": attr.label(
            allow_single_file = True,
            default = "//tools/wheel:build_wheel.py",
        ),
        "_elftools": attr.label(default = "@elftools"),
        "_elftools_init": attr.label(
            allow_single_file = True,
            default = "@elftools//:elftools/__init__.py",
        ),
        "_modules": attr.label_list(
            allow_files = True,
            default = [
                "//tools/wheel:metadata.py",
                "//tools/wheel:readme.py",
            ],
        ),
    },
    doc = "Packs a wheel into the folder bazel-bin/PACKAGE/NAME.",
)

def _wheel_folder_impl(ctx):
    out = ctx.actions.declare_directory(ctx.label.name)
    arguments = ctx.actions.args()
    arguments.add(out.path)
    arguments.add_all(ctx.files.wheels, expand_directories = False)
    ctx.actions.run_shell(
        command = "out=\"$1\"; shift; for d in \"$@\"; do cp \"$d\"/*.whl \"$out/\"; done",
        arguments = [arguments],
        inputs = ctx.files.wheels,
        outputs = [out],
        mnemonic = "WheelFolder",
    )
    return [DefaultInfo(
        files = depset([out]),
        runfiles = ctx.runfiles(files = [out]),
    )]

wheel_folder = rule(
    implementation = _wheel_folder_impl,
    attrs = {"wheels": attr.label_list(mandatory = True)},
    doc = "Gathers wheels in the folder bazel-bin/PACKAGE/NAME, the form " +
          "that `pip install --find-links` takes.",
)

def _unpacked_wheel_impl(ctx):
    out = ctx.actions.declare_directory(ctx.label.name)
    arguments = ctx.actions.args()
    arguments.add(ctx.attr.interpreter)
    arguments.add_all(ctx.files.wheel, expand_directories = False)
    arguments.add(out.path)
    ctx.actions.run_shell(
        command = "\"$1\" -I -m zipfile -e \"$2\"/*.whl \"$3\"",
        arguments = [arguments],
        inputs = ctx.files.wheel,
        outputs = [out],
        mnemonic = "UnpackWheel",
    )
    return [DefaultInfo(
        files = depset([out]),
        runfiles = ctx.runfiles(files = [out]),
    )]

unpacked_wheel = rule(
    implementation = _unpacked_wheel_impl,
    attrs = {
        "interpreter": attr.string(mandatory = True),
        "wheel": attr.label(mandatory = True),
    },
    doc = "Unpacks a wheel into a folder for sys.path, as pip would.",
)
