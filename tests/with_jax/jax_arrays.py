"""Arrays for JAX, and tensors for torch of the same bits.

On four CPU devices; or, where JAX_PLATFORMS says so, on a GPU, and tensors are CUDA's.
"""

import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import torch

# JAX reads them when it first needs a device.
os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=4"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# NumPy has no name of its own for what JAX's arrays hold.
_BITS = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}


def random(shape, dtype="float32", seed=0):
    values = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(values, dtype)


def integers(*values, shape=None):
    array = jnp.array(values, jnp.int32)
    return array if shape is None else array.reshape(shape)


def tensor(value):
    """The tensor of an array's bits, on the same device; other values as they are."""
    if isinstance(value, list | tuple):
        return type(value)(map(tensor, value))
    if not isinstance(value, jax.Array):
        return value
    array = np.asarray(value)
    dtype = getattr(torch, array.dtype.name)
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    if array.dtype == bool:
        return torch.from_numpy(array.copy()).to(device)
    bits = array.view(_BITS[array.dtype.itemsize])
    return torch.from_numpy(bits.copy()).view(dtype).to(device)


def same_bits(found, expected):
    """Asserts that arrays have the dtypes, shapes and bits of tensors."""
    if isinstance(found, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            same_bits(one, other)
        return
    if found is None or expected is None:
        assert found is expected
        return
    got = tensor(found)
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    assert torch.equal(_bits(got), _bits(expected))


def _bits(t):
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return t.cpu().contiguous().view(sizes[t.element_size()])


def addresses(arrays):
    """Of each device's part of each array."""
    return [
        shard.data.unsafe_buffer_pointer()
        for array in arrays
        for shard in array.addressable_shards
    ]


def copies(text):
    """The copies of arrays, but for scalars, in a program."""
    return re.findall(r".*\[\d[^ ]* copy\(.*", text)
