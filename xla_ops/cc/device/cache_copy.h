// Queues the copies of core/cache_copy.h.

#ifndef XLA_OPS_CC_DEVICE_CACHE_COPY_H_
#define XLA_OPS_CC_DEVICE_CACHE_COPY_H_

#include <cuda_runtime_api.h>

#include "xla_ops/cc/core/cache_copy.h"

namespace xla_ops {

inline cudaError_t CopyCaches(cudaStream_t stream, const CacheCopies& copies) {
  for (const CacheCopy& copy : copies) {
    const cudaError_t error = cudaMemcpyAsync(copy.to, copy.from, copy.bytes,
                                              cudaMemcpyDeviceToDevice, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_DEVICE_CACHE_COPY_H_
