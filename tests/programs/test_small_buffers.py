"""programs.small_buffers: what is there to keep small buffers apart on a GPU."""

import pytest
import torch
import torch_xla

from xla_ops.core import handlers
from xla_ops.programs import small_buffers
from xla_ops.programs.replay import replay

pointer = torch_xla._XLAC._unsafe_buffer_pointer


@pytest.fixture
def none_made(monkeypatch):
    monkeypatch.setattr(small_buffers, "_walls", {})


@pytest.fixture
def on_gpu(none_made, monkeypatch):
    monkeypatch.setattr(handlers, "platform_of", lambda device: handlers.CUDA)


def use(way):
    x = torch.ones(3).to(torch_xla.device())
    assert way(lambda x: x + 1)(x).tolist() == [2, 2, 2]


def compiled(function):
    return torch.compile(function, backend="xla_ops")


WAYS = pytest.mark.parametrize("way", [replay, compiled])


@WAYS
def test_nothing_is_made_where_there_are_no_cuda_graphs(none_made, way):
    use(way)
    assert not small_buffers._walls


@WAYS
def test_the_first_program_of_a_gpu_has_walls_made_that_stay(on_gpu, way):
    use(way)
    [(device, walls)] = small_buffers._walls.items()
    assert device == torch_xla.device()
    addresses = {pointer(wall) for wall in walls}
    assert len(addresses) == len(walls) == small_buffers._HOLES

    use(way)
    assert small_buffers._walls == {device: walls}
    assert {pointer(wall) for wall in walls} == addresses


def test_they_have_buffers_where_tensors_are_lazy_by_default(on_gpu):
    with torch_xla.device():
        use(replay)
    [walls] = small_buffers._walls.values()
    assert len({pointer(wall) for wall in walls}) == small_buffers._HOLES


def test_nothing_is_made_for_tensors_of_the_host(none_made):
    small_buffers.keep_apart(torch.device("cpu"))
    assert not small_buffers._walls
