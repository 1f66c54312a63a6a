"""`replay` under settings of torch_xla that change how lazy tensors work."""

import os
import subprocess
import sys

import pytest

CODE = """
import torch, torch_xla, xla_ops
from xla_ops.programs.replay import replay

def step(kv, rows, slots):
    xla_ops.reshape_and_cache_flash(rows, rows, *kv.unbind(0), slots)
    return kv.sum()

device = torch_xla.device()
kv, rows = torch.zeros(2, 4, 4, 2, 8).to(device), torch.ones(2, 2, 8).to(device)
slots = torch.tensor([3, 9]).to(device)
torch_xla.sync()
print(torch.compile(step, backend="openxla")(kv, rows, slots).item())
try:
    f = replay(step)
    print(f(kv, rows, slots + 1).item(), f(kv, rows, slots + 2).item())
except RuntimeError as error:
    print(error)
"""


@pytest.mark.parametrize(
    "name, printed",
    [
        ("XLA_USE_EAGER_DEBUG_MODE", "128.0 192.0"),
        # By which a graph's constants are inputs of its program.
        ("XLA_NO_SPECIAL_SCALARS", "128.0 192.0"),
        (
            "XLA_DISABLE_FUNCTIONALIZATION",
            "replay: tensor argument 0 must be functionalized, got one that is not;"
            " unset XLA_DISABLE_FUNCTIONALIZATION",
        ),
    ],
)
def test_settings(name, printed):
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        env={**os.environ, name: "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines() == ["64.0", printed], done.stderr
