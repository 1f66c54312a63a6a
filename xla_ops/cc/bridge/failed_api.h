// A PJRT function table whose every function fails with one text.
//
// torch_xla reads the table that GetPjrtApi returns without a test for null,
// and would crash. Where there is no plugin to wrap, the bridge returns this
// table instead, so that the reason comes back as an ordinary error of the
// first call.
//
// Tested by tests/gpu/test_bridge.py.

#ifndef XLA_OPS_CC_BRIDGE_FAILED_API_H_
#define XLA_OPS_CC_BRIDGE_FAILED_API_H_

#include <string>

#include "xla_ops/cc/bridge/pjrt_abi.h"

namespace xla_ops {

// Returns the table. There is one in a process; the text is that of the first
// call. It and the text live as long as the process.
const PjrtApi* FailedApi(const std::string& text);

}  // namespace xla_ops

#endif  // XLA_OPS_CC_BRIDGE_FAILED_API_H_
