"""Updates in a replayed function of what is no argument of it: its own, and others."""

import pytest
import torch
import torch_xla

import xla_ops
from xla_ops.programs.replay import replay

OUTSIDE = "must be one of its arguments or in its state, got another of shape"


def rows() -> torch.Tensor:
    t = torch.randn(3, 8).to(torch_xla.device())
    torch_xla.sync(wait=True)
    return t


def penalise(t):
    """By an op that updates a buffer in place, as those of a KV cache."""
    penalties = torch.full((t.shape[0],), 2.0, device=t.device)
    xla_ops.apply_repetition_penalties_(t, t > 0, t > 1, penalties)


def turn(t):
    weights = torch.ones(2, 4, device=t.device)
    table = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).to(t.device)  # by 90 degrees
    positions = torch.zeros(t.shape[0], dtype=torch.int64, device=t.device)
    xla_ops.fused_qk_norm_rope(t, 1, 1, 0, 4, 1.0, *weights, table, True, positions)


def normalise(t):
    """By an op that knows no buffer."""
    torch.ops.xla_ops.rms_norm(t, t * 1, torch.ones(8, device=t.device), 1.0)


each = pytest.mark.parametrize("update", [penalise, turn, normalise])


@each
@pytest.mark.parametrize(
    "copy",
    [
        lambda t: t.clone(),
        lambda t: t.clone().detach(),
        lambda t: t.detach().clone(),
        lambda t: t.to(t.device, copy=True),
        lambda t: torch.empty_like(t).copy_(t),
        lambda t: t * 1,
    ],
    ids=["clone", "of a clone", "of an alias", "to", "copy_", "computed"],
)
def test_a_copy_of_its_own(copy, update):
    """A clone is no computation, but the function's own all the same."""

    def f(t):
        first, second = copy(t), copy(t)
        update(first)
        update(second)
        update(second)
        return first, second

    replayed = replay(f)
    for _ in range(2):
        t = rows()
        before = t.cpu()
        for got, wanted in zip(replayed(t), f(before.clone()), strict=True):
            torch.testing.assert_close(got.cpu(), wanted)
        assert torch.equal(t.cpu(), before)


@each
@pytest.mark.parametrize(
    "alias",
    [lambda t: t, lambda t: t.detach(), lambda t: t.data, lambda t: t.view(3, 8)],
    ids=["itself", "detach", "data", "view"],
)
def test_an_alias_of_an_argument(alias, update):
    f = replay(lambda t: update(alias(t)))
    t = rows()
    wanted = t.cpu()
    for _ in range(2):
        f(t)
        update(wanted)
        torch.testing.assert_close(t.cpu(), wanted)


@each
@pytest.mark.parametrize(
    "alias",
    [lambda t: t, lambda t: t.detach(), lambda t: t.data, lambda t: t[1:]],
    ids=["itself", "detach", "data", "view"],
)
def test_a_tensor_from_outside_is_refused(alias, update):
    """It would have been updated by the first call alone."""
    outer = rows()
    before = outer.cpu()
    f = replay(lambda t: (update(alias(outer)), t + 1)[1])
    for _ in range(2):
        with pytest.raises(ValueError, match=OUTSIDE):
            f(rows())
        assert torch.equal(outer.cpu(), before)


@pytest.mark.parametrize("is_outside", [False, True])
@pytest.mark.parametrize("update", [penalise, normalise])
def test_within_a_transform(update, is_outside):
    """Tensors of torch.func's transforms have no memory to compare."""
    outer = rows()

    def loss(x):
        with torch.no_grad():
            own = outer if is_outside and x.device.type == "xla" else x.detach() * 2
            update(own)
        return (own * x).sum()

    x = rows()
    f = replay(torch.func.grad(loss))
    if is_outside:
        with pytest.raises(ValueError, match=OUTSIDE):
            f(x)
        return
    wanted = torch.func.grad(loss)(x.cpu())
    for _ in range(2):
        torch.testing.assert_close(f(x).cpu(), wanted)
