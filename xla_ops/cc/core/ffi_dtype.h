// Element types as XLA's FFI names them and as the kernels do.
//
// Tested by core_test.cc.

#ifndef XLA_OPS_CC_CORE_FFI_DTYPE_H_
#define XLA_OPS_CC_CORE_FFI_DTYPE_H_

#include <optional>
#include <sstream>
#include <string>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/core/dtype.h"

namespace xla_ops {

// Nothing for a type that no kernel takes.
constexpr std::optional<DType> ToDType(xla::ffi::DataType dtype) {
  switch (dtype) {
    case xla::ffi::DataType::F32:
      return DType::kF32;
    case xla::ffi::DataType::F16:
      return DType::kF16;
    case xla::ffi::DataType::BF16:
      return DType::kBF16;
    case xla::ffi::DataType::F8E4M3FN:
      return DType::kF8E4M3FN;
    case xla::ffi::DataType::F8E5M2:
      return DType::kF8E5M2;
    case xla::ffi::DataType::S8:
      return DType::kS8;
    case xla::ffi::DataType::U8:
      return DType::kU8;
    case xla::ffi::DataType::S32:
      return DType::kS32;
    case xla::ffi::DataType::S64:
      return DType::kS64;
    case xla::ffi::DataType::PRED:
      return DType::kBool;
    default:
      return std::nullopt;
  }
}

constexpr xla::ffi::DataType ToFfi(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return xla::ffi::DataType::F32;
    case DType::kF16:
      return xla::ffi::DataType::F16;
    case DType::kBF16:
      return xla::ffi::DataType::BF16;
    case DType::kF8E4M3FN:
      return xla::ffi::DataType::F8E4M3FN;
    case DType::kF8E5M2:
      return xla::ffi::DataType::F8E5M2;
    case DType::kS8:
      return xla::ffi::DataType::S8;
    case DType::kU8:
      return xla::ffi::DataType::U8;
    case DType::kS32:
      return xla::ffi::DataType::S32;
    case DType::kS64:
      return xla::ffi::DataType::S64;
    case DType::kBool:
      return xla::ffi::DataType::PRED;
  }
  return xla::ffi::DataType::INVALID;
}

// torch's name for any FFI type that torch has, for error texts; XLA's own
// for the rest.
inline std::string DTypeName(xla::ffi::DataType dtype) {
  if (const std::optional<DType> known = ToDType(dtype)) return Name(*known);
  switch (dtype) {
    case xla::ffi::DataType::S16:
      return "int16";
    case xla::ffi::DataType::U16:
      return "uint16";
    case xla::ffi::DataType::U32:
      return "uint32";
    case xla::ffi::DataType::U64:
      return "uint64";
    case xla::ffi::DataType::F64:
      return "float64";
    case xla::ffi::DataType::C64:
      return "complex64";
    case xla::ffi::DataType::C128:
      return "complex128";
    default: {
      std::ostringstream name;
      name << dtype;
      return name.str();
    }
  }
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_CORE_FFI_DTYPE_H_
