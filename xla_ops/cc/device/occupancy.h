// Bounds for __launch_bounds__ that every architecture can meet.
//
// Tested by compiling for all of them.

#ifndef XLA_OPS_CC_DEVICE_OCCUPANCY_H_
#define XLA_OPS_CC_DEVICE_OCCUPANCY_H_

namespace xla_ops {

// Threads that a multiprocessor holds (CUDA C++ Programming Guide, "Technical
// Specifications per Compute Capability").
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ == 700 || __CUDA_ARCH__ == 800 || \
    __CUDA_ARCH__ == 900 || __CUDA_ARCH__ == 1000 || __CUDA_ARCH__ == 1030
constexpr int kMultiprocessorThreads = 2048;
#elif __CUDA_ARCH__ == 750
constexpr int kMultiprocessorThreads = 1024;
#else
constexpr int kMultiprocessorThreads = 1536;
#endif

// `blocks` of `threads`, or as many of them as a multiprocessor holds: ptxas
// would ignore a larger bound.
constexpr int MinBlocks(int blocks, int threads) {
  const int most = kMultiprocessorThreads / threads;
  return blocks < most ? blocks : most;
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_DEVICE_OCCUPANCY_H_
