"""What Dynamo has given up runs by itself, and ops in it as lazily or eagerly.

Dynamo traces each function that is called from there. An op's kernels are called by
torch's dispatcher, and by its autograd, so it came to them too, with what they do to
tensors that it makes up.
"""

import os

import numpy as np
import pytest
import torch
import torch_xla
from torch._dynamo import convert_frame

import xla_ops
import xla_ops.vllm
from support import Path, addresses

WAYS = pytest.mark.parametrize(
    "path, backend",
    [
        ("lazy", "openxla"),
        ("lazy", "xla_ops"),
        ("cpu", "aot_eager"),
        ("cpu", "inductor"),
    ],
)
CORE = os.path.join(os.path.dirname(xla_ops.__file__), "core")


@pytest.fixture(autouse=True)
def traced():
    """Returns a function that tells which functions of core Dynamo looked at."""
    torch._dynamo.reset()

    def names():
        codes = [reference() for reference in convert_frame.input_codes.seen]
        return [c.co_name for c in codes if c and c.co_filename.startswith(CORE)]

    yield names
    torch._dynamo.reset()


class Broken:
    """A context in which Dynamo's graph breaks, so that it gives the function up."""

    def __enter__(self):
        torch._dynamo.graph_break()

    def __exit__(self, *_):
        pass


def write(kv, rows, slots, one):
    with Broken():
        keys, values = kv[0], kv[1]
        torch.ops.xla_ops.reshape_and_cache_flash(
            rows, rows, keys, values, slots, "auto", one, one
        )
    return kv.sum()


def write_by_vllms_name(kv, rows, slots, one):
    with Broken():
        torch.ops._C_cache_ops.reshape_and_cache_flash(
            rows, rows, kv[0], kv[1], slots, "auto", one, one
        )
    return kv.sum()


@WAYS
@pytest.mark.parametrize("step", [write, write_by_vllms_name])
def test_caches_are_written(path, backend, step, traced):
    if step is write_by_vllms_name:
        xla_ops.vllm.register_lowerings()
    kv, rows, slots, one = Path(path).put(
        [
            *(torch.zeros(2, 4, 4, 2, 8), torch.ones(2, 2, 8), torch.tensor([3, 9])),
            torch.ones(1),
        ]
    )
    compiled = torch.compile(step, backend=backend)
    with torch.no_grad():
        assert compiled(kv, rows, slots, one).item() == 64
        before = addresses([kv]) if path == "lazy" else [kv.data_ptr()]
        assert compiled(kv, 2 * rows, slots, one).item() == 128
    assert not traced()
    assert (addresses([kv]) if path == "lazy" else [kv.data_ptr()]) == before


@WAYS
def test_gradients(path, backend, traced):
    def step(x, weight):
        with Broken():
            y = torch.ops.xla_ops.rms_norm(x, weight, 1e-6)
            y.square().sum().backward()
        return y

    torch_xla.device()
    x, weight = torch.randn(3, 8), torch.rand(8)
    wanted = x.clone().requires_grad_()
    got = Path(path).put(x).requires_grad_()
    weight_there = Path(path).put(weight)
    with torch.enable_grad():
        xla_ops.rms_norm(wanted, weight).square().sum().backward()
        torch.compile(step, backend=backend)(got, weight_there)
    torch.testing.assert_close(got.grad.cpu(), wanted.grad)
    assert not traced()


@WAYS
def test_numbers_that_dynamo_does_not_know(path, backend):
    """They give the public function up, which then runs as it does eagerly."""
    qkv, weight, table, positions, kv, slots = Path(path).put(
        [
            *(torch.randn(3, 64), torch.rand(16), torch.randn(8, 16), torch.arange(3)),
            *(torch.zeros(2, 4, 4, 1, 16), torch.tensor([3, 9, 1])),
        ]
    )

    def step(qkv, kv, heads):
        return xla_ops.fused_qk_norm_rope_and_cache(
            *(qkv, heads, 1, 16, 1e-6, weight, weight, table, True, positions),
            *(kv[0], kv[1], slots),
        )

    with torch.no_grad():
        wanted = step(qkv, kv.clone(), 2)
        for heads in (np.int64(2), torch.tensor(2), np.uint8(2)):
            got = torch.compile(step, backend=backend)(qkv, kv, heads)
            torch.testing.assert_close(got.cpu(), wanted.cpu())
    assert kv.cpu().any()
