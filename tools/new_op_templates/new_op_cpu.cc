// CPU kernel and handler of xla_ops.new_op: pieces of the flat tensor, spread
// over XLA's threads.

#include <algorithm>
#include <cstdint>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/core/dispatch.h"
#include "xla_ops/cc/core/error.h"
#include "xla_ops/cc/core/float.h"
#include "xla_ops/cc/core/parallel.h"
#include "xla_ops/cc/core/registry.h"
#include "xla_ops/cc/ops/new_op/new_op.h"
#include "xla_ops/cc/ops/new_op/new_op_checks.h"

namespace xla_ops {
namespace {

// Elements that one call of ParallelFor's body computes: enough for a vector
// loop, few enough to share out.
constexpr int64_t kPiece = 4096;

// `input`, `out`: [size]; `out` may be `input`.
template <typename T>
void NewOpPiece(const T* input, int64_t size, float scale, T* out) {
  for (int64_t i = 0; i < size; ++i) {
    out[i] = FromFloat<T>(ToFloat(input[i]) * scale);
  }
}

ffi::Error NewOpCpu(ffi::AnyBuffer input, ffi::Result<ffi::AnyBuffer> out,
                    float scale, ffi::ThreadPool pool) {
  NewOpParams params;
  XLA_OPS_RETURN_IF_ERROR(MakeNewOpParams(input, out, scale, &params));
  if (params.num_elements == 0) return ffi::Error::Success();
  DispatchFloat(params.dtype, [&](auto dtype) {
    using T = CpuType<dtype.value>;
    const int64_t pieces = (params.num_elements + kPiece - 1) / kPiece;
    ParallelFor(pool, pieces, kPiece, [&](int64_t piece) {
      const int64_t start = piece * kPiece;
      NewOpPiece(static_cast<const T*>(params.input) + start,
                 std::min(kPiece, params.num_elements - start), params.scale,
                 static_cast<T*>(params.out) + start);
    });
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace xla_ops

extern "C" XLA_OPS_EXPORT XLA_FFI_Error* xla_ops_new_op_cpu(
    XLA_FFI_CallFrame* call_frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    xla_ops_new_op_cpu, xla_ops::NewOpCpu,
    xla_ops::NewOpBinding().Ctx<xla::ffi::ThreadPool>());

XLA_OPS_EXPORT_HANDLERS({"xla_ops.new_op",
                         "Host",
                         {nullptr, nullptr, nullptr, xla_ops_new_op_cpu}})
