// CPU kernel and handler of convert_fp8: pieces spread over XLA's threads.

#include <algorithm>
#include <cstdint>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/core/dispatch.h"
#include "xla_ops/cc/core/float.h"
#include "xla_ops/cc/core/handler.h"
#include "xla_ops/cc/core/parallel.h"
#include "xla_ops/cc/ops/fp8_quant/convert_fp8.h"
#include "xla_ops/cc/ops/fp8_quant/convert_fp8_checks.h"

namespace xla_ops {
namespace {

// Elements that one thread converts at a time.
constexpr int64_t kPieceSize = 4096;

template <typename T, typename Fp8>
void Convert(const ConvertFp8Params& params, ffi::ThreadPool& pool) {
  const int64_t pieces = (params.size + kPieceSize - 1) / kPieceSize;
  ParallelFor(pool, pieces, std::min(params.size, kPieceSize),
              [&](int64_t piece) {
                const int64_t begin = piece * kPieceSize;
                const int64_t end = std::min(params.size, begin + kPieceSize);
                if (params.to_fp8) {
                  const T* src = static_cast<const T*>(params.src);
                  Fp8* dst = static_cast<Fp8*>(params.dst);
                  for (int64_t i = begin; i < end; ++i) {
                    dst[i] = FromFloat<Fp8>(ToFloat(src[i]) / params.scale);
                  }
                } else {
                  const Fp8* src = static_cast<const Fp8*>(params.src);
                  T* dst = static_cast<T*>(params.dst);
                  for (int64_t i = begin; i < end; ++i) {
                    dst[i] = FromFloat<T>(ToFloat(src[i]) * params.scale);
                  }
                }
              });
}

void ConvertFp8(const ConvertFp8Params& params, ffi::ThreadPool& pool) {
  DispatchFloat(params.dtype, [&](auto dtype) {
    using T = CpuType<dtype.value>;
    if (params.fp8_dtype == DType::kF8E5M2) {
      Convert<T, Float8E5M2>(params, pool);
    } else {
      Convert<T, Float8E4M3FN>(params, pool);
    }
  });
}

}  // namespace

XLA_OPS_CPU_HANDLER(convert_fp8, ConvertFp8Binding(), MakeConvertFp8Params,
                    ConvertFp8);

}  // namespace xla_ops
