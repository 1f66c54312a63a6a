// Launches kernels, and what launchers share.
//
//   return LaunchKernel<RmsNormKernel<T, Plan>>(stream, blocks, threads, input,
//                                               ...);
//
// Tested through the kernels of every op.

#ifndef XLA_OPS_CC_DEVICE_LAUNCH_H_
#define XLA_OPS_CC_DEVICE_LAUNCH_H_

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>

#include "xla_ops/cc/device/kernel_list.h"

namespace xla_ops {

// Arguments are converted to the kernel's parameters, as in a call.
template <typename... Params, typename... Args>
cudaError_t LaunchKernelPointer(void (*kernel)(Params...), cudaStream_t stream,
                                dim3 blocks, dim3 threads,
                                const Args&... args) {
  const auto launch = [=](Params... values) {
    void* pointers[] = {&values...};
    return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), blocks,
                            threads, pointers, /*sharedMem=*/0, stream);
  };
  const cudaError_t error = launch(args...);
  // Reported here, and not to whoever asks for the last error.
  if (error != cudaSuccess) static_cast<void>(cudaGetLastError());
  return error;
}

// Queues a kernel that needs no dynamic shared memory. All launches of
// kernels go through this, since it has the kernel listed (kernel_list.h).
template <auto kKernel, typename... Args>
cudaError_t LaunchKernel(cudaStream_t stream, dim3 blocks, dim3 threads,
                         const Args&... args) {
  static_cast<void>(&ListedKernel<kKernel>::entry);
  return LaunchKernelPointer(kKernel, stream, blocks, threads, args...);
}

constexpr int64_t CeilDivide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// CUDA's limits on gridDim.x and gridDim.y.
constexpr int64_t kMaxGridX = INT32_MAX;
constexpr int64_t kMaxGridY = 65535;

// Calls launch(first, count) for consecutive parts of `rows`, each as long as
// a grid of blocks of `block_rows` allows: once, but for gigantic tensors.
template <typename F>
cudaError_t ForEachGrid(int64_t rows, int64_t block_rows, F&& launch) {
  const int64_t most = kMaxGridX * block_rows;
  for (int64_t first = 0; first < rows; first += most) {
    const cudaError_t error = launch(first, std::min(most, rows - first));
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

// A block for rows of `row_units` units, a thread each. block.x threads share
// a row: a power of two, so that no row straddles warps, or above 32 whole
// warps; of a row that takes more than `max_row_threads`, an equal part.
// block.y rows bring the block to `block_threads`, if one has not that many.
inline dim3 RowBlock(int64_t row_units, int64_t max_row_threads,
                     int64_t block_threads) {
  const int64_t units = std::max<int64_t>(1, row_units);
  const int64_t part = CeilDivide(units, CeilDivide(units, max_row_threads));
  dim3 block(1, 1, 1);
  if (part > 32) {
    block.x = static_cast<unsigned>(CeilDivide(part, 32) * 32);
  } else {
    while (block.x < part) block.x *= 2;
  }
  block.y = std::max(1u, static_cast<unsigned>(block_threads) / block.x);
  return block;
}

// gridDim.y where blocks share rows: as many blocks a row as make `enough` in
// all with the `grid_x` blocks of gridDim.x, at most `needed`. Where there are
// many rows, fewer blocks do more each.
inline unsigned BlocksPerRow(int64_t needed, int64_t grid_x, int64_t enough) {
  return static_cast<unsigned>(
      std::clamp<int64_t>(enough / grid_x, 1, std::min(needed, kMaxGridY)));
}

// Calls f(Unit{}) with the widest type to move bytes by, of 16 bytes or less,
// for which fits(bytes) is true. The narrowest, of kNarrowest bytes (1 or 2),
// is not asked for.
template <int kNarrowest, typename Fits, typename F>
cudaError_t DispatchUnit(Fits&& fits, F&& f) {
  if (fits(16)) return f(uint4{});
  if (fits(8)) return f(uint2{});
  if (fits(4)) return f(uint32_t{});
  if constexpr (kNarrowest == 1) {
    if (!fits(2)) return f(uint8_t{});
  }
  return f(uint16_t{});
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_DEVICE_LAUNCH_H_
