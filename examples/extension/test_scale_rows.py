"""mine.scale_rows on CPU tensors, in XLA programs, in place, by its gradient."""

from __future__ import annotations

import mine
import pytest
import torch
import torch_xla

DEVICE = torch_xla.device()
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def inputs(dtype=torch.float32, rows=5, columns=33):
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(rows, columns, generator=generator).to(dtype)
    return input, torch.randn(rows, generator=generator)


def exact(input, scale):
    return (input.float() * scale[:, None]).to(input.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, columns", [(5, 33), (1, 1), (0, 4), (4, 0)])
def test_values(dtype, rows, columns):
    input, scale = inputs(dtype, rows, columns)
    expected = exact(input, scale)
    assert torch.equal(mine.scale_rows(input, scale), expected)
    result = mine.scale_rows(input.to(DEVICE), scale.to(DEVICE))
    assert torch.equal(result.cpu(), expected)


def test_the_handler_is_what_runs():
    result = mine.scale_rows(*(t.to(DEVICE) for t in inputs()))
    program = torch_xla._XLAC._get_xla_tensors_hlo([result])
    assert 'custom_call_target="mine.scale_rows"' in program


def test_compiled():
    input, scale = inputs()
    compiled = torch.compile(mine.scale_rows, backend="openxla")
    result = compiled(input.to(DEVICE), scale.to(DEVICE))
    assert torch.equal(result.cpu(), exact(input, scale))


@pytest.mark.parametrize("device", ["cpu", DEVICE])
def test_in_place(device):
    input, scale = inputs()
    x = input.clone().to(device)
    torch.ops.xla_ops.mine_scale_rows.out(x, x, scale.to(device))
    assert torch.equal(x.cpu(), exact(input, scale))


@pytest.mark.parametrize("device", ["cpu", DEVICE])
def test_gradient(device):
    input, scale = (t.to(device).requires_grad_() for t in inputs())
    mine.scale_rows(input, scale).square().sum().backward()
    x, s = (t.detach().cpu().requires_grad_() for t in (input, scale))
    (x * s[:, None]).square().sum().backward()
    torch.testing.assert_close(input.grad.cpu(), x.grad)
    torch.testing.assert_close(scale.grad.cpu(), s.grad)


@pytest.mark.parametrize("device", ["cpu", DEVICE])
def test_wrong_shape_raises_where_it_is_called(device):
    input, scale = (t.to(device) for t in inputs())
    with pytest.raises(
        ValueError, match=r"^scale_rows: scale must have shape \[5\], got \[4\]$"
    ):
        mine.scale_rows(input, scale[:4])
