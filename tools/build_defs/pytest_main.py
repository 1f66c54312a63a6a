"""Runs pytest on the wheel's unpacked content; main of every py_test here.

    pytest_main.py --site=DIR [--python=FILE] [pytest options] FILE...

DIR, which xla_ops_py_test fills with the installed form of the wheel, comes
first on sys.path here and in child processes, and Bazel's own entries go, so
that tests see what a user sees after `pip install`; pyproject.toml adds the
folders that tests import from. FILE of --python holds the path of another
interpreter, which then runs the tests. Running no test at all is a failure, and so is
a skip: targets are chosen by their tags.
"""

import os
import pathlib
import sys


class _NoSkips:
    """A pytest plugin that remembers which tests were skipped."""

    def __init__(self):
        self.skipped = []

    def pytest_runtest_logreport(self, report):
        if report.skipped and not hasattr(report, "wasxfail"):
            self.skipped.append(report.nodeid)

    def pytest_collectreport(self, report):
        if report.skipped:
            self.skipped.append(report.nodeid)


def main(argv: list[str]) -> int:
    site = None
    rest = []
    for argument in argv:
        if argument.startswith("--python="):
            python = pathlib.Path(argument.removeprefix("--python=")).read_text()
            rest = [a for a in argv if a != argument]
            os.execv(python.strip(), [python.strip(), __file__, *rest])
        if argument.startswith("--site="):
            site = pathlib.Path(argument.removeprefix("--site=")).resolve()
        else:
            rest.append(argument)
    if site is None or not (site / "xla_ops").is_dir():
        raise SystemExit(f"--site must name a folder with xla_ops in it, got {site}")

    runfiles = os.environ.get("RUNFILES_DIR") or os.environ.get("TEST_SRCDIR", "")
    kept = [p for p in sys.path if not (runfiles and p.startswith(runfiles))]
    sys.path[:] = [str(site), *kept]
    os.environ["PYTHONPATH"] = str(site)
    os.environ["PYTHONNOUSERSITE"] = "1"
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.dont_write_bytecode = True
    for name in ("HOME", "TMPDIR"):
        if "TEST_TMPDIR" in os.environ:
            os.environ[name] = os.environ["TEST_TMPDIR"]

    options = ["--config-file=pyproject.toml", "--rootdir=" + os.getcwd()]
    options += ["-p", "no:cacheprovider", "--color=no"]
    if "XML_OUTPUT_FILE" in os.environ:
        options.append("--junitxml=" + os.environ["XML_OUTPUT_FILE"])
    if os.environ.get("TESTBRIDGE_TEST_ONLY"):  # bazel test --test_filter=...
        options.append("-k=" + os.environ["TESTBRIDGE_TEST_ONLY"])

    import pytest

    no_skips = _NoSkips()
    # Exit status 5, no test collected, fails like any other but 0.
    status = int(pytest.main([*options, *rest], plugins=[no_skips]))
    if no_skips.skipped:
        print("pytest_main: a test must not skip, got", *no_skips.skipped, sep="\n  ")
        status = status or 1
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
