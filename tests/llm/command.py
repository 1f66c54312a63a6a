"""Runs the command line of examples/llm: in a process of its own, as a user does, or
in this one where it is to refuse something, since starting XLA takes seconds."""

import contextlib
import io
import os
import re
import subprocess
import sys
from unittest import mock

import generate
from checkpoints import LLM

# A GPU target of tests/BUILD sets PJRT_DEVICE.
DEVICE = "cpu" if os.environ.get("PJRT_DEVICE", "CPU") == "CPU" else "gpu"


def run(*command, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(part) for part in command],
        env=dict(os.environ, **env),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


def run_generate(*arguments, **env: str) -> subprocess.CompletedProcess:
    program = LLM / "generate.py"
    return run(sys.executable, program, "--device", DEVICE, *arguments, **env)


def reported(output: str) -> dict[str, str]:
    """The lines of the report, by what stands before the colon."""
    lines = re.findall(r"^([a-z][\w /-]*):\s+(.*)$", output, re.MULTILINE)
    return dict(lines)


def command_error(*arguments, main=generate.main) -> str:
    """The one line that a command says when it refuses something, without "error: ".

    It must do so before it loads weights, with the exit status of a wrong option.
    """
    out, err = io.StringIO(), io.StringIO()
    status: str | int | None = 0
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.dict(os.environ),
    ):
        try:
            main(["--device", DEVICE, *map(str, arguments)])
        except SystemExit as exit:
            status = exit.code
    lines = err.getvalue().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert status == 2, (status, lines)
    assert "loading" not in out.getvalue()
    assert len(errors) == 1 and lines[-1] == errors[0], lines
    assert all(line.startswith("warning: ") for line in lines[:-1]), lines
    return errors[0].removeprefix("error: ")
