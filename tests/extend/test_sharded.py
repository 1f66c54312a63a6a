"""`splits` of ops from outside the package, on four CPU devices."""

import re
import sys

import pytest
import torch
import torch_xla
from torch_xla.distributed import spmd as xs

import example
from user_kernels import make_scale, pretend_gpu
from xla_ops.extend import ShardingRule
from xla_ops.extend.kernel_op import KernelOp


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """examples/extension, built and imported."""
    folder = example.built(tmp_path_factory.mktemp("outside") / "extension")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        import mine

        yield mine
        del sys.modules["mine"]


def put(t, mesh, spec):
    moved = t.clone().to(torch_xla.device())
    xs.mark_sharding(moved, mesh, spec)
    return moved


def spec_of(t):
    return torch_xla._XLAC._get_xla_sharding_spec(t)


def hlo_of(t):
    return torch_xla._XLAC._get_xla_tensors_hlo([t])


# How the rows and columns are split, and the shape that a device's call has.
SPLITS = [
    (("dp", "tp"), (4, 8)),
    ((("dp", "tp"), None), (2, 16)),
    ((None, "tp"), (8, 8)),
]


@pytest.mark.parametrize("spec, local", SPLITS)
def test_a_library(mine, grid, spec, local):
    """Each device's handler has its own rows and their numbers of the scale."""
    input, scale = torch.randn(8, 16), torch.randn(8)
    given = put(input, grid, spec), put(scale, grid, spec[:1])
    result = mine.scale_rows(*given)
    (call,) = re.findall(r".*mine\.scale_rows.*", hlo_of(result))
    assert f"f32[{local[0]},{local[1]}]" in call
    assert spec_of(result) == spec_of(given[0])
    assert torch.equal(result.cpu(), input * scale[:, None])


def test_a_librarys_gradient(mine, grid):
    input, scale = torch.randn(8, 16), torch.randn(8)
    leaves = [put(input, grid, ("dp", "tp")), put(scale, grid, ("dp",))]
    leaves = [t.requires_grad_() for t in leaves]
    with torch.enable_grad():
        found = torch.autograd.grad(mine.scale_rows(*leaves).sin().sum(), leaves)
    turned = (input * scale[:, None]).cos()
    expected = turned * scale[:, None], (turned * input).sum(1)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f.cpu(), e)


def test_splits_that_do_not_match_raise(mine, grid):
    input = put(torch.ones(8, 16), grid, ("dp", None))
    given = input, put(torch.ones(8), grid, ("tp",))
    rule = "^scale_rows: scale must be split in tokens as input is, got"
    with pytest.raises(ValueError, match=rule):
        mine.scale_rows(*given)


RULE = ShardingRule({"x": "tokens columns"}, ("tokens columns",))


@pytest.fixture
def lowered_for_a_gpu(monkeypatch):
    """Calls of kernels become those of a GPU; the launcher need not be there."""
    pretend_gpu(monkeypatch)
    monkeypatch.setattr(KernelOp, "_runs", lambda *args, **options: True)


def test_a_kernels_reference_takes_sharded_tensors(grid):
    x = torch.randn(8, 16)
    given = put(x, grid, ("dp", "tp"))
    result = make_scale(splits=RULE)(given, 3.0)
    assert torch.equal(result.cpu(), 3 * x)


@pytest.mark.parametrize("spec, local", SPLITS)
def test_a_kernel_is_launched_for_the_part(grid, lowered_for_a_gpu, spec, local):
    """Each device launches it for its own part."""
    scale = make_scale(splits=RULE)
    given = put(torch.randn(8, 16), grid, spec)
    result = scale(given, 3.0)
    (call,) = re.findall(r".*xla_ops\.launch_kernel.*", hlo_of(result))
    assert f"f32[{local[0]},{local[1]}]" in call
    assert spec_of(result) == spec_of(given)


def test_a_kernel_without_splits_refuses_sharded_tensors(grid, lowered_for_a_gpu):
    scale = make_scale()
    given = put(torch.randn(8, 16), grid, ("dp", None))
    with pytest.raises(ValueError, match=r"^scale: x must"):
        scale(given, 3.0)
