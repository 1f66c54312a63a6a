// The CUDA handler of fused_qk_norm_rope_and_paged_attention.
//
// Tested by tests/gpu/check_one_call.py.

#include <cuda_runtime_api.h>

#include "xla_ops/cc/core/error.h"
#include "xla_ops/cc/device/cuda_handler.h"
#include "xla_ops/cc/device/kernel_list.h"
#include "xla_ops/cc/device/per_device.h"
#include "xla_ops/cc/ops/attention/attention_launch.h"
#include "xla_ops/cc/ops/attention/fused_qk_norm_rope_and_paged_attention.h"
#include "xla_ops/cc/ops/fused_qk_norm_rope_and_cache/fused_qk_norm_rope_and_cache_launch.h"

namespace xla_ops {
namespace {

// Gives the kernels that write multiprocessors with as much shared memory as
// there is, or no block of the one for decode would find room beside theirs.
cudaError_t SetCarveouts(bool* set) {
  for (const KernelEntry* entry = KernelEntry::First(); entry != nullptr;
       entry = entry->next()) {
    const cudaError_t error = cudaFuncSetAttribute(
        entry->kernel(), cudaFuncAttributePreferredSharedMemoryCarveout,
        cudaSharedmemCarveoutMaxShared);
    if (error != cudaSuccess) {
      static_cast<void>(cudaGetLastError());
      return error;
    }
  }
  *set = true;
  return cudaSuccess;
}

// XLA calls it for each call of every run of a program.
cudaError_t Prepare() {
  static PerDevice<bool> devices;
  bool set = false;
  cudaError_t error = LoadKernels();
  if (error == cudaSuccess) error = devices.Get(SetCarveouts, &set);
  return error == cudaSuccess ? PrepareAttention() : error;
}

ffi::Error CheckAndLaunch(cudaStream_t stream,
                          const PreparedAttentionParams& params) {
  XLA_OPS_RETURN_IF_ERROR(CheckCudaLimits(params.write));
  XLA_OPS_RETURN_IF_ERROR(CheckCudaLimits(kPagedAttentionNames, params.read));
  cudaError_t error = LaunchFusedQkNormRopeAndCache(stream, params.write);
  if (error == cudaSuccess) {
    error = LaunchAttention(stream, params.read, /*after_writer=*/true);
  }
  return ToLaunchError("fused_qk_norm_rope_and_paged_attention", error);
}

}  // namespace

XLA_OPS_CUDA_HANDLER_WITH_SETUP(fused_qk_norm_rope_and_paged_attention,
                                PreparedAttentionBinding(),
                                MakePreparedAttentionParams, CheckAndLaunch,
                                Prepare);

}  // namespace xla_ops
