// A CUDA handler from its parts, one macro call a target, as core/handler.h has
// it for the CPU:
//
//   // in rms_norm_cuda.cc, inside namespace xla_ops
//   XLA_OPS_CUDA_HANDLER(rms_norm, RmsNormBinding(), MakeRmsNormParams,
//                        LaunchRmsNorm);
//
// It makes xla_ops_rms_norm_cuda and adds {"xla_ops.rms_norm", "CUDA"} to the
// library's table. The last argument queues the work on XLA's stream:
//
//   cudaError_t LaunchRmsNorm(cudaStream_t stream, const RmsNormParams&
//   params);
//
// or returns ffi::Error, if it can fail otherwise. The current device is the
// stream's (registry.h). XLA may capture the handler
// into a CUDA graph, so the launcher must not allocate, synchronise or read
// device memory.
//
// Tested by tests/gpu/kernel_races_test.cc.

#ifndef XLA_OPS_CC_DEVICE_CUDA_HANDLER_H_
#define XLA_OPS_CC_DEVICE_CUDA_HANDLER_H_

#include <cuda_runtime_api.h>

#include <string>
#include <type_traits>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/core/handler.h"
#include "xla_ops/cc/device/kernel_list.h"

namespace xla_ops {

// `what`, such as "CUDA launch failed", with CUDA's reason.
inline ffi::Error ToCudaError(const char* op, const char* what,
                              cudaError_t error) {
  if (error == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(std::string(op) + ": " + what + ": " +
                              cudaGetErrorString(error) + " (" +
                              cudaGetErrorName(error) + ")");
}

inline ffi::Error ToLaunchError(const char* op, cudaError_t error) {
  return ToCudaError(op, "CUDA launch failed", error);
}

// What the initialize stage calls. It looks at no operand and so takes any.
inline auto SetupHandler(const char* op, cudaError_t (*setup)()) {
  return [op, setup](ffi::RemainingArgs, ffi::RemainingRets, ffi::Dictionary) {
    return ToCudaError(op, "CUDA kernels cannot be loaded", setup());
  };
}

inline auto SetupBinding() {
  return ffi::Ffi::Bind<ffi::ExecutionStage::kInitialize>()
      .RemainingArgs()
      .RemainingRets()
      .Attrs();
}

template <typename Make, typename Result, typename Params>
auto CudaHandler(const char* op, Make make,
                 Result (*launch)(cudaStream_t, const Params&)) {
  return MakeCheckedHandler<Params>(
      make, [op, launch](const Params& params, cudaStream_t stream) {
        if constexpr (std::is_same_v<Result, cudaError_t>) {
          return ToLaunchError(op, launch(stream, params));
        } else {
          return launch(stream, params);
        }
      });
}

}  // namespace xla_ops

#define XLA_OPS_CUDA_HANDLER(target, binding, make, launch)      \
  XLA_OPS_CUDA_HANDLER_WITH_SETUP(target, binding, make, launch, \
                                  ::xla_ops::LoadKernels)

#define XLA_OPS_CUDA_HANDLER_WITH_SETUP(target, binding, make, launch, setup) \
  XLA_OPS_HANDLER_SYMBOL(xla_ops_##target##_initialize_cuda,                  \
                         ::xla_ops::SetupHandler(#target, setup),             \
                         ::xla_ops::SetupBinding(),                           \
                         {::xla::ffi::Traits::kCmdBufferCompatible});         \
  XLA_OPS_HANDLER_SYMBOL(                                                     \
      xla_ops_##target##_cuda, ::xla_ops::CudaHandler(#target, make, launch), \
      (binding).Ctx<::xla::ffi::PlatformStream<cudaStream_t>>(),              \
      {::xla::ffi::Traits::kCmdBufferCompatible});                            \
  XLA_OPS_LIST_HANDLER(target, "CUDA",                                        \
                       {nullptr, nullptr, xla_ops_##target##_initialize_cuda, \
                        xla_ops_##target##_cuda})

#endif  // XLA_OPS_CC_DEVICE_CUDA_HANDLER_H_
