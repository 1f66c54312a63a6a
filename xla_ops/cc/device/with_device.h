// For host code outside handlers, which makes what kernels work with: on a
// device of its choice, with CUDA's reasons as texts.
//
// Run by tests/gpu/check_peers.py.

#ifndef XLA_OPS_CC_DEVICE_WITH_DEVICE_H_
#define XLA_OPS_CC_DEVICE_WITH_DEVICE_H_

#include <cuda_runtime_api.h>

#include <string>

namespace xla_ops {

// `what` and CUDA's own words, for one of the functions that return text: good
// until the thread's next.
inline const char* CudaErrorText(const char* what, cudaError_t error) {
  static thread_local std::string text;
  text = std::string(what) + ": " + cudaGetErrorString(error) + " (" +
         cudaGetErrorName(error) + ")";
  static_cast<void>(cudaGetLastError());
  return text.c_str();
}

// The device is the calling thread's current one for as long as this lives.
class WithDevice {
 public:
  explicit WithDevice(int device) {
    error_ = cudaGetDevice(&before_);
    if (error_ == cudaSuccess) error_ = cudaSetDevice(device);
  }
  ~WithDevice() { static_cast<void>(cudaSetDevice(before_)); }
  WithDevice(const WithDevice&) = delete;
  WithDevice& operator=(const WithDevice&) = delete;
  cudaError_t error() const { return error_; }

 private:
  int before_ = 0;
  cudaError_t error_;
};

}  // namespace xla_ops

#endif  // XLA_OPS_CC_DEVICE_WITH_DEVICE_H_
