// Launches kernels, and what launchers share.
//
//   return LaunchKernel<RmsNormKernel<T, Plan>>(stream, blocks, threads, input,
//                                               ...);
//
// Tested through the kernels of every op.

#ifndef XLA_OPS_CC_DEVICE_LAUNCH_H_
#define XLA_OPS_CC_DEVICE_LAUNCH_H_

#include <cuda_runtime_api.h>

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

}  // namespace xla_ops

#endif  // XLA_OPS_CC_DEVICE_LAUNCH_H_
