// The plugin's extensions, as the bridge hands them to the framework.

#ifndef XLA_OPS_CC_BRIDGE_EXTENSIONS_H_
#define XLA_OPS_CC_BRIDGE_EXTENSIONS_H_

#include <vector>

#include "xla_ops/cc/bridge/pjrt_abi.h"

namespace xla_ops {

// A copy of the list whose functions, as far as torch_xla 2.9.0 calls them,
// take shorter arguments than the plugin's own (padded_call.h). To be called
// once, since the functions belong to one plugin; the copy is never freed.
//
// Tested by tests/gpu/test_bridge.py.
PjrtExtension* WrapExtensions(
    const std::vector<const PjrtExtension*>& extensions);

}  // namespace xla_ops

#endif  // XLA_OPS_CC_BRIDGE_EXTENSIONS_H_
