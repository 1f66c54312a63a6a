"""JAX arrays in the place of tensors, for functions that check shapes and call ops."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..core import no_torch
from ..core.foreign import Foreign
from ..core.lazy import torch
from ..core.places import Located, dense_strides


class Device(NamedTuple):
    """Where a call will run: "cpu" or "cuda", as far as a trace can know."""

    type: str

    def __str__(self) -> str:
        return self.type


def platform() -> str:
    """The platform that calls are planned for: JAX's default one, in torch's words."""
    name = jax.config.jax_default_device
    name = getattr(name, "platform", name) or jax.default_backend()
    return "cuda" if name in ("gpu", "cuda", "rocm") else name


def torch_dtype(dtype: Any) -> Any:
    """Returns torch's dtype of the same name."""
    try:
        name = np.dtype(dtype).name
    except TypeError:  # of JAX alone, as a key's
        name = str(dtype)
    try:
        return getattr(torch, name)
    except (AttributeError, RuntimeError):
        return no_torch.DType(name)  # which no op takes


def jax_dtype(dtype: Any) -> Any:
    """Returns JAX's dtype of the same name."""
    return jnp.dtype(str(dtype).removeprefix("torch."))


class Array(Foreign):
    """An array, traced or not.

    It has the methods of tensors that functions of ops and gradients call.

    Attributes:
        value: JAX's array.
        dtype: of the operand that it becomes. Not the value's where an op wants int64,
            which JAX seldom has: the call then widens it.
    """

    def __init__(self, value: Any, dtype: Any = None):
        self.value = value
        self.shape = tuple(value.shape)
        self.dtype = torch_dtype(value.dtype) if dtype is None else dtype
        self.device = Device(platform())

    def __repr__(self) -> str:
        return f"an array of {self.value.dtype} and shape {list(self.shape)}"

    def become(self, value: Any) -> None:
        self.value = value.value

    def locate(self) -> Located:
        whole: Any = self
        return Located(whole, 0, dense_strides(self.shape))

    def __getitem__(self, index: int | slice) -> Array:
        if isinstance(index, int):
            return _Part(self, index)
        return Array(self.value[index])

    def __sub__(self, other: Array) -> Array:
        return Array(self.value - other.value)

    def __add__(self, other: Array) -> Array:
        return Array(self.value + other.value)

    def __neg__(self) -> Array:
        return Array(-self.value)

    def __matmul__(self, other: Array) -> Array:
        return Array(self.value @ other.value)

    def t(self) -> Array:
        return Array(self.value.T)

    def transpose(self, first: int, second: int) -> Array:
        return Array(jnp.swapaxes(self.value, first, second))

    def reshape(self, *shape: Any) -> Array:
        return Array(self.value.reshape(*shape))

    def sum(self, dim: int | tuple[int, ...] | None = None) -> Array:
        return Array(self.value.sum(dim, dtype=self.value.dtype))

    def chunk(self, chunks: int, dim: int = 0) -> tuple[Array, ...]:
        return tuple(map(Array, jnp.split(self.value, chunks, dim)))

    def split(self, sizes: Sequence[int], dim: int = 0) -> tuple[Array, ...]:
        ends = list(itertools.accumulate(sizes))[:-1]
        return tuple(map(Array, jnp.split(self.value, ends, dim)))

    def to(self, to: Any) -> Array:
        if isinstance(to, Device):
            return self  # where an array lies is JAX's affair
        return Array(self.value.astype(jax_dtype(to)))

    def float(self) -> Array:
        return self.to(torch.float32)

    def contiguous(self) -> Array:
        return self

    def detach(self) -> Array:
        return self

    def new_zeros(self, *shape: Any, dtype: Any = None) -> Array:
        size = shape[0] if isinstance(shape[0], tuple | list) else shape
        found = self.value.dtype if dtype is None else jax_dtype(dtype)
        return Array(jnp.zeros(size, found))

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """What torch's own functions do, where there is a torch."""
        return getattr(cls, function.__name__)(*args, **(kwargs or {}))

    @staticmethod
    def zeros_like(array: Array) -> Array:
        return array.new_zeros(array.shape)

    @staticmethod
    def cat(arrays: Sequence[Array], dim: int = 0) -> Array:
        return Array(jnp.concatenate([array.value for array in arrays], dim))


class _Part(Array):
    """One element of an array's first dimension, which is not taken out of it."""

    def __init__(self, whole: Array, index: int):
        self._whole = whole
        self._index = index
        self.shape = whole.shape[1:]
        self.dtype = whole.dtype
        self.device = whole.device

    @property
    def value(self) -> Any:
        return self._whole.value[self._index]

    def locate(self) -> Located:
        offset = self._index * math.prod(self.shape)
        whole: Any = self._whole
        return Located(whole, offset, dense_strides(self.shape))


def wrap(value: Any) -> Any:
    """Wraps arrays, and those in lists and tuples."""
    if isinstance(value, jax.Array):
        return Array(value)
    if isinstance(value, np.ndarray):
        return Array(jnp.asarray(value))
    if isinstance(value, list | tuple):
        return type(value)(map(wrap, value))
    if isinstance(value, np.dtype | type(jnp.int8)) or (
        isinstance(value, type) and issubclass(value, np.generic)
    ):
        return torch_dtype(jnp.dtype(value))
    return value


def check_fits(what: str, value: object) -> None:
    """Raises ValueError for NumPy's integers that JAX would wrap around.

    It makes int32 of int64 where jax_enable_x64 is off, and says nothing.
    """
    if isinstance(value, list | tuple):
        for i, one in enumerate(value):
            check_fits(f"{what}[{i}]", one)
    if not (isinstance(value, np.ndarray) and value.dtype.kind in "iu" and value.size):
        return
    limits = np.iinfo(jax.dtypes.canonicalize_dtype(value.dtype))
    for one in (value.min(), value.max()):
        if not limits.min <= one <= limits.max:
            raise ValueError(
                f"{what} must fit {limits.dtype} where jax_enable_x64 is off, got {one}"
            )


def unwrap(value: Any) -> Any:
    if isinstance(value, Array):
        return value.value
    if isinstance(value, list | tuple):
        return tuple(map(unwrap, value))
    return value


def as_int64(value: Any) -> Any:
    """Says that an operand is to be int64, if it is an int32 array.

    JAX makes int64 of nothing unless jax_enable_x64 is set.
    """
    if isinstance(value, Array) and value.dtype == torch.int32:
        return Array(value.value, torch.int64)
    return value
