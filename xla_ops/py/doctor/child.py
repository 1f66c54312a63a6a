"""Runs programs on the device that PJRT_DEVICE names, and writes what came of them.

    python -m xla_ops.doctor.child FILE

A process of its own for probe.py, since a client or a program may end it. FILE gets a
line of JSON before each step, {"step": name}, and one behind it: with "text", what was
seen, or with "what" and "fix", what is wrong. So of a process that ends, the last line
tells in which step.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

from ..core.errors import Problem

if TYPE_CHECKING:
    import torch

# Of float32 results of order 1: some units in the last place.
_TOLERANCE = 1e-5
_WRONG = "please report it, with the output of --json"


def main(path: str) -> int:
    # A reference in the handler's place would hide what is wrong.
    os.environ["XLA_OPS_STRICT"] = "1"
    with open(path, "a", encoding="utf-8") as file:
        for name, step in STEPS.items():
            if not _run(file, name, step) and name == "client":
                return 0  # the rest would say the same
    return 0


def _run(file: TextIO, name: str, step: Callable[[], str]) -> bool:
    def tell(**result: str) -> None:
        file.write(json.dumps({"step": name, **result}) + "\n")
        file.flush()

    tell()
    try:
        text = step()
    except Problem as problem:
        tell(what=problem.what, fix=problem.fix)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what was asked
        tell(what=f"{type(error).__name__}: {error}", fix="")
    else:
        tell(text=text)
        return True
    return False


def _client() -> str:
    import torch_xla
    import torch_xla.runtime as xr

    if xr.device_type() in ("GPU", "CUDA"):
        from ..gpu import plugin

        plugin.open_bridge()  # what is wrong comes in two parts from here
    device = str(torch_xla.device())
    return torch_xla._XLAC._xla_real_devices([device])[0]


def _handlers() -> str:
    from .. import _runtime
    from ..core import handlers

    platform = handlers.xla_platform()
    targets = handlers.load(platform)
    if not targets:
        raise Problem(f"there are none for {platform}", "install a build that has some")
    missing = []
    for target in sorted(targets):
        try:
            handlers.available(platform, target)
        except Problem as problem:
            missing.append(problem)
    if missing:
        more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise Problem(missing[0].what + more, "reinstall xla_ops and torch_xla 2.9.0")
    return f"{len(_runtime.registered()[platform])} registered with XLA"


def _exp() -> str:
    """An elementwise kernel that XLA makes: on a GPU by ptxas and libdevice."""
    import torch

    x = torch.linspace(-1, 1, 1000)
    return _close(torch.exp(x.to("xla")), torch.exp(x.double()), "exp of 1000 numbers")


def _dot() -> str:
    """A matrix product: on a GPU by cuBLAS. Of numbers that TF32 takes exactly."""
    import torch

    x = (torch.arange(512 * 512) % 5 - 2.0).reshape(512, 512)
    product = x.to("xla") @ x.to("xla").t()
    return _close(product, x.double() @ x.double().t(), "product of two 512 x 512")


def _custom_call() -> str:
    import torch
    import torch_xla

    from .. import ops

    torch.manual_seed(0)
    x, weight = torch.randn(8, 256), torch.randn(256)
    out = ops.rms_norm(x.to("xla"), weight.to("xla"), 1e-6)
    hlo = torch_xla._XLAC._get_xla_tensors_hlo([out])
    if 'custom_call_target="xla_ops.rms_norm"' not in hlo:
        raise Problem("rms_norm became another program than a custom call", _WRONG)
    exact = torch.nn.functional.rms_norm(x.double(), (256,), weight.double(), 1e-6)
    return _close(out, exact, "rms_norm of 8 x 256")


def _close(actual: torch.Tensor, exact: torch.Tensor, name: str) -> str:
    error = (actual.cpu().double() - exact).abs().max().item()
    if not error <= _TOLERANCE:
        raise Problem(f"{name}: wrong by {error:.1e}", _WRONG)
    return f"{name}, right to {error:.1e}"


STEPS: dict[str, Callable[[], str]] = {
    "client": _client,
    "handlers": _handlers,
    "exp": _exp,
    "dot": _dot,
    "custom call": _custom_call,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
