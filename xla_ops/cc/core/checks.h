// Checks of operands that all ops share. Each returns success or an error
// in the form of error.h; none reads a buffer's contents.
//
//   XLA_OPS_RETURN_IF_ERROR(
//       CheckDType("rms_norm", "input", input, kFloatDTypes));
//   XLA_OPS_RETURN_IF_ERROR(
//       CheckShape("rope", "cache", cache, {"max_position", rotary_dim}));
//   // rope: cache must have shape [max_position, 64], got [4096, 32]
//
// Tested by core_test.cc.

#ifndef XLA_OPS_CC_CORE_CHECKS_H_
#define XLA_OPS_CC_CORE_CHECKS_H_

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/core/dtype.h"
#include "xla_ops/cc/core/error.h"
#include "xla_ops/cc/core/ffi_dtype.h"

namespace xla_ops {

// The types that attention and normalisation compute on.
inline constexpr std::initializer_list<DType> kFloatDTypes = {
    DType::kF32, DType::kF16, DType::kBF16};

// One dimension of a wanted shape: a number, or a name for "any size".
struct Dim {
  Dim(int64_t size) : size(size) {}      // NOLINT: implicit by design
  Dim(const char* name) : name(name) {}  // NOLINT: implicit by design
  int64_t size = -1;
  const char* name = nullptr;
};

// "float32, float16 or bfloat16"
inline std::string FormatDTypes(std::initializer_list<DType> dtypes) {
  std::string text;
  for (const DType* it = dtypes.begin(); it != dtypes.end(); ++it) {
    if (it != dtypes.begin()) {
      text += it + 1 == dtypes.end() ? " or " : ", ";
    }
    text += Name(*it);
  }
  return text;
}

// `Operand` is AnyBuffer or Result<AnyBuffer>, here and below.
// Both are one pointer, passed by value.
inline ffi::AnyBuffer BufferOf(ffi::AnyBuffer buffer) { return buffer; }
inline ffi::AnyBuffer BufferOf(ffi::Result<ffi::AnyBuffer> result) {
  return *result;
}

template <typename Operand>
ffi::Error CheckDType(const char* op, const char* argument, Operand operand,
                      std::initializer_list<DType> allowed) {
  const ffi::DataType got = BufferOf(operand).element_type();
  for (const DType dtype : allowed) {
    if (got == ToFfi(dtype)) return ffi::Error::Success();
  }
  return MustError(op, argument, "be " + FormatDTypes(allowed), DTypeName(got));
}

template <typename Operand>
ffi::Error CheckShape(const char* op, const char* argument, Operand operand,
                      std::initializer_list<Dim> wanted) {
  const ffi::AnyBuffer::Dimensions dims = BufferOf(operand).dimensions();
  bool fits = dims.size() == wanted.size();
  std::string rule = "have shape [";
  size_t i = 0;
  for (const Dim& dim : wanted) {
    if (i > 0) rule += ", ";
    rule += dim.name ? dim.name : std::to_string(dim.size);
    fits = fits && (dim.name || dims[i] == dim.size);
    ++i;
  }
  if (fits) return ffi::Error::Success();
  return MustError(op, argument, rule + "]", FormatShape(dims));
}

// The shape of another operand, such as a result's argument.
template <typename Operand>
ffi::Error CheckShapeOf(const char* op, const char* argument, Operand operand,
                        ffi::AnyBuffer other) {
  const ffi::AnyBuffer got = BufferOf(operand);
  if (got.dimensions() == other.dimensions()) return ffi::Error::Success();
  return MustError(op, argument,
                   "have shape " + FormatShape(other.dimensions()),
                   FormatShape(got.dimensions()));
}

// Its shape and type.
template <typename Operand>
ffi::Error CheckSameAs(const char* op, const char* argument, Operand operand,
                       ffi::AnyBuffer other) {
  const ffi::AnyBuffer got = BufferOf(operand);
  if (got.element_type() != other.element_type()) {
    return MustError(op, argument, "be " + DTypeName(other.element_type()),
                     DTypeName(got.element_type()));
  }
  return CheckShapeOf(op, argument, operand, other);
}

// A tensor of one element, whatever its rank: scales and counts.
template <typename Operand>
ffi::Error CheckOneElement(const char* op, const char* argument,
                           Operand operand) {
  if (BufferOf(operand).element_count() == 1) return ffi::Error::Success();
  return MustError(op, argument, "have 1 element",
                   "shape " + FormatShape(BufferOf(operand).dimensions()));
}

inline ffi::Error CheckPositiveFinite(const char* op, const char* argument,
                                      float value) {
  // The comparison is false for NaN.
  if (value > 0 && std::isfinite(value)) return ffi::Error::Success();
  return MustError(op, argument, "be positive and finite", FormatFloat(value));
}

// `input` [..., hidden_size] of a type in kFloatDTypes, as a matrix
// [num_tokens, hidden_size]; either size may be zero.
inline ffi::Error BindRows(const char* op, ffi::AnyBuffer input, DType* dtype,
                           int64_t* num_tokens, int64_t* hidden_size) {
  XLA_OPS_RETURN_IF_ERROR(CheckDType(op, "input", input, kFloatDTypes));
  const ffi::AnyBuffer::Dimensions dims = input.dimensions();
  if (dims.size() == 0) {
    return MustError(op, "input", "have rank 1 or more",
                     "shape " + FormatShape(dims));
  }
  *dtype = *ToDType(input.element_type());
  *num_tokens = 1;
  for (const int64_t dim : dims.first(dims.size() - 1)) *num_tokens *= dim;
  *hidden_size = dims.back();
  return ffi::Error::Success();
}

// A scale in device memory: fp32, one element, whatever its rank.
template <typename Operand>
ffi::Error CheckScale(const char* op, const char* argument, Operand operand) {
  XLA_OPS_RETURN_IF_ERROR(CheckDType(op, argument, operand, {DType::kF32}));
  return CheckOneElement(op, argument, operand);
}

inline ffi::Error CheckAtLeast(const char* op, const char* argument,
                               int64_t value, int64_t lowest) {
  if (value >= lowest) return ffi::Error::Success();
  return MustError(op, argument, "be at least " + std::to_string(lowest),
                   std::to_string(value));
}

// a * b of numbers that are not negative, or INT64_MAX where that is less.
inline int64_t SaturatingProduct(int64_t a, int64_t b) {
  int64_t product;
  return __builtin_mul_overflow(a, b, &product) ? INT64_MAX : product;
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_CORE_CHECKS_H_
