// Finds functions of torch_xla; see torch_xla_symbols.h.

#include "xla_ops/cc/runtime/torch_xla_symbols.h"

#include <dlfcn.h>
#include <link.h>

#include "xla_ops/cc/runtime/elf_symbols.h"

namespace xla_ops {
namespace {

// An exported function of the library, to check the table against.
constexpr char kExported[] = "PyInit__XLAC";

}  // namespace

// Calls into another library at an address read from a file: first makes sure
// that the file is the one that is loaded, by a symbol that both must have at
// the same place.
std::string FindTorchXlaSymbols(const std::string& path,
                                const std::vector<std::string>& names,
                                std::map<std::string, uintptr_t>* found) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_NOLOAD);
  if (library == nullptr) {
    return path + " is not loaded: import torch_xla first";
  }
  void* exported = dlsym(library, kExported);
  dlclose(library);  // drops the reference that RTLD_NOLOAD took
  if (exported == nullptr) {
    return path + " is not torch_xla's library: it does not export " +
           kExported;
  }
  Dl_info info;
  link_map* map = nullptr;
  if (dladdr1(exported, &info, reinterpret_cast<void**>(&map),
              RTLD_DL_LINKMAP) == 0 ||
      map == nullptr) {
    return path + ": its load address cannot be found";
  }
  std::vector<std::string> wanted = names;
  wanted.push_back(kExported);
  ElfSymbols symbols;
  std::string error = FindElfSymbols(path, wanted, &symbols);
  if (!error.empty()) return error;
  if (map->l_addr + symbols[kExported] !=
      reinterpret_cast<uintptr_t>(exported)) {
    return path + " is not the file that this process loaded: restart it";
  }
  for (const std::string& name : names) {
    (*found)[name] = map->l_addr + symbols[name];
  }
  return "";
}

}  // namespace xla_ops
