// The attention kernels for 8-bit keys and values, compiled apart from the
// others to spread the compiler's work.

#include <cuda_fp16.h>

#include "xla_ops/cc/ops/attention/attention_kernels.cuh"

namespace xla_ops {

cudaError_t PrepareMmaFp8(bool clusters) {
  return PrepareMma<__half, true>(clusters);
}

cudaError_t PrepareSimtFp8() { return PrepareSimt<uint8_t>(); }

cudaError_t LaunchMmaFp8(cudaStream_t stream, const AttentionArgs& args,
                         int rows, int multiprocessors) {
  return LaunchMma<__half, true>(stream, args, rows, multiprocessors);
}

cudaError_t LaunchSimtFp8(cudaStream_t stream, const AttentionArgs& args) {
  return LaunchSimt<uint8_t>(stream, args);
}

}  // namespace xla_ops
