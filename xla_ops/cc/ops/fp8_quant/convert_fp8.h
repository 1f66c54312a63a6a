// Conversion of whole caches to and from fp8, by one scale that the host knows.
//
//   to fp8     dst = fp8(float(src) / scale)
//   from fp8   dst = T(float(src) * scale)
// fp8() rounds to nearest even and saturates, infinities too; NaN stays NaN, as
// in reshape_and_cache_flash and vLLM. src says the direction by its type.
//
// Target `xla_ops.convert_fp8`:
//   args     src [...]  fp32, fp16 or bf16; or u8 or the fp8 type
//   results  dst [...]  the other of the two
//   attrs    kv_cache_dtype string  "fp8" or "fp8_e4m3" (the same), "fp8_e5m2"
//            scale f32              positive
// Any size may be zero.
//
// Tested by convert_fp8_test.cc and tests/ops/test_convert_fp8.py.

#ifndef XLA_OPS_CC_OPS_FP8_QUANT_CONVERT_FP8_H_
#define XLA_OPS_CC_OPS_FP8_QUANT_CONVERT_FP8_H_

#include <cstdint>

#include "xla_ops/cc/core/dtype.h"

namespace xla_ops {

struct ConvertFp8Params {
  DType dtype;      // of the side that is not fp8
  DType fp8_dtype;  // kF8E4M3FN or kF8E5M2
  bool to_fp8;
  float scale;
  int64_t size;
  const void* src;  // [size]
  void* dst;        // [size]
};

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_FP8_QUANT_CONVERT_FP8_H_
