// Set-up that a device needs once, such as raising a kernel's shared-memory
// limit, from whichever thread comes first.
//
//   static OncePerDevice once;
//   return once.Run([] { return cudaFuncSetAttribute(...); });

#ifndef XLA_OPS_CC_DEVICE_ONCE_H_
#define XLA_OPS_CC_DEVICE_ONCE_H_

#include <cuda_runtime_api.h>

#include <atomic>

namespace xla_ops {

class OncePerDevice {
 public:
  // Runs `set_up` for the current device unless it has succeeded for it
  // before. It may run twice when two threads race, so it must be
  // idempotent; after that a call costs one atomic load.
  template <typename F>
  cudaError_t Run(F&& set_up) {
    int device = 0;
    const cudaError_t found = cudaGetDevice(&device);
    if (found != cudaSuccess) return found;
    const bool tracked = device < kMaxDevices;
    if (tracked && done_[device].load(std::memory_order_acquire)) {
      return cudaSuccess;
    }
    const cudaError_t error = set_up();
    if (error == cudaSuccess && tracked) {
      done_[device].store(true, std::memory_order_release);
    }
    return error;
  }

 private:
  // More devices than any host has; beyond it set-up runs every time.
  static constexpr int kMaxDevices = 64;
  std::atomic<bool> done_[kMaxDevices] = {};
};

}  // namespace xla_ops

#endif  // XLA_OPS_CC_DEVICE_ONCE_H_
