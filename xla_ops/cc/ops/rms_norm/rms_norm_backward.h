// The gradient of RMSNorm (rms_norm.h) and, with `added`, of
// fused_add_rms_norm. For a row x of the input, g of the gradient of out:
//
//   s  = rsqrt(mean(x^2) + eps)
//   dx = T(s * (g * w - x * s^2 * mean(g * w * x)) + added)
//   parts[p, :] = sum of g * (x * s) over the rows of part p
//
// All of it is fp32, and dx is rounded once; that out was rounded twice is not
// differentiated. The gradient of the weight is the sum of the parts: left to
// the caller, because rows may be split over devices. Each row belongs to one
// part, which one depends on shapes alone, and a part's rows are added up in a
// fixed order: the same call gives the same bits on one platform and one kind
// of device.
//
// Target `xla_ops.rms_norm_backward`:
//   args     grad   [..., hidden]  fp32, fp16 or bf16
//            input  [..., hidden]  same dtype
//            weight [hidden]       same dtype
//            added  [..., hidden]  same dtype; [0]: nothing is added
//   results  dx     [..., hidden]  same dtype
//            parts  [..., hidden]  fp32
//            scratch [rows, hidden]  fp32: sums of the CUDA kernel's blocks
//   attrs    eps    f32, > 0
// Target `xla_ops.rms_norm_backward_input`: the same without parts, for a
// weight that needs no gradient.
// Leading dimensions are flattened, those of parts to num_parts. Any size may
// be zero. `scratch` lets CUDA run many blocks for few parts: as many as it has
// rows, and one a part where it has less.
//
// Tested by rms_norm_backward_test.cc and tests/ops/test_rms_norm_backward.py.

#ifndef XLA_OPS_CC_OPS_RMS_NORM_RMS_NORM_BACKWARD_H_
#define XLA_OPS_CC_OPS_RMS_NORM_RMS_NORM_BACKWARD_H_

#include <cstdint>

#include "xla_ops/cc/core/dtype.h"

namespace xla_ops {

struct RmsNormBackwardParams {
  DType dtype;
  int64_t num_tokens;
  int64_t hidden_size;
  int64_t num_parts;
  float eps;
  const void* grad;    // [num_tokens, hidden_size]
  const void* input;   // [num_tokens, hidden_size]
  const void* weight;  // [hidden_size]
  const void* added;   // [num_tokens, hidden_size] or null
  void* dx;            // [num_tokens, hidden_size]
  float* parts;        // [num_parts, hidden_size] or null
  int64_t scratch_rows;
  float* scratch;  // [scratch_rows, hidden_size] or null
};

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_RMS_NORM_RMS_NORM_BACKWARD_H_
