// Turns an element type known at run time into one known at compile time.
//
//   DispatchFloat(params.dtype, [&](auto dtype) {
//     using T = CpuType<dtype.value>;      // float.h
//     ...
//   });
//
// No framework's header, so that device code can use it with types of its
// own. All branches of one dispatch must return the same type.
//
// Tested by core_test.cc.

#ifndef XLA_OPS_CC_CORE_DISPATCH_H_
#define XLA_OPS_CC_CORE_DISPATCH_H_

#include "xla_ops/cc/core/dtype.h"

namespace xla_ops {

template <DType kDType>
struct DTypeConstant {
  static constexpr DType value = kDType;
};

// Calls `body` for fp32, fp16 or bf16. Operand checks admit no other type,
// so any other is treated as fp32 rather than as an error.
template <typename Body>
auto DispatchFloat(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::kF16:
      return body(DTypeConstant<DType::kF16>{});
    case DType::kBF16:
      return body(DTypeConstant<DType::kBF16>{});
    default:
      return body(DTypeConstant<DType::kF32>{});
  }
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_CORE_DISPATCH_H_
