// Loading and checking of PJRT plugins; see plugin_loader.h.

#include "xla_ops/cc/bridge/plugin_loader.h"

#include <dlfcn.h>

#include "xla_ops/cc/bridge/dl_error.h"
#include "xla_ops/cc/bridge/padded_call.h"

namespace xla_ops {
namespace {

// A list longer than this is a loop or rubbish, not a list of extensions
// (plugin 0.116 has 11).
constexpr size_t kMaxExtensions = 1000;

constexpr char kReinstall[] =
    "reinstall jax-cuda13-pjrt, which xla_ops[cuda13] brings, or "
    "jax-cuda12-pjrt, which xla_ops[cuda12] brings";

std::string CheckVersion(const std::string& path, const PjrtApi& api,
                         std::string* fix) {
  const int major = api.version.major_version;
  const int minor = api.version.minor_version;
  const std::string found = "PJRT plugin " + path + " speaks PJRT API " +
                            std::to_string(major) + "." + std::to_string(minor);
  if (major != kPjrtMajor) {
    *fix = kInstall + std::string(", whose plugin has it");
    return found + ", torch_xla needs major version " +
           std::to_string(kPjrtMajor);
  }
  if (minor < kPjrtMinMinor) {
    *fix = kInstall + std::string(", whose plugin is newer");
    return found + ", torch_xla needs " + std::to_string(kPjrtMajor) + "." +
           std::to_string(kPjrtMinMinor) + " or newer";
  }
  return "";
}

}  // namespace

std::string OpenPjrtPlugin(const std::string& path, PjrtPlugin* plugin) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    plugin->fix =
        kInstall +
        std::string(": it brings the CUDA libraries that a plugin loads");
    return "PJRT plugin " + path + " cannot be loaded: " + LastDlError();
  }
  auto* get_api =
      reinterpret_cast<GetPjrtApiFunction*>(dlsym(library, "GetPjrtApi"));
  if (get_api == nullptr) {
    plugin->fix =
        "set XLA_OPS_PJRT_PLUGIN to the path of JAX's xla_cuda_plugin.so";
    return path + " is not a PJRT plugin: it does not export GetPjrtApi";
  }
  const PjrtApi* api = get_api();
  plugin->fix = kReinstall;
  if (api == nullptr) {
    return "PJRT plugin " + path + " cannot start: its GetPjrtApi failed";
  }
  if (api->struct_size < offsetof(PjrtApi, functions)) {
    return "PJRT plugin " + path + " is malformed: its function table has " +
           std::to_string(api->struct_size) + " bytes";
  }
  plugin->api = api;
  const std::string error = CheckVersion(path, *api, &plugin->fix);
  if (!error.empty()) return error;
  if (FunctionCount(*api) <= kCompile) {
    return "PJRT plugin " + path + " is malformed: its function table has " +
           std::to_string(FunctionCount(*api)) + " functions";
  }
  const PjrtExtension* extension = api->extension_start;
  while (extension != nullptr && plugin->extensions.size() < kMaxExtensions) {
    plugin->extensions.push_back(extension);
    if (extension->type == kGpuCustomCallExtension &&
        extension->struct_size >=
            offsetof(PjrtGpuCustomCallExtension, handles_traits)) {
      plugin->custom_call =
          reinterpret_cast<const PjrtGpuCustomCallExtension*>(extension);
    }
    extension = extension->next;
  }
  plugin->fix.clear();
  return "";
}

std::string PjrtPluginWarning(const std::string& path, const PjrtApi& api) {
  if (api.version.minor_version <= kPjrtNewestTestedMinor) return "";
  const auto version = [](int minor) {
    return std::to_string(kPjrtMajor) + "." + std::to_string(minor);
  };
  return "PJRT plugin " + path + " speaks PJRT API " +
         version(api.version.minor_version) + ", newer than " +
         version(kPjrtNewestTestedMinor) +
         ", the newest that xla_ops was tested with: should something fail, " +
         kInstall + ", whose plugin is older";
}

std::string TakePjrtErrorText(const PjrtApi& api, PjrtError* error) {
  if (error == nullptr) return "";
  PjrtErrorMessageArgs message_args = {};
  message_args.base.struct_size = sizeof(message_args);
  message_args.error = error;
  PaddedVoidCall(
      reinterpret_cast<PjrtVoidFunction*>(api.functions[kErrorMessage]),
      &message_args);
  std::string text(message_args.message, message_args.message_size);
  PjrtErrorDestroyArgs destroy_args = {};
  destroy_args.base.struct_size = sizeof(destroy_args);
  destroy_args.error = error;
  PaddedVoidCall(
      reinterpret_cast<PjrtVoidFunction*>(api.functions[kErrorDestroy]),
      &destroy_args);
  return text.empty() ? "the plugin gave no reason" : text;
}

}  // namespace xla_ops
