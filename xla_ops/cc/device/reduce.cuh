// Sums and maxima over the threads that share a row.
//
// Tested through the kernels of rows by tests/gpu/check_kernels.py.

#ifndef XLA_OPS_CC_DEVICE_REDUCE_CUH_
#define XLA_OPS_CC_DEVICE_REDUCE_CUH_

#include <math_constants.h>

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

// Partial results of a block's warps; used by one reduction of a kernel only.
struct alignas(16) WarpResults {
  float value[32];
};

// Combines a number of each warp, given by its first lane, over the whole
// block, whose size is a multiple of 32 and at most 32 * kMaxWarps, or just
// that with kFull; every thread gets the result. Every thread reads all the
// numbers, four at a time and none after another: sooner done than five more
// shuffles. `none`: changes nothing. Here is what comes before the barrier.
template <int kMaxWarps, bool kFull>
__device__ __forceinline__ void ShareWarps(float x, float none,
                                           WarpResults& results) {
  static_assert(kMaxWarps % 4 == 0 && kMaxWarps <= 32);
  // A full block is one row.
  const int thread =
      kFull ? threadIdx.x : threadIdx.x + threadIdx.y * blockDim.x;
  const int warp = thread / 32;
  const int lane = thread % 32;
  if (lane == 0) results.value[warp] = x;
  if constexpr (!kFull) {
    // The last warp fills up the rest.
    const int num_warps = blockDim.x * blockDim.y / 32;
    if (warp == num_warps - 1 && lane > 0 && warp + lane < kMaxWarps) {
      results.value[warp + lane] = none;
    }
  }
}

// What comes after it.
template <int kMaxWarps, typename F>
__device__ __forceinline__ float CombineShared(F&& combine,
                                               const WarpResults& results) {
  float four[kMaxWarps / 4];
#pragma unroll
  for (int i = 0; i < kMaxWarps / 4; ++i) {
    const float* value = results.value + 4 * i;
    four[i] = combine(combine(value[0], value[1]), combine(value[2], value[3]));
  }
#pragma unroll
  for (int i = 1; i < kMaxWarps / 4; ++i) four[0] = combine(four[0], four[i]);
  return four[0];
}

template <int kMaxWarps, bool kFull, typename F>
__device__ __forceinline__ float CombineWarps(float x, float none, F&& combine,
                                              WarpResults& results) {
  ShareWarps<kMaxWarps, kFull>(x, none, results);
  __syncthreads();
  return CombineShared<kMaxWarps>(combine, results);
}

// Sum over a block of at most kMaxWarps warps.
template <int kMaxWarps, bool kFull = false>
__device__ __forceinline__ float BlockSum(float x, WarpResults& results) {
  return CombineWarps<kMaxWarps, kFull>(
      WarpSum(x), 0.0f, [](float a, float b) { return a + b; }, results);
}

// Two sums behind one barrier.
template <int kMaxWarps, bool kFull = false>
__device__ __forceinline__ float2 BlockSum(float2 x,
                                           WarpResults (&results)[2]) {
  const auto add = [](float a, float b) { return a + b; };
  ShareWarps<kMaxWarps, kFull>(WarpSum(x.x), 0.0f, results[0]);
  ShareWarps<kMaxWarps, kFull>(WarpSum(x.y), 0.0f, results[1]);
  __syncthreads();
  return {CombineShared<kMaxWarps>(add, results[0]),
          CombineShared<kMaxWarps>(add, results[1])};
}

// The same for maxima. NaN counts as smaller than any number.
__device__ __forceinline__ float WarpMax(float x, int width = 32) {
  for (int offset = width / 2; offset > 0; offset /= 2) {
    x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, offset));
  }
  return x;
}

template <int kMaxWarps, bool kFull = false>
__device__ __forceinline__ float BlockMax(float x, WarpResults& results) {
  return CombineWarps<kMaxWarps, kFull>(
      WarpMax(x), -CUDART_INF_F, [](float a, float b) { return fmaxf(a, b); },
      results);
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_DEVICE_REDUCE_CUH_
