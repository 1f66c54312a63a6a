"""examples/jax_decode, as a user runs it: a process that has no torch in it."""

import pathlib
import subprocess
import sys

import jax
import jax_arrays  # noqa: F401, says on which device

_EXAMPLE = pathlib.Path("examples/jax_decode/decode.py")


def test_decodes_in_place_and_as_plain_jax():
    code = (
        "import runpy, sys; sys.modules['torch'] = None;"
        f" runpy.run_path({str(_EXAMPLE)!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    *tokens, calls, caches = done.stdout.splitlines()
    assert len(tokens) == 2
    # Of two layers: two norms, rotary and cache, attention, activation; a last norm.
    assert calls == f"11 handlers a step on {jax.default_backend()}"
    assert caches.endswith("as at the start; no copies")
