// The one form of error text: `<op>: <argument> must <rule>, got <value>`.
//
//   return MustError("rms_norm", "eps", "be positive and finite",
//                    FormatFloat(eps));
//   // rms_norm: eps must be positive and finite, got 0
//
// Python raises the same words at trace time (xla_ops/py/ops), so values are
// written as Python writes them: shapes as "[2, 3]", floats as "%g".
//
// Tested by core_test.cc.

#ifndef XLA_OPS_CC_CORE_ERROR_H_
#define XLA_OPS_CC_CORE_ERROR_H_

#include <cstdint>
#include <cstdio>
#include <string>
#include <string_view>

#include "xla/ffi/api/ffi.h"

// Leaves the calling function with the error of `expr`, if it has one.
#define XLA_OPS_RETURN_IF_ERROR(expr)                                      \
  if (::xla::ffi::Error xla_ops_error = (expr); xla_ops_error.failure()) { \
    return xla_ops_error;                                                  \
  }

namespace xla_ops {

namespace ffi = ::xla::ffi;

// `rule` continues "must", such as "have rank 2".
inline ffi::Error MustError(std::string_view op, std::string_view argument,
                            std::string_view rule, std::string_view got) {
  std::string text;
  text.append(op).append(": ").append(argument).append(" must ");
  text.append(rule).append(", got ").append(got);
  return ffi::Error::InvalidArgument(std::move(text));
}

inline std::string FormatFloat(double value) {
  char text[32];
  std::snprintf(text, sizeof(text), "%g", value);
  return text;
}

inline std::string FormatShape(ffi::Span<const int64_t> dims) {
  std::string text = "[";
  for (const int64_t dim : dims) {
    if (text.size() > 1) text += ", ";
    text += std::to_string(dim);
  }
  return text + "]";
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_CORE_ERROR_H_
