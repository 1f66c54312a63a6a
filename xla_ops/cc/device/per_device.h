// A fact about a device that takes set-up to learn, such as which code of a
// library runs on it, found once by whichever thread comes first.
//
//   static PerDevice<bool> ready;
//   bool value;
//   cudaError_t error = ready.Get(
//       [](bool* value) { ...; return cudaSuccess; }, &value);

#ifndef XLA_OPS_CC_DEVICE_PER_DEVICE_H_
#define XLA_OPS_CC_DEVICE_PER_DEVICE_H_

#include <cuda_runtime_api.h>

#include <atomic>

namespace xla_ops {

template <typename T>
class PerDevice {
 public:
  // Sets `*value` for the current device: by `find(value)` the first time
  // that it succeeds, from memory after that, at the cost of one atomic
  // load. Threads that race may all call `find`, which must be idempotent.
  template <typename F>
  cudaError_t Get(F&& find, T* value) {
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess) return error;
    Entry* entry = device < kMaxDevices ? &entries_[device] : nullptr;
    if (entry != nullptr && entry->known.load(std::memory_order_acquire)) {
      *value = entry->value.load(std::memory_order_relaxed);
      return cudaSuccess;
    }
    error = find(value);
    if (error == cudaSuccess && entry != nullptr) {
      entry->value.store(*value, std::memory_order_relaxed);
      entry->known.store(true, std::memory_order_release);
    }
    return error;
  }

 private:
  struct Entry {
    std::atomic<bool> known{false};
    std::atomic<T> value{};
  };

  // More devices than any host has; beyond it `find` runs every time.
  static constexpr int kMaxDevices = 64;
  Entry entries_[kMaxDevices];
};

}  // namespace xla_ops

#endif  // XLA_OPS_CC_DEVICE_PER_DEVICE_H_
