// Registration of handlers with XLA; see registration.h.

#include "xla_ops/cc/runtime/registration.h"

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <utility>

#include "xla/ffi/api/c_api.h"
#include "xla_ops/cc/bridge/bridge.h"
#include "xla_ops/cc/bridge/dl_error.h"
#include "xla_ops/cc/core/call_frame.h"
#include "xla_ops/cc/runtime/op_library.h"
#include "xla_ops/cc/runtime/torch_xla_symbols.h"

namespace xla_ops {
namespace {

// xla::ffi::GetXlaFfiApi(): takes nothing, returns the API's function table.
constexpr char kGetApi[] = "_ZN3xla3ffi12GetXlaFfiApiEv";

// Longest error text that the bridge's C functions are given room for.
constexpr size_t kErrorSize = 4096;

// Held over a whole registration, so that two threads do not register the same
// handler. Guards LoadedHandler::registered.
std::mutex& RegistrationMutex() {
  static std::mutex* const mutex = new std::mutex;
  return *mutex;
}

// The handler's own traits; zero where it does not tell.
XLA_FFI_Handler_Traits TraitsOf(const LoadedHandler& handler) {
  XLA_FFI_Metadata metadata;
  if (!QueryMetadata(handler.bundle.execute, &metadata).ok()) return 0;
  return metadata.traits;
}

std::string FindFfiApi(const std::string& path, const XLA_FFI_Api** api) {
  std::map<std::string, uintptr_t> symbols;
  std::string error = FindTorchXlaSymbols(path, {kGetApi}, &symbols);
  if (!error.empty()) return error;
  *api = reinterpret_cast<const XLA_FFI_Api* (*)()>(symbols[kGetApi])();
  return "";
}

std::string CheckFfiApi(const std::string& path, const XLA_FFI_Api* api) {
  // Up to and with the last function that is used here.
  constexpr size_t kNeeded = offsetof(XLA_FFI_Api, XLA_FFI_Handler_Register) +
                             sizeof(XLA_FFI_Api::XLA_FFI_Handler_Register);
  if (api == nullptr || api->struct_size < kNeeded) {
    return path + ": its XLA FFI API is malformed";
  }
  const XLA_FFI_Api_Version& version = api->api_version;
  if (version.major_version != XLA_FFI_API_MAJOR ||
      version.minor_version < XLA_FFI_API_MINOR) {
    return path + ": its XLA FFI API is version " +
           std::to_string(version.major_version) + "." +
           std::to_string(version.minor_version) +
           ", handlers here are built for " +
           std::to_string(XLA_FFI_API_MAJOR) + "." +
           std::to_string(XLA_FFI_API_MINOR) + ": install torch_xla 2.9.0";
  }
  return "";
}

std::string TakeFfiErrorText(const XLA_FFI_Api& api, XLA_FFI_Error* error) {
  if (error == nullptr) return "";
  XLA_FFI_Error_GetMessage_Args message = {};
  message.struct_size = XLA_FFI_Error_GetMessage_Args_STRUCT_SIZE;
  message.error = error;
  api.XLA_FFI_Error_GetMessage(&message);
  const std::string text =
      message.message == nullptr ? "unknown reason" : message.message;
  XLA_FFI_Error_Destroy_Args destroy = {};
  destroy.struct_size = XLA_FFI_Error_Destroy_Args_STRUCT_SIZE;
  destroy.error = error;
  api.XLA_FFI_Error_Destroy(&destroy);
  return text;
}

std::string RegisterWithCpu(const XLA_FFI_Api& api,
                            const LoadedHandler& handler) {
  XLA_FFI_Handler_Register_Args args = {};
  args.struct_size = XLA_FFI_Handler_Register_Args_STRUCT_SIZE;
  args.name = {handler.target.data(), handler.target.size()};
  args.platform = {handler.platform.data(), handler.platform.size()};
  args.bundle = {handler.bundle.instantiate, handler.bundle.prepare,
                 handler.bundle.initialize, handler.bundle.execute};
  args.traits = TraitsOf(handler);
  const std::string error =
      TakeFfiErrorText(api, api.XLA_FFI_Handler_Register(&args));
  if (error.empty()) return "";
  return handler.target + " of " + handler.library +
         " cannot be registered: " + error;
}

// A function that the bridge at `path` exports.
template <typename Function>
std::string BridgeFunction(const std::string& path, const char* name,
                           Function** function) {
  // torch_xla opens the same path, and so shares this instance.
  void* bridge = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (bridge == nullptr) return "cannot load the bridge: " + LastDlError();
  *function = reinterpret_cast<Function*>(dlsym(bridge, name));
  if (*function == nullptr) {
    return path + " is not the bridge: it does not export " + name;
  }
  return "";
}

// Tries each, whatever became of the ones before.
template <typename Register>
Outcomes RegisterAll(const char* platform, Register register_one) {
  Outcomes outcomes;
  for (LoadedHandler* handler : HandlersOf(platform)) {
    if (handler->registered) continue;
    std::string error = register_one(*handler);
    handler->registered = error.empty();
    outcomes[handler->target] = std::move(error);
  }
  return outcomes;
}

}  // namespace

std::string RegisterCpuHandlers(const std::string& xlac_path,
                                Outcomes* outcomes) {
  std::lock_guard<std::mutex> lock(RegistrationMutex());
  const XLA_FFI_Api* api = nullptr;
  std::string error = FindFfiApi(xlac_path, &api);
  if (!error.empty()) return error;
  error = CheckFfiApi(xlac_path, api);
  if (!error.empty()) return error;
  *outcomes = RegisterAll(kHostPlatform, [api](const LoadedHandler& handler) {
    return RegisterWithCpu(*api, handler);
  });
  return "";
}

std::string RegisterGpuHandlers(const std::string& bridge_path,
                                Outcomes* outcomes) {
  std::lock_guard<std::mutex> lock(RegistrationMutex());
  decltype(xla_ops_pjrt_register)* register_handler = nullptr;
  std::string error =
      BridgeFunction(bridge_path, "xla_ops_pjrt_register", &register_handler);
  if (!error.empty()) return error;
  *outcomes = RegisterAll(
      kCudaPlatform,
      [register_handler](const LoadedHandler& handler) -> std::string {
        const XlaOpsHandlerBundle& bundle = handler.bundle;
        char text[kErrorSize];
        if (register_handler(handler.target.c_str(),
                             reinterpret_cast<void*>(bundle.instantiate),
                             reinterpret_cast<void*>(bundle.prepare),
                             reinterpret_cast<void*>(bundle.initialize),
                             reinterpret_cast<void*>(bundle.execute),
                             TraitsOf(handler), text, sizeof(text)) == 0) {
          return "";
        }
        return text;
      });
  return "";
}

std::map<std::string, std::vector<std::string>> RegisteredTargets() {
  std::lock_guard<std::mutex> lock(RegistrationMutex());
  std::map<std::string, std::vector<std::string>> targets;
  for (const char* platform : {kHostPlatform, kCudaPlatform}) {
    std::vector<std::string>& names = targets[platform];
    for (const LoadedHandler* handler : HandlersOf(platform)) {
      if (handler->registered) names.push_back(handler->target);
    }
  }
  return targets;
}

std::string OpenBridgePlugin(const std::string& bridge_path,
                             const std::string& plugin_path) {
  decltype(xla_ops_pjrt_open)* open = nullptr;
  std::string error = BridgeFunction(bridge_path, "xla_ops_pjrt_open", &open);
  if (!error.empty()) return error;
  char text[kErrorSize];
  return open(plugin_path.c_str(), text, sizeof(text)) == 0 ? "" : text;
}

std::string SetCompileOptions(const std::string& bridge_path,
                              const std::string& options) {
  decltype(xla_ops_pjrt_set_compile_options)* set = nullptr;
  std::string error =
      BridgeFunction(bridge_path, "xla_ops_pjrt_set_compile_options", &set);
  if (error.empty()) set(options.data(), options.size());
  return error;
}

}  // namespace xla_ops
