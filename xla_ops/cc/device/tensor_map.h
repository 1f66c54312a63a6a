// The driver's function that describes a tensor to the copy engine
// (cuTensorMapEncodeTiled), found at run time: libcuda is not linked.
//
// Tested through the Hopper kernels by tests/gpu/check_kernels.py.

#ifndef XLA_OPS_CC_DEVICE_TENSOR_MAP_H_
#define XLA_OPS_CC_DEVICE_TENSOR_MAP_H_

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "xla_ops/cc/device/per_device.h"

namespace xla_ops {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// Null where the driver has none.
inline cudaError_t GetEncodeTiled(EncodeTiled* encode) {
  static PerDevice<EncodeTiled> found;
  return found.Get(
      [](EncodeTiled* result) {
        *result = nullptr;
        void* function = nullptr;
        cudaDriverEntryPointQueryResult status;
        const cudaError_t error = cudaGetDriverEntryPointByVersion(
            "cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault,
            &status);
        if (error != cudaSuccess) return error;
        if (status == cudaDriverEntryPointSuccess) {
          *result = reinterpret_cast<EncodeTiled>(function);
        }
        return cudaSuccess;
      },
      encode);
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_DEVICE_TENSOR_MAP_H_
