// Finds functions of torch_xla that it does not export, in this process.
//
//   std::map<std::string, uintptr_t> found;
//   std::string error = FindTorchXlaSymbols(xlac_path, {"_Z1fv"}, &found);
//   if (error.empty()) reinterpret_cast<void (*)()>(found["_Z1fv"])();
//
// Tested by tests/core/test_runtime.py.

#ifndef XLA_OPS_CC_RUNTIME_TORCH_XLA_SYMBOLS_H_
#define XLA_OPS_CC_RUNTIME_TORCH_XLA_SYMBOLS_H_

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace xla_ops {

// Where the functions `names` lie. `path` is the file of the imported module
// _XLAC, whose symbol table is read. Returns what is wrong, or "": it is not
// loaded, another file by now, or has no symbol table.
std::string FindTorchXlaSymbols(const std::string& path,
                                const std::vector<std::string>& names,
                                std::map<std::string, uintptr_t>* found);

}  // namespace xla_ops

#endif  // XLA_OPS_CC_RUNTIME_TORCH_XLA_SYMBOLS_H_
