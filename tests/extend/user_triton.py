"""Triton kernels that tests bring. Triton reads their source: it needs a file."""

# ruff: noqa: N803 - constants in capitals, as Triton has them

import triton
import triton.language as tl


@triton.jit
def add_kernel(x, y, out, n, a, BLOCK: tl.constexpr):
    """out = x + a * y."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    value = tl.load(x + i, mask=mask) + a * tl.load(y + i, mask=mask)
    tl.store(out + i, value, mask=mask)


@triton.autotune(
    configs=[
        triton.Config({"BLOCK": 256}, num_warps=2),
        triton.Config({"BLOCK": 1024}, num_warps=8),
    ],
    key=["n"],
)
@triton.jit
def tuned_kernel(x, n, BLOCK: tl.constexpr):
    """x = 2 * x."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + i, 2 * tl.load(x + i, mask=i < n), mask=i < n)


@triton.jit
def softmax_kernel(x, out, columns, BLOCK: tl.constexpr):
    """A row a program."""
    i = tl.arange(0, BLOCK)
    row = tl.program_id(0) * columns
    value = tl.load(x + row + i, mask=i < columns, other=-float("inf"))
    value = tl.exp(value - tl.max(value, axis=0))
    tl.store(out + row + i, value / tl.sum(value, axis=0), mask=i < columns)


@triton.jit
def product_kernel(x, y, out, N: tl.constexpr):
    """One tile of a product, which takes shared memory."""
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(out + at, tl.dot(tl.load(x + at), tl.load(y + at)))


@triton.jit
def broken_kernel(x, N: tl.constexpr):
    tl.store(x + tl.arange(0, N), undefined_name)  # type: ignore[name-defined]  # noqa: F821


def pre_hook(args):
    pass
