// Opens a PJRT plugin and checks that the bridge can work with it, without
// creating a client (no device is touched).
//
// Tested by tests/gpu/test_bridge.py.

#ifndef XLA_OPS_CC_BRIDGE_PLUGIN_LOADER_H_
#define XLA_OPS_CC_BRIDGE_PLUGIN_LOADER_H_

#include <string>
#include <vector>

#include "xla_ops/cc/bridge/pjrt_abi.h"

namespace xla_ops {

// What brings a plugin that fits, with the libraries that it loads.
inline constexpr char kInstall[] =
    "install xla_ops[cuda13], or xla_ops[cuda12] for drivers before 580";

struct PjrtPlugin {
  const PjrtApi* api = nullptr;
  std::vector<const PjrtExtension*> extensions;  // in the plugin's order
  const PjrtGpuCustomCallExtension* custom_call = nullptr;  // null: not there
  std::string fix;  // what to do about the error of OpenPjrtPlugin
};

// Loads the shared object at `path` and reads its function table. Returns what
// is wrong with it and sets `plugin->fix`, or an empty string and sets
// `plugin`; the version is set even where it is the reason for the error. The
// library is never unloaded: XLA's runtime does not survive that.
std::string OpenPjrtPlugin(const std::string& path, PjrtPlugin* plugin);

// What to tell the user of a plugin that opens all the same, or "".
std::string PjrtPluginWarning(const std::string& path, const PjrtApi& api);

// Takes `error` from a call into `api`: returns its text and frees it. Returns
// an empty string for null.
std::string TakePjrtErrorText(const PjrtApi& api, PjrtError* error);

}  // namespace xla_ops

#endif  // XLA_OPS_CC_BRIDGE_PLUGIN_LOADER_H_
