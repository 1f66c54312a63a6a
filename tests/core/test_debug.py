"""Debug mode as the environment asks for it (core/debug.py)."""

import os
import subprocess
import sys

import pytest

CODE = """
import xla_ops
from xla_ops.core import debug
try:
    print(debug.enabled())
except ValueError as error:
    print(error)
debug.set_debug(True)
print(debug.enabled())
"""


@pytest.mark.parametrize(
    "value, printed",
    [
        (None, "False"),
        ("", "False"),
        ("0", "False"),
        ("off", "False"),
        ("False", "False"),
        ("1", "True"),
        ("true", "True"),
        ("2", "XLA_OPS_DEBUG must be 1, 0, true or false, got '2'"),
    ],
)
def test_variable(value, printed):
    environ = {k: v for k, v in os.environ.items() if k != "XLA_OPS_DEBUG"}
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        env=environ | ({} if value is None else {"XLA_OPS_DEBUG": value}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines() == [printed, "True"], done.stderr
