// Runs a loaded handler on memory given by address, without XLA: for torch CPU
// and CUDA tensors.
//
// Tested by tests/core/test_runtime.py.

#ifndef XLA_OPS_CC_RUNTIME_DIRECT_CALL_H_
#define XLA_OPS_CC_RUNTIME_DIRECT_CALL_H_

#include <cstdint>
#include <map>
#include <string>
#include <variant>
#include <vector>

#include "xla_ops/cc/core/call_frame.h"
#include "xla_ops/cc/runtime/op_library.h"

namespace xla_ops {

// A dense row-major array.
struct DirectBuffer {
  void* data;
  XLA_FFI_DataType dtype;
  std::vector<int64_t> dims;
};

using DirectAttr = std::variant<bool, int64_t, float, std::string,
                                std::vector<int64_t>, std::vector<float>>;
using DirectAttrs = std::map<std::string, DirectAttr>;

// Runs all stages that `handler` has. Instantiate, which sees attributes only,
// runs once for each set of attributes, as it does for a call site in XLA; its
// state lives as long as the process. `stream` (a cudaStream_t) is used for
// CUDA handlers alone. Memory has to stay valid until the stream has run.
CallStatus CallHandler(const LoadedHandler& handler, void* stream,
                       const std::vector<DirectBuffer>& args,
                       const std::vector<DirectBuffer>& results,
                       const DirectAttrs& attrs);

}  // namespace xla_ops

#endif  // XLA_OPS_CC_RUNTIME_DIRECT_CALL_H_
