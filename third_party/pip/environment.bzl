"""The virtual environment in which Python tests and tools run.

torch alone is 30,000 files. They stay out of runfiles and sandboxes: targets
get an interpreter that has them, by its absolute path, and that path holds a
hash of the requirements, so that other packages mean another action.
"""

load("//third_party/pip:pip.bzl", "run_pip_install")
load("//third_party/python:interpreters.bzl", "default_interpreter")

_BUILD = """\
load("@bazel_tools//tools/python:toolchain.bzl", "py_runtime_pair")

package(default_visibility = ["//visibility:public"])

py_runtime(
    name = "runtime",
    interpreter_path = "{python}",
    python_version = "PY3",
    stub_shebang = "#!{base}",
)

py_runtime_pair(
    name = "runtime_pair",
    py2_runtime = None,
    py3_runtime = ":runtime",
)
"""

_HASH = "import hashlib, sys; " + \
        "print(hashlib.sha256(open(sys.argv[1], 'rb').read()).hexdigest()[:12])"

def _checked(ctx, arguments, hint):
    result = ctx.execute(arguments, timeout = 600)
    if result.return_code:
        fail("%s\n%s\n%s%s" % (
            " ".join(arguments),
            result.stdout,
            result.stderr,
            hint,
        ))
    return result.stdout.strip()

def _pip_environment_impl(ctx):
    base = default_interpreter(ctx)
    requirements = ctx.path(ctx.attr.requirements)
    key = _checked(ctx, [base.path, "-c", _HASH, str(requirements)], "")
    folder = ctx.path("%s-%s" % (base.tag, key))
    ctx.report_progress("installing torch and the tools of tests")
    _checked(
        ctx,
        [base.path, "-m", "venv", str(folder)],
        "\nNo virtual environment can be made: run tools/setup.",
    )
    python = str(folder.get_child("bin").get_child("python3"))
    run_pip_install(ctx, python, requirements, [])
    ctx.file("BUILD", _BUILD.format(base = base.path, python = python), executable = False)

pip_environment = repository_rule(
    implementation = _pip_environment_impl,
    attrs = {
        "requirements": attr.label(allow_single_file = True, mandatory = True),
    },
    environ = ["XLA_OPS_PYTHON"],
    doc = "Makes @NAME//:runtime_pair, CPython with a section installed.",
)
