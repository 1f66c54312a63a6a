"""The headers of the installed wheel of xla_ops, as @xla_ops_headers."""

_FIND = "from importlib.util import find_spec; " + \
        "print(find_spec('xla_ops').submodule_search_locations[0] + '/include')"

_BUILD = """
cc_library(
    name = "xla_ops_headers",
    hdrs = glob(["include/**/*.h", "include/**/*.cuh"]),
    includes = ["include"],
    visibility = ["//visibility:public"],
)
"""

def _xla_ops_headers_impl(ctx):
    python = ctx.os.environ.get("XLA_OPS_PYTHON") or ctx.which("python3")
    result = ctx.execute([python, "-c", _FIND])
    if result.return_code:
        fail("%s has no xla_ops: install its wheel\n%s" % (python, result.stderr))
    ctx.symlink(result.stdout.strip(), "include")
    ctx.file("BUILD.bazel", _BUILD)

xla_ops_headers = repository_rule(
    implementation = _xla_ops_headers_impl,
    environ = [
        "PATH",
        "PYTHONPATH",
        "XLA_OPS_PYTHON",
    ],
    local = True,
    doc = "Asks the interpreter in XLA_OPS_PYTHON, or python3, where they are.",
)
