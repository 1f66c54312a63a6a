// CPU kernel and handler of xla_ops.new_op: pieces of the flat tensor, spread
// over XLA's threads.

#include <algorithm>
#include <cstdint>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/core/dispatch.h"
#include "xla_ops/cc/core/float.h"
#include "xla_ops/cc/core/handler.h"
#include "xla_ops/cc/core/parallel.h"
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

void NewOp(const NewOpParams& params, ffi::ThreadPool& pool) {
  if (params.num_elements == 0) return;
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
}

}  // namespace

XLA_OPS_CPU_HANDLER(new_op, NewOpBinding(), MakeNewOpParams, NewOp);

}  // namespace xla_ops
