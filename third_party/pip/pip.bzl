"""How repository rules call pip.

`python3 -m pip` reads the user's own pip configuration (index, proxy,
certificates, cache), so a machine behind a mirror needs no change here.
"""

load("//third_party/python:interpreters.bzl", "default_interpreter")

# Shared by every call. Only wheels, unless `options` ask for more: building a source
# distribution runs code that no hash covers, if pip fetches what it is built with.
_OPTIONS = [
    "--disable-pip-version-check",
    "--no-input",
    "--no-deps",
    "--only-binary=:all:",
    "--require-hashes",
]

def run_pip_install(ctx, python, requirements, options, environment = {}):
    """Installs `requirements`, complete and hash-locked, or fails.

    Args:
      ctx: the repository context.
      python: path of the interpreter whose pip runs.
      requirements: path of a file in pip's format.
      options: further options of `pip install`.
      environment: further environment variables.
    """
    result = ctx.execute(
        [python, "-m", "pip", "install"] + _OPTIONS +
        options + ["--requirement", str(requirements)],
        environment = dict({
            "PIP_REQUIRE_VIRTUALENV": "0",
            "PIP_ROOT_USER_ACTION": "ignore",
            "PIP_USER": "0",
            "PYTHONNOUSERSITE": "1",
            "PYTHONPATH": "",
        }, **environment),
        timeout = 3600,
    )
    if result.return_code:
        hint = ""
        if "No module named pip" in result.stderr:
            hint = "\npip is missing: run tools/setup."
        fail("pip install -r %s failed (%d):\n%s\n%s%s" % (
            requirements,
            result.return_code,
            result.stdout[-4000:],
            result.stderr[-4000:],
            hint,
        ))

def pip_python(ctx):
    """Returns the path of the interpreter that runs pip."""
    return default_interpreter(ctx).path
