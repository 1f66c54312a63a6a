// The kernels of a library, listed so that all can be loaded at once.
//
// CUDA loads a kernel's code on its first use, and may wait for the device to
// be idle first. It never is where another rank's collective waits for the
// stream that this kernel is for: a deadlock. So a handler's initialize stage
// loads them, before XLA queues anything (device/cuda_handler.h).
//
// LaunchKernel() (device/launch.h) lists the kernels that it is compiled for;
// nobody else need know of this.
//
// Tested by tests/gpu/kernel_races_test.cc.

#ifndef XLA_OPS_CC_DEVICE_KERNEL_LIST_H_
#define XLA_OPS_CC_DEVICE_KERNEL_LIST_H_

#include <cuda_runtime_api.h>

#include "xla_ops/cc/device/per_device.h"

namespace xla_ops {

// One kernel of the list. Entries are static objects, which add themselves
// while the library is loaded: by one thread, before any handler can run.
class __attribute__((visibility("hidden"))) KernelEntry {
 public:
  explicit KernelEntry(const void* kernel) : kernel_(kernel), next_(First()) {
    First() = this;
  }
  KernelEntry(const KernelEntry&) = delete;
  KernelEntry& operator=(const KernelEntry&) = delete;

  static const KernelEntry*& First() {
    static const KernelEntry* first = nullptr;
    return first;
  }
  const void* kernel() const { return kernel_; }
  const KernelEntry* next() const { return next_; }

 private:
  const void* kernel_;
  const KernelEntry* next_;
};

// The entry of a kernel. Code that mentions it has the kernel listed, whether
// it runs or not.
template <auto kKernel>
struct ListedKernel {
  static const KernelEntry entry;
};

template <auto kKernel>
const KernelEntry ListedKernel<kKernel>::entry(
    reinterpret_cast<const void*>(kKernel));

// Loads a kernel on the current device, a side effect of asking for its
// attributes, and raises its limit of dynamic shared
// memory where `shared_bytes` says so.
inline cudaError_t LoadKernel(const void* kernel, int shared_bytes = 0) {
  cudaFuncAttributes attributes;
  cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error == cudaSuccess && shared_bytes > 0) {
    error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  }
  // Reported here, and not to whoever asks for the last error.
  if (error != cudaSuccess) static_cast<void>(cudaGetLastError());
  return error;
}

template <typename... Params>
cudaError_t LoadKernel(void (*kernel)(Params...), int shared_bytes = 0) {
  return LoadKernel(reinterpret_cast<const void*>(kernel), shared_bytes);
}

// Loads the listed kernels on the current device. Costs one atomic load after
// the first time; safe from any thread.
__attribute__((visibility("hidden"))) inline cudaError_t LoadKernels() {
  static PerDevice<bool> devices;
  bool loaded = false;
  return devices.Get(
      [](bool* loaded) {
        for (const KernelEntry* entry = KernelEntry::First(); entry != nullptr;
             entry = entry->next()) {
          const cudaError_t error = LoadKernel(entry->kernel());
          if (error != cudaSuccess) return error;
        }
        *loaded = true;
        return cudaSuccess;
      },
      &loaded);
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_DEVICE_KERNEL_LIST_H_
