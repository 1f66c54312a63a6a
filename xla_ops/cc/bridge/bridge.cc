// The wrapping function table and the exported functions; see bridge.h.

#include "xla_ops/cc/bridge/bridge.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>
#include <utility>

#include "xla_ops/cc/bridge/extensions.h"
#include "xla_ops/cc/bridge/failed_api.h"
#include "xla_ops/cc/bridge/padded_call.h"
#include "xla_ops/cc/bridge/pjrt_abi.h"
#include "xla_ops/cc/bridge/plugin_loader.h"

namespace xla_ops {
namespace {

// torch_xla 2.9.0 knows 115 functions and so calls no others. The rest of the
// table is the plugin's own.
constexpr int kWrappedFunctions = 160;

// The wrapped plugin's table. Written once, before the table that leads here is
// handed out, so calls read it without a lock.
const PjrtApi* wrapped_api = nullptr;

template <int index>
PjrtError* Forward(void* args) {
  return PaddedCall<index>(
      reinterpret_cast<PjrtFunction*>(wrapped_api->functions[index]), args);
}

template <int index>
void ForwardVoid(void* args) {
  PaddedVoidCall(
      reinterpret_cast<PjrtVoidFunction*>(wrapped_api->functions[index]), args);
}

// torch_xla makes the device's name and type of the platform's name.
PjrtError* PlatformName(void* args) {
  auto* name_args = static_cast<PjrtPlatformNameArgs*>(args);
  if (name_args->base.struct_size < sizeof(PjrtPlatformNameArgs)) {
    return Forward<kClientPlatformName>(args);  // the plugin refuses it
  }
  static constexpr char kName[] = "gpu";
  name_args->platform_name = kName;
  name_args->platform_name_size = sizeof(kName) - 1;
  return nullptr;
}

// What the thread's compilations get beside the framework's options.
std::string& ThreadCompileOptions() {
  static thread_local std::string options;
  return options;
}

// A message of protocol buffers that follows another is merged into it.
PjrtError* ClientCompile(void* args) {
  auto* compile_args = static_cast<PjrtClientCompileArgs*>(args);
  const std::string& more = ThreadCompileOptions();
  if (more.empty() ||
      compile_args->base.struct_size < sizeof(PjrtClientCompileArgs)) {
    return Forward<kClientCompile>(args);
  }
  const char* const given = compile_args->compile_options;
  const size_t given_size = compile_args->compile_options_size;
  const std::string all = std::string(given, given_size) + more;
  compile_args->compile_options = all.data();
  compile_args->compile_options_size = all.size();
  PjrtError* const error = Forward<kClientCompile>(args);
  compile_args->compile_options = given;
  compile_args->compile_options_size = given_size;
  return error;
}

template <int index>
void* Wrapper() {
  if constexpr (index == kClientPlatformName) {
    return reinterpret_cast<void*>(&PlatformName);
  } else if constexpr (index == kClientCompile) {
    return reinterpret_cast<void*>(&ClientCompile);
  } else if constexpr (ReturnsVoid(index)) {
    return reinterpret_cast<void*>(&ForwardVoid<index>);
  } else {
    return reinterpret_cast<void*>(&Forward<index>);
  }
}

// A null entry stays null: it says that the plugin lacks the function.
template <int... indices>
void WrapFunctions(PjrtApi* table, int count,
                   std::integer_sequence<int, indices...>) {
  ((indices < count && table->functions[indices] != nullptr
        ? static_cast<void>(table->functions[indices] = Wrapper<indices>())
        : static_cast<void>(0)),
   ...);
}

// A copy of the plugin's table, the version unchanged.
PjrtApi* MakeTable(const PjrtPlugin& plugin) {
  const PjrtApi& api = *plugin.api;
  auto* table = static_cast<PjrtApi*>(std::malloc(api.struct_size));
  std::memcpy(table, &api, api.struct_size);
  table->extension_start = WrapExtensions(plugin.extensions);
  const int count =
      static_cast<int>(std::min<size_t>(FunctionCount(api), kWrappedFunctions));
  WrapFunctions(table, count,
                std::make_integer_sequence<int, kWrappedFunctions>());
  return table;
}

// What is open. Guarded by `mutex`; never destroyed, since XLA's threads may
// call while the process exits.
struct State {
  std::mutex mutex;
  std::string path;
  PjrtPlugin plugin;
  PjrtApi* table = nullptr;  // null: nothing is open
  std::string failure;       // what xla_ops_pjrt_fail was told
};

State& GetState() {
  static State* const state = new State;
  return *state;
}

std::string OpenLocked(State& state, const std::string& path) {
  if (state.table != nullptr) {
    if (path == state.path) return "";
    return "PJRT plugin " + path + " cannot be opened: this process uses " +
           state.path + " already";
  }
  PjrtPlugin plugin;
  const std::string error = OpenPjrtPlugin(path, &plugin);
  if (!error.empty()) return error + ": " + plugin.fix;
  const std::string warning = PjrtPluginWarning(path, *plugin.api);
  if (!warning.empty()) std::fprintf(stderr, "xla_ops: %s\n", warning.c_str());
  wrapped_api = plugin.api;
  state.path = path;
  state.table = MakeTable(plugin);
  state.plugin = std::move(plugin);
  return "";
}

std::string RegisterLocked(State& state, PjrtRegisterCustomCallArgs args) {
  const std::string target(args.function_name, args.function_name_size);
  if (state.table == nullptr) {
    return target + " cannot be registered: no PJRT plugin is open";
  }
  const PjrtGpuCustomCallExtension* extension = state.plugin.custom_call;
  if (extension == nullptr) {
    return target + " cannot be registered: PJRT plugin " + state.path +
           " has no custom-call extension: " + kInstall +
           ", whose plugin has it";
  }
  // A plugin that does not know traits asks the handler itself.
  const bool has_traits =
      extension->base.struct_size >
          offsetof(PjrtGpuCustomCallExtension, handles_traits) &&
      extension->handles_traits;
  args.struct_size =
      has_traits ? sizeof(args) : offsetof(PjrtRegisterCustomCallArgs, traits);
  const std::string error =
      TakePjrtErrorText(*wrapped_api, extension->custom_call(&args));
  return error.empty() ? "" : target + " cannot be registered: " + error;
}

// Writes `text` as a C string of at most `size` bytes; returns the exit status
// of the C functions.
int Report(const std::string& text, char* error, size_t size) {
  if (text.empty()) return 0;
  if (error != nullptr && size > 0) {
    const size_t length = std::min(text.size(), size - 1);
    std::memcpy(error, text.data(), length);
    error[length] = '\0';
  }
  return 1;
}

}  // namespace
}  // namespace xla_ops

