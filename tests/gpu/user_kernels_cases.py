"""The kernels of check_user_kernels.py, as users bring them."""

import torch

from xla_ops.extend import ceil_div, cuda_kernel

SCALE = """
extern "C" __global__ void scale(const float* x, float a, float* out, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = a * x[i];
}
"""

BOTH = """
#include <cuda_fp16.h>
#include <cuda_bf16.h>
template <typename T>
__global__ void both(const T* x, const T* y, T* sum, T* difference, long long n) {
  long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
  if (i >= n) return;
  sum[i] = T((float)x[i] + (float)y[i]);
  difference[i] = T((float)x[i] - (float)y[i]);
}
"""

# Every kind of number, and a null pointer.
NUMBERS = """
__global__ void numbers(const float* x, double* out, bool b, short s, int i,
                        unsigned u, long long l, float f, double d, const int* null) {
  if (threadIdx.x != 0) return;
  double all[] = {x[0], b, s, i, u, (double)l, f, d, null == nullptr};
  for (int k = 0; k < 9; ++k) out[k] = all[k];
}
"""

# Turns a row around through dynamic shared memory.
REVERSE = """
__global__ void reverse(const float* x, float* out, int n) {
  extern __shared__ float row[];
  x += blockIdx.x * (long long)n, out += blockIdx.x * (long long)n;
  for (int i = threadIdx.x; i < n; i += blockDim.x) row[i] = x[i];
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += blockDim.x) out[i] = row[n - 1 - i];
}
"""

# Each block of a cluster writes how many blocks the cluster has.
CLUSTERS = """
__global__ void clusters(int* out) {
  unsigned size;
  asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(size));
  if (threadIdx.x == 0) out[blockIdx.x] = size;
}
"""

TWO = """
__global__ void two(const float* a, float* x, float* y, float* z) {
  int i = threadIdx.x;
  x[i] += *a, y[i] -= *a;
  z[i] = x[i] * y[i];
}
"""

C_TYPES = {
    torch.float32: "float",
    torch.float16: "__half",
    torch.bfloat16: "__nv_bfloat16",
}

scale = cuda_kernel(
    SCALE,
    "scale",
    "(Tensor x, float a) -> Tensor",
    parameters=lambda x, a, out: (x, a, out, x.numel()),
    grid=lambda x, a: ceil_div(x.numel(), 256),
    block=256,
    reference=lambda x, a: a * x,
)

scale_ = cuda_kernel(
    SCALE,
    "scale",
    "(Tensor(a!) x, float a) -> ()",
    parameters=lambda x, a: (x, a, x, x.numel()),
    grid=lambda x, a: ceil_div(x.numel(), 256),
    block=256,
    reference=lambda x, a: a * x,
    name="scale_",
)

both = cuda_kernel(
    BOTH,
    lambda x, y: f"both<{C_TYPES[x.dtype]}>",
    "(Tensor x, Tensor y) -> (Tensor, Tensor)",
    parameters=lambda x, y, a, b: (x, y, a, b, x.numel()),
    grid=lambda x, y: ceil_div(x.numel(), 128),
    block=128,
    reference=lambda x, y: (x + y, x - y),
    name="both",
)


def _numbers(x):
    values = [x[0].double(), *map(float, (1, -2, -3, 2**32 - 1, -(2**40), 0.5, 0.1, 1))]
    double = {"dtype": torch.float64, "device": x.device}
    return torch.stack([torch.as_tensor(v, **double) for v in values])


numbers = cuda_kernel(
    NUMBERS,
    "numbers",
    "(Tensor x) -> Tensor",
    results=lambda x: x.like([9], torch.float64),
    parameters=lambda x, out: (
        *(x, out, True, -2, -3, 2**32 - 1, -(2**40), 0.5, 0.1, None),
    ),
    grid=1,
    block=32,
    reference=_numbers,
)

reverse = cuda_kernel(
    REVERSE,
    "reverse",
    "(Tensor x) -> Tensor",
    parameters=lambda x, out: (x, out, x.size(-1)),
    grid=lambda x: x.size(0),
    block=256,
    shared_bytes=lambda x: 4 * x.size(-1),
    reference=lambda x: x.flip(-1),
)

clusters = cuda_kernel(
    CLUSTERS,
    "clusters",
    "(Tensor out) -> Tensor",
    parameters=lambda given, out: (out,),
    grid=8,
    block=32,
    cluster=4,
    reference=lambda out: torch.full_like(out, 4),
)

two = cuda_kernel(
    TWO,
    "two",
    "(Tensor a, Tensor(a!) x, Tensor(b!) y) -> Tensor",
    results=lambda a, x, y: x,
    grid=1,
    block=lambda a, x, y: x.numel(),
    reference=lambda a, x, y: (x + a, y - a, (x + a) * (y - a)),
)

too_much_shared = cuda_kernel(
    REVERSE,
    "reverse",
    "(Tensor x) -> Tensor",
    parameters=lambda x, out: (x, out, x.size(-1)),
    grid=1,
    block=256,
    shared_bytes=232449,
    reference=lambda x: x,
    name="too_much_shared",
)
