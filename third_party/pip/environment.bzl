"""The virtual environment in which Python tests and tools run.

torch alone is 30,000 files. They stay out of runfiles and sandboxes: targets
get an interpreter that has them, by its absolute path, and that path holds a
hash of the requirements, so that other packages mean another action.

One environment may stand on another: it sees that one's packages behind its own,
and so torch is installed once.
"""

load("//third_party/pip:pip.bzl", "run_pip_install")
load("//third_party/python:interpreters.bzl", "default_interpreter")

_BUILD = """\
load("@bazel_tools//tools/python:toolchain.bzl", "py_runtime_pair")

package(default_visibility = ["//visibility:public"])

exports_files([
    "python.txt",
    "site_packages.txt",
])

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

_HASH = "import hashlib, sys; h = hashlib.sha256(); " + \
        "[h.update(open(f, 'rb').read()) for f in sys.argv[1:]]; " + \
        "print(h.hexdigest()[:12])"

_SITE_PACKAGES = "import sysconfig; print(sysconfig.get_path('purelib'))"

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
    inputs = [requirements]
    if ctx.attr.source:
        inputs.append(ctx.path(ctx.attr.source))
    below = None
    if ctx.attr.on:
        inputs.append(ctx.path(ctx.attr.on))  # its path holds a hash of its packages
        below = ctx.read(ctx.path(ctx.attr.on)).strip()
    key = _checked(ctx, [base.path, "-c", _HASH] + [str(f) for f in inputs], "")
    folder = ctx.path("%s-%s" % (base.tag, key))
    ctx.report_progress("installing " + ctx.attr.what)
    _checked(
        ctx,
        [base.path, "-m", "venv", str(folder)],
        "\nNo virtual environment can be made: run tools/setup.",
    )
    python = str(folder.get_child("bin").get_child("python3"))
    site_packages = _checked(ctx, [python, "-c", _SITE_PACKAGES], "")
    run_pip_install(ctx, python, requirements, [])
    if below:
        ctx.file(site_packages + "/on.pth", below + "\n", executable = False)
    if ctx.attr.source:
        run_pip_install(
            ctx,
            python,
            ctx.path(ctx.attr.source),
            ["--no-binary=:all:", "--no-build-isolation"],
            environment = ctx.attr.source_environment,
        )
    ctx.file("python.txt", python + "\n", executable = False)
    ctx.file("site_packages.txt", site_packages + "\n", executable = False)
    ctx.file("BUILD", _BUILD.format(base = base.path, python = python), executable = False)

pip_environment = repository_rule(
    implementation = _pip_environment_impl,
    attrs = {
        "on": attr.label(
            allow_single_file = True,
            doc = "The :site_packages.txt of the environment below this one.",
        ),
        "requirements": attr.label(allow_single_file = True, mandatory = True),
        "source": attr.label(
            allow_single_file = True,
            doc = "A section of source distributions. They are built with the " +
                  "packages of `requirements`: a hash covers all code that runs.",
        ),
        "source_environment": attr.string_dict(
            doc = "Environment variables of that build.",
        ),
        "what": attr.string(
            mandatory = True,
            doc = "What is installed, for Bazel's progress.",
        ),
    },
    environ = ["XLA_OPS_PYTHON"],
    doc = "Makes @NAME//:runtime_pair, CPython with a section installed, and " +
          "@NAME//:python.txt, a file that holds its path.",
)