extern "C" {

int xla_ops_pjrt_open(const char* plugin_path, char* error, size_t error_size) {
  xla_ops::State& state = xla_ops::GetState();
  std::lock_guard<std::mutex> lock(state.mutex);
  return xla_ops::Report(xla_ops::OpenLocked(state, plugin_path), error,
                         error_size);
}

void xla_ops_pjrt_set_compile_options(const char* options, size_t size) {
  xla_ops::ThreadCompileOptions().assign(options, size);
}

void xla_ops_pjrt_fail(const char* reason) {
  xla_ops::State& state = xla_ops::GetState();
  std::lock_guard<std::mutex> lock(state.mutex);
  state.failure = reason;
}

int xla_ops_pjrt_info(XlaOpsPjrtInfo* info) {
  xla_ops::State& state = xla_ops::GetState();
  std::lock_guard<std::mutex> lock(state.mutex);
  if (state.table == nullptr) return 1;
  info->plugin_path = state.path.c_str();
  info->major_version = state.plugin.api->version.major_version;
  info->minor_version = state.plugin.api->version.minor_version;
  info->has_custom_call = state.plugin.custom_call != nullptr;
  return 0;
}

int xla_ops_pjrt_register(const char* target, void* instantiate, void* prepare,
                          void* initialize, void* execute, uint32_t traits,
                          char* error, size_t error_size) {
  xla_ops::PjrtRegisterCustomCallArgs args = {};
  args.function_name = target;
  args.function_name_size = std::strlen(target);
  args.api_version = xla_ops::kTypedFfi;
  args.instantiate = instantiate;
  args.prepare = prepare;
  args.initialize = initialize;
  args.execute = execute;
  args.traits = traits;
  xla_ops::State& state = xla_ops::GetState();
  std::lock_guard<std::mutex> lock(state.mutex);
  return xla_ops::Report(xla_ops::RegisterLocked(state, args), error,
                         error_size);
}

const void* GetPjrtApi() {
  xla_ops::State& state = xla_ops::GetState();
  std::lock_guard<std::mutex> lock(state.mutex);
  if (state.table != nullptr) return state.table;
  if (!state.failure.empty()) return xla_ops::FailedApi(state.failure);
  const char* path = std::getenv("XLA_OPS_PJRT_PLUGIN");
  if (path == nullptr || *path == '\0') {
    return xla_ops::FailedApi(
        std::string("no PJRT plugin to wrap: ") + xla_ops::kInstall +
        "; or set XLA_OPS_PJRT_PLUGIN to the path of JAX's "
        "xla_cuda_plugin.so");
  }
  const std::string error = xla_ops::OpenLocked(state, path);
  return error.empty() ? state.table : xla_ops::FailedApi(error);
}

}  // extern "C"
