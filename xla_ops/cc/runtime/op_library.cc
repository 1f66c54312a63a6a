// Loading of op libraries; see op_library.h.

#include "xla_ops/cc/runtime/op_library.h"

#include <dlfcn.h>

#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <utility>

#include "xla_ops/cc/bridge/dl_error.h"

namespace xla_ops {
namespace {

using HandlerName = std::pair<std::string, std::string>;  // platform, target

struct Library {
  void* handle = nullptr;
  std::vector<LoadedHandler*> handlers;
};

// Guarded by `mutex`; never destroyed, since XLA's threads may run handlers
// while the process exits.
struct Libraries {
  std::mutex mutex;
  std::map<std::string, Library> by_path;
  std::vector<std::unique_ptr<LoadedHandler>> handlers;
  std::map<HandlerName, LoadedHandler*> by_name;
};

Libraries& GetLibraries() {
  static Libraries* const libraries = new Libraries;
  return *libraries;
}

// Checks one entry of a library's table before anything of it is kept.
// `names`: the entries before it.
std::string CheckEntry(const Libraries& libraries, const std::string& path,
                       const XlaOpsHandler& entry,
                       std::set<HandlerName>* names) {
  if (entry.target == nullptr || entry.platform == nullptr ||
      entry.bundle.execute == nullptr) {
    return path + ": its handler table has an incomplete entry";
  }
  const std::string platform = entry.platform;
  if (platform != kHostPlatform && platform != kCudaPlatform) {
    return path + ": handler " + entry.target + " is for platform " + platform +
           ", which is neither Host nor CUDA";
  }
  const auto it = libraries.by_name.find({platform, entry.target});
  if (it != libraries.by_name.end()) {
    return path + ": handler " + entry.target + " for " + platform + " is in " +
           it->second->library + " already";
  }
  if (!names->insert({platform, entry.target}).second) {
    return path + ": its handler table has " + entry.target + " for " +
           platform + " twice";
  }
  return "";
}

std::string LoadLocked(Libraries& libraries, const std::string& path,
                       Library** out) {
  const auto it = libraries.by_path.find(path);
  if (it != libraries.by_path.end()) {
    *out = &it->second;
    return "";
  }
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  // dlerror names the file itself, and what is wrong with it.
  if (handle == nullptr) return "cannot load op library: " + LastDlError();
  auto* get_handlers =
      reinterpret_cast<XlaOpsHandlersFn*>(dlsym(handle, "xla_ops_handlers"));
  if (get_handlers == nullptr) {
    dlclose(handle);
    return path + " is not an op library: it does not export xla_ops_handlers";
  }
  size_t count = 0;
  const XlaOpsHandler* table = get_handlers(&count);
  std::set<HandlerName> names;
  for (size_t i = 0; i < count; ++i) {
    std::string error = CheckEntry(libraries, path, table[i], &names);
    if (!error.empty()) {
      dlclose(handle);
      return error;
    }
  }
  Library library;
  library.handle = handle;
  for (size_t i = 0; i < count; ++i) {
    libraries.handlers.push_back(std::make_unique<LoadedHandler>(LoadedHandler{
        table[i].target, table[i].platform, table[i].bundle, path}));
    LoadedHandler* handler = libraries.handlers.back().get();
    library.handlers.push_back(handler);
    libraries.by_name[{handler->platform, handler->target}] = handler;
  }
  *out = &libraries.by_path.emplace(path, std::move(library)).first->second;
  return "";
}

// Finds a function of the library, loaded if need be; null if it exports none
// of that name.
template <typename Function>
std::string FindFunction(const std::string& path, const char* name,
                         Function** function) {
  Libraries& libraries = GetLibraries();
  std::lock_guard<std::mutex> lock(libraries.mutex);
  Library* library = nullptr;
  std::string error = LoadLocked(libraries, path, &library);
  if (!error.empty()) return error;
  *function = reinterpret_cast<Function*>(dlsym(library->handle, name));
  return "";
}

}  // namespace

std::string LoadOpLibrary(const std::string& path,
                          std::vector<const LoadedHandler*>* handlers) {
  Libraries& libraries = GetLibraries();
  std::lock_guard<std::mutex> lock(libraries.mutex);
  Library* library = nullptr;
  std::string error = LoadLocked(libraries, path, &library);
  if (!error.empty()) return error;
  handlers->assign(library->handlers.begin(), library->handlers.end());
  return "";
}

std::string OpLibraryCudaArchs(const std::string& path, std::string* archs) {
  XlaOpsCudaArchsFn* get_archs = nullptr;
  std::string error = FindFunction(path, "xla_ops_cuda_archs", &get_archs);
  if (!error.empty()) return error;
  *archs = get_archs == nullptr ? "" : get_archs();
  return "";
}

std::string OpLibraryCudaVersion(const std::string& path, int* version) {
  XlaOpsCudaVersionFn* get_version = nullptr;
  std::string error = FindFunction(path, "xla_ops_cuda_version", &get_version);
  if (!error.empty()) return error;
  *version = get_version == nullptr ? 0 : get_version();
  return "";
}

std::string AskOpLibraryForPlan(const std::string& path,
                                const std::string& function,
                                const std::vector<int64_t>& request,
                                std::vector<int64_t>* plan, bool* refused) {
  *refused = false;
  OpLibraryPlanFn* make_plan = nullptr;
  const std::string error = FindFunction(path, function.c_str(), &make_plan);
  if (!error.empty()) return error;
  if (make_plan == nullptr) return path + " does not export " + function;
  const auto with_size = [](const std::vector<int64_t>& fields) {
    std::vector<int64_t> all = {
        static_cast<int64_t>((fields.size() + 1) * sizeof(int64_t))};
    all.insert(all.end(), fields.begin(), fields.end());
    return all;
  };
  const std::vector<int64_t> request_struct = with_size(request);
  std::vector<int64_t> plan_struct = with_size(*plan);
  const char* wrong = make_plan(request_struct.data(), plan_struct.data());
  if (wrong != nullptr) {
    *refused = true;
    return wrong;
  }
  plan->assign(plan_struct.begin() + 1, plan_struct.end());
  return "";
}

std::vector<LoadedHandler*> HandlersOf(const std::string& platform) {
  Libraries& libraries = GetLibraries();
  std::lock_guard<std::mutex> lock(libraries.mutex);
  std::vector<LoadedHandler*> handlers;
  for (const auto& handler : libraries.handlers) {
    if (handler->platform == platform) handlers.push_back(handler.get());
  }
  return handlers;
}

const LoadedHandler* FindHandler(const std::string& target,
                                 const std::string& platform) {
  Libraries& libraries = GetLibraries();
  std::lock_guard<std::mutex> lock(libraries.mutex);
  const auto it = libraries.by_name.find({platform, target});
  return it == libraries.by_name.end() ? nullptr : it->second;
}

}  // namespace xla_ops
