// From FFI operands to FusedQkNormRopeParams; the CPU and the CUDA handler
// share it.
//
// Errors (InvalidArgument), in the order of the checks, each after
// "fused_qk_norm_rope: ":
//   qkv must be float32, float16 or bfloat16, got int32
//   num_heads_q must be at least 0, got -1    (num_heads_k, num_heads_v)
//   head_dim must be even and at least 2, got 7
//   qkv must have shape [num_tokens, 512], got [4, 256]
//   eps must be positive and finite, got 0
//   q_weight must be float16, got float32
//   q_weight must have shape [64], got [32]
//   k_weight must ... (the same)
//   cos_sin_cache must be float16 or float32, got bfloat16
//   cos_sin_cache must have shape [max_position, 64], got [64]
//   position_ids must be int64 or int32, got float32
//   position_ids must have shape [4], got [3]
//   qkv result must have shape [4, 512], got [4, 256]    (and dtype)
// On CUDA also
//   qkv must have at most 1073741824 elements a token, got 2147483648
//
// Tested by fused_qk_norm_rope_test.cc.

#ifndef XLA_OPS_CC_OPS_FUSED_QK_NORM_ROPE_FUSED_QK_NORM_ROPE_CHECKS_H_
#define XLA_OPS_CC_OPS_FUSED_QK_NORM_ROPE_FUSED_QK_NORM_ROPE_CHECKS_H_

#include <cstdint>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/ops/fused_qk_norm_rope/fused_qk_norm_rope.h"

namespace xla_ops {

// Members are in the order of the registration below, which names them.
struct FusedQkNormRopeAttrs {
  int64_t num_heads_q;
  int64_t num_heads_k;
  int64_t num_heads_v;
  int64_t head_dim;
  float eps;
  bool is_neox;
};

// The binding of every platform; handlers append their context.
inline auto FusedQkNormRopeBinding() {
  return xla::ffi::Ffi::Bind()
      .Arg<xla::ffi::AnyBuffer>()  // qkv
      .Arg<xla::ffi::AnyBuffer>()  // q_weight
      .Arg<xla::ffi::AnyBuffer>()  // k_weight
      .Arg<xla::ffi::AnyBuffer>()  // cos_sin_cache
      .Arg<xla::ffi::AnyBuffer>()  // position_ids
      .Ret<xla::ffi::AnyBuffer>()  // qkv
      .Attrs<FusedQkNormRopeAttrs>();
}

// Reads no buffer. No token and no head are success.
xla::ffi::Error MakeFusedQkNormRopeParams(
    xla::ffi::AnyBuffer qkv, xla::ffi::AnyBuffer q_weight,
    xla::ffi::AnyBuffer k_weight, xla::ffi::AnyBuffer cos_sin_cache,
    xla::ffi::AnyBuffer position_ids,
    xla::ffi::Result<xla::ffi::AnyBuffer> qkv_result,
    const FusedQkNormRopeAttrs& attrs, FusedQkNormRopeParams* params);

// The limits of the CUDA launch.
xla::ffi::Error CheckCudaLimits(const FusedQkNormRopeParams& params);

}  // namespace xla_ops

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(::xla_ops::FusedQkNormRopeAttrs,
                                      StructMember<int64_t>("num_heads_q"),
                                      StructMember<int64_t>("num_heads_k"),
                                      StructMember<int64_t>("num_heads_v"),
                                      StructMember<int64_t>("head_dim"),
                                      StructMember<float>("eps"),
                                      StructMember<bool>("is_neox"));

#endif  // XLA_OPS_CC_OPS_FUSED_QK_NORM_ROPE_FUSED_QK_NORM_ROPE_CHECKS_H_
