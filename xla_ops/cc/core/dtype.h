// Element types that the kernels know, without any framework's header, so
// that device code (.cu.cc) and handlers share one name for each.
//
// Tested by core_test.cc.

#ifndef XLA_OPS_CC_CORE_DTYPE_H_
#define XLA_OPS_CC_CORE_DTYPE_H_

#include <cstdint>

namespace xla_ops {

enum class DType : uint8_t {
  kF32,
  kF16,
  kBF16,
  kF8E4M3FN,
  kF8E5M2,
  kS8,
  kU8,
  kS32,
  kS64,
  kBool,  // a byte, 0 or 1
};

// Bytes of one element.
constexpr int64_t SizeOf(DType dtype) {
  switch (dtype) {
    case DType::kS64:
      return 8;
    case DType::kF32:
    case DType::kS32:
      return 4;
    case DType::kF16:
    case DType::kBF16:
      return 2;
    case DType::kF8E4M3FN:
    case DType::kF8E5M2:
    case DType::kS8:
    case DType::kU8:
    case DType::kBool:
      return 1;
  }
  return 0;
}

// The name that error messages and Python use, such as "bfloat16".
constexpr const char* Name(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "float32";
    case DType::kF16:
      return "float16";
    case DType::kBF16:
      return "bfloat16";
    case DType::kF8E4M3FN:
      return "float8_e4m3fn";
    case DType::kF8E5M2:
      return "float8_e5m2";
    case DType::kS8:
      return "int8";
    case DType::kU8:
      return "uint8";
    case DType::kS32:
      return "int32";
    case DType::kS64:
      return "int64";
    case DType::kBool:
      return "bool";
  }
  return "unknown";
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_CORE_DTYPE_H_
