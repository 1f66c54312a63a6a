// Sums and maxima over the threads that share a row.
//
// Tested through the kernels of rows by tests/gpu/check_kernels.py.

#ifndef XLA_OPS_CC_DEVICE_REDUCE_CUH_
#define XLA_OPS_CC_DEVICE_REDUCE_CUH_

namespace xla_ops {

constexpr unsigned kFullWarp = 0xffffffffu;

// Sum over aligned groups of `width` lanes, a power of two up to 32. All
// lanes of the warp must call; each gets its group's sum.
__device__ __forceinline__ float WarpSum(float x, int width = 32) {
  for (int offset = width / 2; offset > 0; offset /= 2) {
    x += __shfl_xor_sync(kFullWarp, x, offset);
  }
  return x;
}

// Sum over the whole block, whose size is a multiple of 32; every thread
// gets it. `scratch` holds 32 floats of shared memory that no thread may
// touch again before another barrier.
__device__ __forceinline__ float BlockSum(float x, float* scratch) {
  const int thread = threadIdx.x + threadIdx.y * blockDim.x;
  const int num_warps = blockDim.x * blockDim.y / 32;
  const int lane = thread % 32;
  x = WarpSum(x);
  if (lane == 0) scratch[thread / 32] = x;
  __syncthreads();
  // Every warp adds up the partial sums itself: no second barrier.
  return WarpSum(lane < num_warps ? scratch[lane] : 0.0f);
}

// The same for maxima. NaN counts as smaller than any number.
__device__ __forceinline__ float WarpMax(float x, int width = 32) {
  for (int offset = width / 2; offset > 0; offset /= 2) {
    x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, offset));
  }
  return x;
}

__device__ __forceinline__ float BlockMax(float x, float* scratch) {
  const int thread = threadIdx.x + threadIdx.y * blockDim.x;
  const int num_warps = blockDim.x * blockDim.y / 32;
  const int lane = thread % 32;
  x = WarpMax(x);
  if (lane == 0) scratch[thread / 32] = x;
  __syncthreads();
  return WarpMax(scratch[lane < num_warps ? lane : 0]);
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_DEVICE_REDUCE_CUH_
