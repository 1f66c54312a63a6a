"""The rule for every gradient: as right as torch's own of the same dtype."""

from collections.abc import Callable, Sequence

import torch
import torch_xla

from support import Path, assert_close_to_exact

Results = torch.Tensor | tuple[torch.Tensor, ...]


def gradients_of(
    path: Path,
    function: Callable[..., Results],
    tensors: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor | None],
    wanted: Sequence[int],
) -> list[torch.Tensor]:
    """Differentiates function(*tensors), compiled where the path says so.

    Args:
        path: where it runs.
        function: of tensors.
        tensors: what it is called with.
        grads: of each result; None: nothing depends on it.
        wanted: the tensors that require a gradient, by index.
    """
    # Torch counts devices at the first backward of a process: XLA's must be there.
    torch_xla.device()
    leaves, grads = path.put(([t.clone() for t in tensors], list(grads)))
    for i in wanted:
        leaves[i].requires_grad_()
    with torch.enable_grad():
        results = path.function(function)(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    used = [
        (r, g)
        for r, g in zip(results, grads, strict=True)
        if g is not None and r.requires_grad  # all of an op's do, not all of torch's
    ]
    found = torch.autograd.grad(
        [r for r, _ in used], [leaves[i] for i in wanted], [g for _, g in used]
    )
    path.wait()
    return [t.cpu() for t in found]


def assert_gradients(
    path: Path,
    function: Callable[..., Results],
    exact: Callable[..., Results],
    tensors: Sequence[torch.Tensor],
    *,
    same: Callable[..., Results] | None = None,
    grads: Sequence[torch.Tensor | None] | None = None,
    wanted: Sequence[int] | None = None,
    floor: float = 1e-6,
) -> None:
    """Compares with float64, by twice the error of torch in the tensors' dtype.

    Args:
        path: where the op runs.
        function: the op, of tensors.
        exact: its meaning in plain torch, without roundings of its own.
        tensors: what it is called with.
        same: plain torch in the tensors' dtype; None: `exact`.
        grads: of each result; None: random ones.
        wanted: the tensors that require a gradient; None: all of floats.
        floor: see assert_close_to_exact.
    """
    if wanted is None:
        wanted = [i for i, t in enumerate(tensors) if t.is_floating_point()]
    if grads is None:
        results = exact(*tensors)
        results = results if isinstance(results, tuple) else (results,)
        grads = [torch.randn(r.shape).to(r.dtype) for r in results]
    found = gradients_of(path, function, tensors, grads, wanted)
    cpu = Path("cpu")
    near = gradients_of(cpu, same or exact, tensors, grads, wanted)
    right = gradients_of(cpu, exact, double(tensors), double(grads), wanted)
    for i, got, n, r in zip(wanted, found, near, right, strict=True):
        assert got.dtype == tensors[i].dtype
        assert_close_to_exact(got, n, r, floor)


def double(tensors: Sequence) -> list:
    """Those of floats, as float64."""
    return [
        t.double() if t is not None and t.is_floating_point() else t for t in tensors
    ]
