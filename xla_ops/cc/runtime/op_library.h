// The op libraries of this process and the handlers in them.
//
// An op library is a shared object that exports `xla_ops_handlers`
// (core/registry.h). It is loaded once and never unloaded, since XLA keeps
// pointers into it. All functions may be called from any thread.
//
// Tested by tests/core/test_runtime.py.

#ifndef XLA_OPS_CC_RUNTIME_OP_LIBRARY_H_
#define XLA_OPS_CC_RUNTIME_OP_LIBRARY_H_

#include <cstdint>
#include <string>
#include <vector>

#include "xla_ops/cc/core/registry.h"

namespace xla_ops {

// One handler of a loaded library. Never moved or freed.
struct LoadedHandler {
  std::string target;    // such as "xla_ops.rms_norm"
  std::string platform;  // "Host" or "CUDA"
  XlaOpsHandlerBundle bundle;
  std::string library;      // path, for messages
  bool registered = false;  // with XLA; written under the registration lock
};

inline constexpr char kHostPlatform[] = "Host";
inline constexpr char kCudaPlatform[] = "CUDA";

// Loads the library at `path` if it is not loaded, and sets `handlers` to its
// handlers. Returns an error text, empty on success.
std::string LoadOpLibrary(const std::string& path,
                          std::vector<const LoadedHandler*>* handlers);

// The architectures of the library's device code, such as "8.0 9.0a 12.0+PTX";
// empty for a library without device code. Loads the library if need be.
std::string OpLibraryCudaArchs(const std::string& path, std::string* archs);

// The CUDA that the library was built with, as 13000 for 13.0; 0 for a library
// without device code. Loads the library if need be.
std::string OpLibraryCudaVersion(const std::string& path, int* version);

// A function by which a library says what a call needs of its caller, such as
// xla_ops_attention_plan (ops/attention/attention_plan.h). Both structs are
// int64_t fields, of which the first is the struct's size in bytes. Returns
// null, or what is wrong with the request.
using OpLibraryPlanFn = const char*(const int64_t* request, int64_t* plan);

// Calls the library's `function` of that type with the fields of `request`
// behind the first, and sets `plan`, whose size says how many fields are
// wanted, likewise. `*refused`: the function is there, and its text is what is
// returned. Loads the library if need be.
std::string AskOpLibraryForPlan(const std::string& path,
                                const std::string& function,
                                const std::vector<int64_t>& request,
                                std::vector<int64_t>* plan, bool* refused);

// All handlers loaded for `platform`, in the order of loading.
std::vector<LoadedHandler*> HandlersOf(const std::string& platform);

// Null where no loaded library has it.
const LoadedHandler* FindHandler(const std::string& target,
                                 const std::string& platform);

}  // namespace xla_ops

#endif  // XLA_OPS_CC_RUNTIME_OP_LIBRARY_H_
