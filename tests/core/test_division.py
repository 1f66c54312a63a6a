"""Caches in compiled functions of which an operation runs on the host."""

import pytest
import torch
import torch_xla

import xla_ops
from support import Path, addresses

BACKENDS = pytest.mark.parametrize("name", ["compiled", "dispatched"])


def write(kv, rows, slots):
    xla_ops.reshape_and_cache_flash(rows, 2 * rows, *kv.unbind(0), slots)


def on_host(t):
    """Of an operation that torch_xla has no lowering of."""
    return torch.special.i0(t / 8).mean()


def reads_what_was_written_as_another_dtype(kv, rows, slots):
    write(kv, rows, slots)
    return (kv.view(torch.int32) % 7).sum()


def writes_between(kv, rows, slots):
    write(kv, rows, slots)
    write(kv, rows + on_host(kv[0]), slots)
    return kv.sum()


def reads_the_new_value(kv, rows, slots):
    write(kv, rows, slots)
    return kv[0] * 2 + on_host(rows)


def reads_the_old_value_on_the_host(kv, rows, slots):
    old = on_host(kv)
    write(kv, rows + old, slots)
    return old + kv.sum()


def reads_the_old_value_too_late(kv, rows, slots):
    old = kv[1] * 2
    write(kv, rows, slots)
    return old.sum() + on_host(kv[0])


def put():
    kv, rows = torch.randn(2, 4, 4, 2, 8), torch.randn(2, 2, 8)
    batch = rows, torch.tensor([3, 9])
    return (kv, *batch), Path("lazy").put((kv, *batch))


@pytest.mark.parametrize(
    "step",
    [
        reads_what_was_written_as_another_dtype,
        writes_between,
        reads_the_new_value,
        reads_the_old_value_on_the_host,
    ],
)
@BACKENDS
def test_no_cache_is_lost(name, step):
    wanted, (kv, *batch) = put()
    f = Path(name).function(step)
    for _ in range(3):
        found, expected = f(kv, *batch), step(*wanted)
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(kv.cpu(), wanted[0], rtol=1e-4, atol=1e-4)


@BACKENDS
def test_a_cache_that_one_program_updates_stays(name):
    _, (kv, *batch) = put()
    f, address = Path(name).function(reads_the_new_value), addresses([kv])
    for _ in range(3):
        f(kv, *batch)
        assert addresses([kv]) == address


@BACKENDS
def test_an_old_value_that_is_read_too_late_is_refused(name):
    wanted, (kv, *batch) = put()
    f = Path(name).function(reads_the_old_value_too_late)
    text = (
        "reshape_and_cache_flash: a cache must not be read, as it was before the"
        " update, where torch_xla divides the compiled function, got aten.i0.default on"
        " the host; read the cache in a function of its own, called before"
    )
    for _ in range(2):
        with pytest.raises(Exception, match=text):
            f(kv, *batch)
        torch_xla.sync()
        assert torch.equal(kv.cpu(), wanted[0])
    Path(name).function(write)(kv, *batch)
    write(*wanted)
    assert torch.equal(kv.cpu(), wanted[0])


@BACKENDS
def test_a_step_that_an_interpreter_calls_is_no_look_at_its_nodes(name):
    """Of which torch_xla holds a clone of each tensor, that may be overwritten."""
    wanted, (kv, *batch) = put()
    step = Path(name).function(write)

    class Caller(torch.nn.Module):
        def forward(self, kv, rows, slots):
            return call(kv, rows, slots)

    graph = torch.fx.symbolic_trace(Caller())
    address = addresses([kv])
    for template in (None, torch.randn(kv.shape)):
        if template is not None:
            on_device = Path("lazy").put(template)
            kv.copy_(on_device)
            wanted[0].copy_(template)
            torch_xla.sync()
        call.step = step
        torch.fx.Interpreter(graph).run(kv, *batch)
        write(*wanted)
        assert torch.equal(kv.cpu(), wanted[0])
        if template is None:
            assert addresses([kv]) == address
        else:
            assert torch.equal(on_device.cpu(), template)


@torch.fx.wrap
def call(*args):
    return call.step(*args)
