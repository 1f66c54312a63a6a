// The attention kernels for 8-bit keys and values, compiled apart from the
// others to spread the compiler's work.

#include <cuda_fp16.h>

#include "xla_ops/cc/ops/attention/attention_kernels.cuh"

namespace xla_ops {

cudaError_t PrepareAttentionFp8(bool has_mma) {
  const cudaError_t error = PrepareSimt<uint8_t>();
  if (error != cudaSuccess || !has_mma) return error;
  return PrepareMma<__half, true>();
}

cudaError_t LaunchAttentionFp8(cudaStream_t stream, const AttentionArgs& args,
                               bool use_mma) {
  return use_mma ? LaunchMma<__half, true>(stream, args)
                 : LaunchSimt<uint8_t>(stream, args);
}

}  // namespace xla_ops
