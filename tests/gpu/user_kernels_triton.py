"""The Triton kernels of check_user_kernels.py."""

# ruff: noqa: N803 - constants in capitals, as Triton has them

import torch
import triton
import triton.language as tl

from xla_ops.extend import ceil_div, triton_kernel


@triton.jit
def add_kernel(x, y, out, n, a, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    value = tl.load(x + i, mask=mask) + a * tl.load(y + i, mask=mask)
    tl.store(out + i, value, mask=mask)


@triton.jit
def scale_kernel(x, out, n, a, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, a * tl.load(x + i, mask=i < n), mask=i < n)


@triton.autotune(
    configs=[triton.Config({}, num_warps=n) for n in (1, 2, 4, 8, 16)], key=["columns"]
)
@triton.jit
def softmax_kernel(x, out, columns, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    row = tl.program_id(0) * columns
    value = tl.load(x + row + i, mask=i < columns, other=-float("inf"))
    value = tl.exp(value - tl.max(value, axis=0))
    tl.store(out + row + i, value / tl.sum(value, axis=0), mask=i < columns)


@triton.jit
def product_kernel(x, y, out, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(out + at, tl.dot(tl.load(x + at), tl.load(y + at)))


add = triton_kernel(
    add_kernel,
    "(Tensor x, Tensor y, float a) -> Tensor",
    parameters=lambda x, y, a, out: (x, y, out, x.numel(), a),
    grid=lambda x, y, a, meta: ceil_div(x.numel(), meta["BLOCK"]),
    configs=[triton.Config({"BLOCK": n}) for n in (256, 1024, 4096)],
    reference=lambda x, y, a: x + a * y,
    name="triton_add",
)

scale_ = triton_kernel(
    scale_kernel,
    "(Tensor(a!) x, float a) -> ()",
    parameters=lambda x, a: (x, x, x.numel(), a),
    grid=lambda x, a, meta: ceil_div(x.numel(), meta["BLOCK"]),
    constants={"BLOCK": 256},
    reference=lambda x, a: a * x,
    name="triton_scale_",
)

scale = triton_kernel(
    scale_kernel,
    "(Tensor x, float a) -> Tensor",
    parameters=lambda x, a, out: (x, out, x.numel(), a),
    grid=lambda x, a, meta: ceil_div(x.numel(), meta["BLOCK"]),
    constants={"BLOCK": 256},
    reference=lambda x, a: a * x,
    name="triton_scale",
)

softmax = triton_kernel(
    softmax_kernel,
    "(Tensor x) -> Tensor",
    parameters=lambda x, out: (x, out, x.size(-1)),
    grid=lambda x, meta: x.size(0),
    constants=lambda x: {"BLOCK": triton.next_power_of_2(x.size(-1))},
    reference=lambda x: torch.softmax(x, -1),
    name="triton_softmax",
)

product = triton_kernel(
    product_kernel,
    "(Tensor x, Tensor y) -> Tensor",
    constants={"N": 64},
    grid=1,
    results=lambda x, y: x.like(dtype=torch.float32),
    reference=lambda x, y: x.float() @ y.float(),
    name="triton_product",
)
