"""Kernels that several tests bring, and a machine with a GPU that is not there."""

import torch

from xla_ops.core import handlers
from xla_ops.extend import ceil_div, cuda_kernel, launch

SCALE = """
extern "C" __global__ void scale(const float* x, float a, float* out, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = a * x[i];
}
"""

# Any type, by a template; sums and differences at once.
BOTH = """
#include <cuda_fp16.h>
template <typename T>
__global__ void both(const T* __restrict__ x, const T* y, T* sum, T* difference,
                     long long n) {
  long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
  if (i >= n) return;
  sum[i] = (float)x[i] + (float)y[i];
  difference[i] = (float)x[i] - (float)y[i];
}
"""

_C_TYPES = {torch.float32: "float", torch.float16: "__half"}


def make_scale(**options):
    """scale(x, a): a * x."""
    return cuda_kernel(
        SCALE,
        "scale",
        "(Tensor x, float a=2.0) -> Tensor",
        **{
            "parameters": lambda x, a, out: (x, a, out, x.numel()),
            "grid": lambda x, a: ceil_div(x.numel(), 256),
            "block": 256,
            "reference": lambda x, a: a * x,
            **options,
        },
    )


def make_scale_in_place(**options):
    """scale_(x, a): x becomes a * x."""
    return cuda_kernel(
        SCALE,
        "scale",
        "(float a, Tensor(a!) x) -> ()",
        parameters=lambda a, x: (x, a, x, x.numel()),
        grid=lambda a, x: ceil_div(x.numel(), 256),
        block=256,
        reference=lambda a, x: a * x,
        name="scale_",
        **options,
    )


def make_both(**options):
    """both(x, y): their sum and difference, in float32 or float16."""
    return cuda_kernel(
        BOTH,
        lambda x, y: f"both<{_C_TYPES[x.dtype]}>",
        "(Tensor x, Tensor y) -> (Tensor, Tensor)",
        parameters=lambda x, y, a, b: (x, y, a, b, x.numel()),
        grid=lambda x, y: ceil_div(x.numel(), 128),
        block=128,
        name="both",
        **{"reference": lambda x, y: (x + y, x - y), **options},
    )


def pretend_gpu(monkeypatch, capability=(9, 0)):
    """Has calls lowered as for a GPU; none can run."""
    machine = launch.Machine(capability, True, "a GPU that is not there")
    monkeypatch.setattr(launch, "machine", lambda: machine)
    monkeypatch.setattr(handlers, "platform_of", lambda device: handlers.CUDA)
    codes = []
    monkeypatch.setattr(launch, "add_code", codes.append)
    return codes


def op_of(name):
    """The op below the newest function of that name."""
    from xla_ops.core.op import OPS

    names = [op for op in OPS.values() if op.public_name == name]
    return names[-1]
