// What a handler says where CUDA failed.

#ifndef XLA_OPS_CC_DEVICE_LAUNCH_STATUS_H_
#define XLA_OPS_CC_DEVICE_LAUNCH_STATUS_H_

#include <cuda_runtime_api.h>

#include <string>

namespace xla_ops {

// Such as "rms_norm: CUDA launch failed: invalid argument
// (cudaErrorInvalidValue)".
inline std::string LaunchErrorText(const char* op, cudaError_t error) {
  return std::string(op) +
         ": CUDA launch failed: " + cudaGetErrorString(error) + " (" +
         cudaGetErrorName(error) + ")";
}

// The same where a device cannot be set up.
inline std::string SetupErrorText(const char* op, cudaError_t error) {
  return std::string(op) +
         ": CUDA kernels cannot be loaded: " + cudaGetErrorString(error) +
         " (" + cudaGetErrorName(error) + ")";
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_DEVICE_LAUNCH_STATUS_H_
