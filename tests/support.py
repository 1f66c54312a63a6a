"""Helpers for the tests: where an op runs, what its buffers are, how wrong it is."""

import math
import os
import re
from dataclasses import dataclass

import pytest
import torch
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.runtime as xr
from torch.utils import _pytree as pytree


def setting(name: str, meaning: str) -> str:
    """What `bazel test` tells a test by an environment variable.

    Fails, all tests of the file at once, where it is not set.
    """
    if name not in os.environ:
        pytest.fail(
            f"{name} must name {meaning}, got nothing; `bazel test` sets it, and"
            " CONTRIBUTING.md says what a run by pytest alone needs",
            pytrace=False,
        )
    return os.environ[name]


@dataclass(frozen=True)
class Path:
    """One way to reach an op's handler.

    "cpu" and "cuda" tensors; "lazy" XLA tensors; "compiled", by torch_xla's backend
    openxla; "dispatched", by the backend of this package.
    """

    name: str

    @property
    def is_xla(self) -> bool:
        return self.name in ("lazy", "compiled", "dispatched")

    @property
    def device(self):
        return torch_xla.device() if self.is_xla else torch.device(self.name)

    def put(self, tree):
        """Moves the tensors of a tree to the path's device."""
        moved = pytree.tree_map_only(torch.Tensor, lambda t: t.to(self.device), tree)
        self.wait()
        return moved

    def function(self, f, fullgraph=True):
        backend = {"compiled": "openxla", "dispatched": "xla_ops"}.get(self.name)
        return torch.compile(f, backend=backend, fullgraph=fullgraph) if backend else f

    def wait(self) -> None:
        if self.is_xla:
            torch_xla.sync()
            xm.wait_device_ops()

    def run(self, f, *args):
        """Calls f on copies of the arguments; returns (result, arguments) on the CPU.

        The arguments come back because f may update them.
        """
        args = self.put(pytree.tree_map_only(torch.Tensor, torch.clone, args))
        result = self.function(f)(*args)
        self.wait()
        return pytree.tree_map_only(torch.Tensor, lambda t: t.cpu(), (result, args))


def addresses(tensors) -> list[int]:
    """Returns the device addresses of XLA tensors' buffers."""
    torch_xla.sync()
    xm.wait_device_ops()
    return [torch_xla._XLAC._unsafe_buffer_pointer(t) for t in tensors]


def programs_with(shape, hlo_dump) -> list[str]:
    """Returns the optimised HLO of each program with an op of ours on such an array."""
    texts = (f.read_text() for f in hlo_dump.glob("*after_optimizations.txt"))
    dims = ",".join(map(str, shape))
    return [t for t in texts if f"[{dims}]" in t and 'target="xla_ops.' in t]


def copies_of(shape, program) -> list[str]:
    """Returns the instructions of `program` that copy an array of `shape`."""
    dims = ",".join(map(str, shape))
    pattern = rf"^.* = \w+\[{dims}\]\S* (?:copy|copy-start|fusion)\(.*$"
    return [line.strip() for line in re.findall(pattern, program, re.MULTILINE)]


def assert_close_to_exact(actual, same_dtype, exact, floor=1e-6):
    """The project's accuracy rule: no worse than twice a same-dtype torch reference.

    Args:
        actual: what the op gave.
        same_dtype: a plain torch reference in the op's dtype.
        exact: the same in float64.
        floor: absolute error that is always allowed, times the largest exact value.
    """
    assert actual.shape == exact.shape
    assert not torch.isnan(actual.double()).any()
    error = (actual.double() - exact).abs().max().item() if exact.numel() else 0.0
    allowed = (same_dtype.double() - exact).abs().max().item() if exact.numel() else 0.0
    largest = exact.abs().max().item() if exact.numel() else 0.0
    bound = 2 * allowed + floor * max(largest, 1.0)
    assert error <= bound or math.isclose(error, bound), (error, bound)


def same(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether a result equals one computed on the CPU: bit for bit there.

    A GPU adds in another order, so there the last bits of a sum may differ.
    """
    if xr.device_type() == "CPU":
        return torch.equal(actual, expected)
    tolerance = 1e-5 if actual.dtype == torch.float32 else 1e-2
    return actual.dtype == expected.dtype and torch.allclose(
        actual, expected, rtol=tolerance, atol=tolerance
    )


def int32(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)
