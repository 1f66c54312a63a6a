// The handler `xla_ops.launch_kernel`, and the C function by which Python gives
// it code.
//
// Captured into CUDA graphs like the handlers of the ops: it does nothing but
// launch, and the initialize stage has loaded the code before.
//
// Tested by launch_test.cc and, on a GPU, by tests/gpu/check_user_kernels.py.

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/core/handler.h"
#include "xla_ops/cc/core/registry.h"
#include "xla_ops/cc/launch/code.h"
#include "xla_ops/cc/launch/driver.h"
#include "xla_ops/cc/launch/launch.h"

namespace xla_ops {
namespace {

template <ffi::ExecutionStage kStage>
auto LaunchBinding() {
  return ffi::Ffi::Bind<kStage>()
      .RemainingArgs()
      .RemainingRets()
      .template Attr<std::string_view>("op")
      .template Attr<std::string_view>("kernel")
      .template Attr<std::string_view>("code")
      .template Attr<int64_t>("code_bytes")
      .template Attr<std::string_view>("grid")
      .template Attr<std::string_view>("block")
      .template Attr<std::string_view>("cluster")
      .template Attr<int64_t>("shared_bytes")
      .template Attr<int64_t>("alignment")
      .template Attr<std::string_view>("guarded")
      .template Attr<std::string_view>("parameters");
}

ffi::Error Initialize(ffi::RemainingArgs, ffi::RemainingRets,
                      std::string_view op, std::string_view kernel,
                      std::string_view code, int64_t code_bytes,
                      std::string_view, std::string_view, std::string_view,
                      int64_t, int64_t, std::string_view, std::string_view) {
  std::string error;
  const CuDriver* driver = FindCuDriver(&error);
  if (driver == nullptr) {
    return ffi::Error::Internal(std::string(op) + ": " + error);
  }
  LaunchAttributes call;
  call.op = op;
  call.kernel = kernel;
  call.code = code;
  call.code_bytes = code_bytes;
  return PrepareKernel(*driver, CodeTable::Get(), call);
}

ffi::Error Launch(ffi::RemainingArgs operands, ffi::RemainingRets results,
                  std::string_view op, std::string_view kernel,
                  std::string_view code, int64_t code_bytes,
                  std::string_view grid, std::string_view block,
                  std::string_view cluster, int64_t shared_bytes,
                  int64_t alignment, std::string_view guarded,
                  std::string_view parameters, void* stream) {
  std::string error;
  const CuDriver* driver = FindCuDriver(&error);
  if (driver == nullptr) {
    return ffi::Error::Internal(std::string(op) + ": " + error);
  }
  return LaunchUserKernel(*driver, CodeTable::Get(),
                          {op, kernel, code, code_bytes, grid, block, cluster,
                           shared_bytes, alignment, guarded, parameters},
                          stream, operands, results);
}

}  // namespace

XLA_OPS_HANDLER_SYMBOL(xla_ops_launch_kernel_initialize_cuda, Initialize,
                       LaunchBinding<ffi::ExecutionStage::kInitialize>(),
                       {::xla::ffi::Traits::kCmdBufferCompatible});
XLA_OPS_HANDLER_SYMBOL(xla_ops_launch_kernel_cuda, Launch,
                       LaunchBinding<ffi::ExecutionStage::kExecute>()
                           .Ctx<::xla::ffi::PlatformStream<void*>>(),
                       {::xla::ffi::Traits::kCmdBufferCompatible});
XLA_OPS_LIST_HANDLER(launch_kernel, "CUDA",
                     {nullptr, nullptr, xla_ops_launch_kernel_initialize_cuda,
                      xla_ops_launch_kernel_cuda});

}  // namespace xla_ops

// Gives the process the code that calls name `digest` (code.h).
extern "C" XLA_OPS_EXPORT void xla_ops_launch_kernel_add_code(
    const char* digest, const void* image, size_t num_bytes) {
  xla_ops::CodeTable::Get().Add(digest,
                                {static_cast<const char*>(image), num_bytes});
}
