"""Finds the CPython interpreters that the wheel is built for.

@xla_ops_python//:defs.bzl lists them:

    PYTHONS           structs of tag ("cp311"), version ("3.11"), path and
                      extension_suffix (".cpython-311-x86_64-linux-gnu.so")
    DEFAULT_PYTHON    the one whose wheel the tests use

and @xla_ops_python//:cp311 is a cc_library of its headers. An interpreter
without headers is left out. The environment variable XLA_OPS_PYTHON names the
default; without it that is `python3` on PATH, or else the newest found.
"""

SUPPORTED_VERSIONS = ["3.10", "3.11", "3.12", "3.13"]

# Prints one line a fact. sys.executable resolves shims such as pyenv's.
_PROBE = """
import os, platform, sys, sysconfig
print(platform.python_implementation())
print("%d.%d" % sys.version_info[:2])
print(sys.executable)
print(sysconfig.get_path("include"))
print(sysconfig.get_config_var("EXT_SUFFIX"))
print(os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))
print(bool(sysconfig.get_config_var("Py_GIL_DISABLED")))
"""

def _probe(ctx, program):
    """Returns what `program` is, or None where it cannot serve."""
    result = ctx.execute(
        [program, "-I", "-c", _PROBE],
        environment = {"PYTHONNOUSERSITE": "1"},
    )
    if result.return_code:
        return None  # A shim whose version is not selected, Python 2, ...
    lines = result.stdout.strip().split("\n")
    if lines[0] != "CPython" or lines[1] not in SUPPORTED_VERSIONS:
        return None
    if lines[5] != "True" or lines[6] == "True":
        return None  # No headers, or free-threaded: another ABI.
    return struct(
        tag = "cp" + lines[1].replace(".", ""),
        version = lines[1],
        path = lines[2],
        include = lines[3],
        extension_suffix = lines[4],
    )

def _candidates(ctx):
    """Programs that may be CPython, the preferred ones first."""
    found = []
    chosen = ctx.os.environ.get("XLA_OPS_PYTHON", "")
    if chosen:
        found.append(chosen)
    names = ["python3"]
    names += ["python" + v for v in reversed(SUPPORTED_VERSIONS)]
    for name in names:
        path = ctx.which(name)
        if path:
            found.append(str(path))
    found += ["/usr/bin/" + name for name in names]
    home = ctx.os.environ.get("HOME", "")
    versions = ctx.path(home + "/.pyenv/versions") if home else None
    if versions and versions.exists:
        folders = [str(p) for p in versions.readdir()]
        found += [f + "/bin/python3" for f in sorted(folders, reverse = True)]
    return [p for p in found if ctx.path(p).exists]

def find_interpreters(ctx):
    """Returns the interpreters, one a version, the default one first."""
    chosen = ctx.os.environ.get("XLA_OPS_PYTHON", "")
    if chosen and (not chosen.startswith("/") or not _probe(ctx, chosen)):
        fail(("XLA_OPS_PYTHON must be the absolute path of a CPython %s to " +
              "%s with headers, got %s") % (
            SUPPORTED_VERSIONS[0],
            SUPPORTED_VERSIONS[-1],
            chosen,
        ))
    by_version = {}
    preferred = None
    for program in _candidates(ctx):
        python = _probe(ctx, program)
        if not python:
            continue
        if not by_version and program.split("/")[-1] in ["python3", chosen.split("/")[-1]]:
            preferred = python.version
        if python.version not in by_version:
            by_version[python.version] = python
    if not by_version:
        fail("no CPython %s to %s with headers was found: run tools/setup" % (
            SUPPORTED_VERSIONS[0],
            SUPPORTED_VERSIONS[-1],
        ))
    if not preferred:
        preferred = [v for v in SUPPORTED_VERSIONS if v in by_version][-1]
    rest = [v for v in SUPPORTED_VERSIONS if v in by_version and v != preferred]
    return [by_version[v] for v in [preferred] + rest]

def default_interpreter(ctx):
    """Returns the interpreter that runs pip and the tests."""
    return find_interpreters(ctx)[0]

_HEADERS = """\
cc_library(
    name = "{tag}",
    hdrs = glob(["{tag}_include/**/*.h"]),
    includes = ["{tag}_include"],
)
"""

def _python_interpreters_impl(ctx):
    pythons = find_interpreters(ctx)
    build = "package(default_visibility = [\"//visibility:public\"])\n"
    for python in pythons:
        ctx.symlink(python.include, python.tag + "_include")
        build += "\n" + _HEADERS.format(tag = python.tag)
    ctx.file("BUILD", build, executable = False)
    lines = ["\"\"\"The CPython interpreters of this machine.\"\"\"\n"]
    lines.append("PYTHONS = [")
    for python in pythons:
        lines.append(("    struct(tag = %r, version = %r, path = %r, " +
                      "extension_suffix = %r),") % (
            python.tag,
            python.version,
            python.path,
            python.extension_suffix,
        ))
    lines.append("]\n\nDEFAULT_PYTHON = PYTHONS[0]\n")
    ctx.file("defs.bzl", "\n".join(lines), executable = False)

python_interpreters = repository_rule(
    implementation = _python_interpreters_impl,
    configure = True,
    environ = ["XLA_OPS_PYTHON"],
    local = True,
    doc = "Makes @NAME//:defs.bzl and the headers of each interpreter.",
)
