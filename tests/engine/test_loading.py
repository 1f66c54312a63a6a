"""A model moves to the device whole: weights, buffers, and what lies beside them."""

import torch
import torch_xla

from xla_ops.vllm import loading


class Part(torch.nn.Module):
    def __init__(self, weight=None):
        super().__init__()
        if weight is None:
            weight = torch.nn.Parameter(torch.randn(4, 3), requires_grad=False)
        self.weight = weight
        self.weight.weight_loader = "kept"
        self.register_buffer("table", torch.arange(5))
        self.scale = torch.tensor(2.0)  # as attention has its scales
        self.nothing = None


def model():
    first = Part()
    return torch.nn.ModuleList([first, Part(first.weight), Part()])


def tensors(module):
    for part in module.modules():
        yield from part._parameters.values()
        yield from part._buffers.values()
        yield from (t for t in vars(part).values() if isinstance(t, torch.Tensor))


def test_everything_moves():
    module = model()
    wanted = [t.clone() for t in tensors(module)]
    hosts = list(module.parameters())
    moved = loading.move(module, torch_xla.device())
    got = list(tensors(module))
    assert {t.device.type for t in got} == {"xla"}
    for w, g in zip(wanted, got, strict=True):
        assert torch.equal(g.cpu(), w)
    assert module[0].weight is module[1].weight
    assert isinstance(module[0].weight, torch.nn.Parameter)
    assert module[0].weight.weight_loader == "kept"
    # Two weights, three tables of int64, three scales.
    assert moved == 2 * 4 * 3 * 4 + 3 * 5 * 8 + 3 * 4
    assert [t.numel() for t in hosts] == [0, 0]  # the host has let them go


def test_moving_again_moves_nothing():
    module = model()
    loading.move(module, torch_xla.device())
    assert loading.move(module, torch_xla.device()) == 0


def test_dummy_weights_are_made_on_the_device():
    module = model()
    loading.move(module, torch_xla.device(), dummy=True)
    weight = module[0].weight.cpu()
    assert weight.abs().max() <= 1e-3 and weight.unique().numel() > 6
    assert module[0].table.tolist() == [0, 1, 2, 3, 4]
    assert module[0].scale.item() == 2


def test_dummy_codes_are_of_their_whole_range():
    module = Part()
    codes = torch.empty(64, 32, dtype=torch.float8_e4m3fn)
    module.weight = torch.nn.Parameter(codes, requires_grad=False)
    loading.move(module, torch_xla.device(), dummy=True)
    assert module.weight.dtype == torch.float8_e4m3fn
    made = module.weight.cpu().float()
    assert made.isfinite().all() and made.unique().numel() > 50
    assert 400 < made.abs().max() <= 448
