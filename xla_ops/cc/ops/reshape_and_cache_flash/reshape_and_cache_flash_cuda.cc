// The CUDA handlers of reshape_and_cache_flash: three targets that differ in
// their operands and share one kernel.
//
// Tested by tests/gpu/check_kernels.py and
// tests/ops/test_reshape_and_cache_flash.py.

#include <cuda_runtime_api.h>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/core/error.h"
#include "xla_ops/cc/core/registry.h"
#include "xla_ops/cc/device/launch_status.h"
#include "xla_ops/cc/ops/reshape_and_cache_flash/reshape_and_cache_flash.h"
#include "xla_ops/cc/ops/reshape_and_cache_flash/reshape_and_cache_flash_checks.h"
#include "xla_ops/cc/ops/reshape_and_cache_flash/reshape_and_cache_flash_launch.h"

namespace xla_ops {
namespace {

ffi::Error Launch(cudaStream_t stream, const ReshapeAndCacheFlashParams& params,
                  const CacheCopies& copies) {
  cudaError_t error = cudaSuccess;
  for (int i = 0; i < copies.count && error == cudaSuccess; ++i) {
    const CacheCopies::Copy& copy = copies.copies[i];
    error = cudaMemcpyAsync(copy.to, copy.from, copy.bytes,
                            cudaMemcpyDeviceToDevice, stream);
  }
  if (error == cudaSuccess && !IsEmpty(params)) {
    error = LaunchReshapeAndCacheFlash(stream, params);
  }
  if (error != cudaSuccess) {
    return ffi::Error::Internal(
        LaunchErrorText("reshape_and_cache_flash", error));
  }
  return ffi::Error::Success();
}

ffi::Error TwoCachesCuda(ffi::AnyBuffer key, ffi::AnyBuffer value,
                         ffi::AnyBuffer key_cache, ffi::AnyBuffer value_cache,
                         ffi::AnyBuffer slot_mapping, ffi::AnyBuffer k_scale,
                         ffi::AnyBuffer v_scale,
                         ffi::Result<ffi::AnyBuffer> key_cache_result,
                         ffi::Result<ffi::AnyBuffer> value_cache_result,
                         ReshapeAndCacheFlashAttrs attrs, cudaStream_t stream) {
  ReshapeAndCacheFlashParams params;
  CacheCopies copies;
  XLA_OPS_RETURN_IF_ERROR(MakeReshapeAndCacheFlashParams(
      key, value, key_cache, value_cache, slot_mapping, k_scale, v_scale,
      key_cache_result, value_cache_result, attrs, &params, &copies));
  return Launch(stream, params, copies);
}

ffi::Error StackedCuda(ffi::AnyBuffer key, ffi::AnyBuffer value,
                       ffi::AnyBuffer kv_cache, ffi::AnyBuffer slot_mapping,
                       ffi::AnyBuffer k_scale, ffi::AnyBuffer v_scale,
                       ffi::Result<ffi::AnyBuffer> kv_cache_result,
                       ReshapeAndCacheFlashAttrs attrs, cudaStream_t stream) {
  ReshapeAndCacheFlashParams params;
  CacheCopies copies;
  XLA_OPS_RETURN_IF_ERROR(MakeReshapeAndCacheFlashStackedParams(
      key, value, kv_cache, slot_mapping, k_scale, v_scale, kv_cache_result,
      attrs, &params, &copies));
  return Launch(stream, params, copies);
}

ffi::Error OneCacheCuda(ffi::AnyBuffer key, ffi::AnyBuffer key_cache,
                        ffi::AnyBuffer slot_mapping, ffi::AnyBuffer k_scale,
                        ffi::Result<ffi::AnyBuffer> key_cache_result,
                        ReshapeAndCacheFlashOneAttrs attrs,
                        cudaStream_t stream) {
  ReshapeAndCacheFlashParams params;
  CacheCopies copies;
  XLA_OPS_RETURN_IF_ERROR(MakeReshapeAndCacheFlashOneParams(
      key, key_cache, slot_mapping, k_scale, key_cache_result, attrs, &params,
      &copies));
  return Launch(stream, params, copies);
}

}  // namespace
}  // namespace xla_ops

extern "C" {
XLA_OPS_EXPORT XLA_FFI_Error* xla_ops_reshape_and_cache_flash_cuda(
    XLA_FFI_CallFrame* call_frame);
XLA_OPS_EXPORT XLA_FFI_Error* xla_ops_reshape_and_cache_flash_stacked_cuda(
    XLA_FFI_CallFrame* call_frame);
XLA_OPS_EXPORT XLA_FFI_Error* xla_ops_reshape_and_cache_flash_one_cuda(
    XLA_FFI_CallFrame* call_frame);
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    xla_ops_reshape_and_cache_flash_cuda, xla_ops::TwoCachesCuda,
    xla_ops::ReshapeAndCacheFlashBinding()
        .Ctx<xla::ffi::PlatformStream<cudaStream_t>>(),
    {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    xla_ops_reshape_and_cache_flash_stacked_cuda, xla_ops::StackedCuda,
    xla_ops::ReshapeAndCacheFlashStackedBinding()
        .Ctx<xla::ffi::PlatformStream<cudaStream_t>>(),
    {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    xla_ops_reshape_and_cache_flash_one_cuda, xla_ops::OneCacheCuda,
    xla_ops::ReshapeAndCacheFlashOneBinding()
        .Ctx<xla::ffi::PlatformStream<cudaStream_t>>(),
    {xla::ffi::Traits::kCmdBufferCompatible});

XLA_OPS_EXPORT_HANDLERS(
    {"xla_ops.reshape_and_cache_flash",
     "CUDA",
     {nullptr, nullptr, nullptr, xla_ops_reshape_and_cache_flash_cuda}},
    {"xla_ops.reshape_and_cache_flash_stacked",
     "CUDA",
     {nullptr, nullptr, nullptr, xla_ops_reshape_and_cache_flash_stacked_cuda}},
    {"xla_ops.reshape_and_cache_flash_one",
     "CUDA",
     {nullptr, nullptr, nullptr, xla_ops_reshape_and_cache_flash_one_cuda}})
