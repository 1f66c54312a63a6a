// A kernel that starts while the one before it in the stream still runs
// (programmatic dependent launch, compute capability 9.0 on), which hides the
// time that launching it takes. For the second kernel of one handler's call:
//
//   first kernel   LetNextKernelStart() when a block has little left to do, or
//                  at once where what the second does before it waits is worth
//                  its room
//   second kernel  WaitForPreviousKernel() before it touches any memory that
//                  the first reads or writes
//   host           LaunchOverlapping(second, ..., CanOverlap(attributes))
//
// The first must be launched as usual, so that the second, which waits for
// it, has waited for all before it too. A third may follow the second in the
// same way if a block of the second waits in any case: it then ends last.

#ifndef XLA_OPS_CC_DEVICE_OVERLAP_CUH_
#define XLA_OPS_CC_DEVICE_OVERLAP_CUH_

#include <cuda_runtime_api.h>

#include <cstddef>

namespace xla_ops {

// Once every block has called it or ended, the next kernel's may start. They
// take room only where no block of this kernel waits for it.
__device__ __forceinline__ void LetNextKernelStart() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n");
#endif
}

// Returns when the previous kernel has ended and what it wrote can be seen.
__device__ __forceinline__ void WaitForPreviousKernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

// Whether the code that was loaded of a kernel waits: what was compiled for
// an older architecture does not, wherever it runs.
inline bool CanOverlap(const cudaFuncAttributes& attributes) {
  return attributes.ptxVersion >= 90;
}

// Of a launch while the kernel before it may still run.
inline cudaLaunchAttribute OverlapAttribute() {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  return attribute;
}

template <typename Args>
cudaError_t LaunchOverlapping(cudaStream_t stream, void (*kernel)(Args),
                              dim3 blocks, dim3 threads, bool overlap,
                              const Args& args, int shared_bytes = 0) {
  cudaLaunchAttribute attribute = OverlapAttribute();
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = overlap ? 1 : 0;
  void* pointers[] = {const_cast<Args*>(&args)};
  const cudaError_t error = cudaLaunchKernelExC(
      &config, reinterpret_cast<const void*>(kernel), pointers);
  // Reported here, and not to whoever asks for the last error.
  if (error != cudaSuccess) static_cast<void>(cudaGetLastError());
  return error;
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_DEVICE_OVERLAP_CUH_
