// Registers loaded handlers with XLA, on the CPU and on the GPU.
//
// torch_xla 2.9.0 offers no way in for either. CPU: the registry of the
// built-in client is inside torch_xla's own library; the function that returns
// its C API is found by name in the symbol table (docs/adr/0006). GPU: through
// the bridge (cc/bridge), which holds the plugin's custom-call extension.
// Handlers have to be registered before the first program that calls them is
// compiled; how often and from which thread does not matter.
//
// Tested by tests/core/test_runtime.py and tests/gpu/test_registration.py.

#ifndef XLA_OPS_CC_RUNTIME_REGISTRATION_H_
#define XLA_OPS_CC_RUNTIME_REGISTRATION_H_

#include <map>
#include <string>
#include <vector>

namespace xla_ops {

// Each target that a registration tried, and why it was refused; "" if it was
// not.
using Outcomes = std::map<std::string, std::string>;

// Registers all "Host" handlers not yet registered with the CPU client inside
// the loaded library `xlac_path` (torch_xla's _XLAC). Returns an error text
// where none could be tried, empty otherwise.
std::string RegisterCpuHandlers(const std::string& xlac_path,
                                Outcomes* outcomes);

// Registers all "CUDA" handlers not yet registered with the plugin that the
// bridge at `bridge_path` has open. Returns as RegisterCpuHandlers.
std::string RegisterGpuHandlers(const std::string& bridge_path,
                                Outcomes* outcomes);

// Platform to the targets registered for it.
std::map<std::string, std::vector<std::string>> RegisteredTargets();

// Has the bridge at `bridge_path` open the PJRT plugin at `plugin_path`.
std::string OpenBridgePlugin(const std::string& bridge_path,
                             const std::string& plugin_path);

// Has the bridge add a serialized CompileOptionsProto to what this thread
// compiles from now on.
std::string SetCompileOptions(const std::string& bridge_path,
                              const std::string& options);

}  // namespace xla_ops

#endif  // XLA_OPS_CC_RUNTIME_REGISTRATION_H_
