// Finds symbols, local ones included, in an ELF64 file's .symtab.
//
// dlsym() sees exported symbols only; the FFI registry of torch_xla's CPU
// client is reached through a function that is not exported. The file may be
// anything (truncated, stripped, not ELF): every offset is checked before it is
// followed, so bad bytes give an error text and never a bad read.
//
//   ElfSymbols symbols;
//   std::string error = FindElfSymbols("/path/lib.so", {"f", "g"}, &symbols);
//   if (error.empty()) uint64_t offset = symbols["f"].value;
//
// Tested by tests/core/test_runtime.py.

#ifndef XLA_OPS_CC_RUNTIME_ELF_SYMBOLS_H_
#define XLA_OPS_CC_RUNTIME_ELF_SYMBOLS_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace xla_ops {

// Symbol name to its value, the address relative to the file's load bias.
using ElfSymbols = std::map<std::string, uint64_t>;

// Looks up the function symbols `names` in the .symtab of the ELF image
// `data[0, size)`. Returns an empty string and sets `symbols` to all of them,
// or returns what is wrong: not ELF64 little-endian x86-64, malformed,
// stripped, or the first of `names` that is absent.
std::string FindElfSymbolsInImage(const uint8_t* data, size_t size,
                                  const std::vector<std::string>& names,
                                  ElfSymbols* symbols);

// The same for a file, which is mapped and not read as a whole. An error text
// begins with `path`.
std::string FindElfSymbols(const std::string& path,
                           const std::vector<std::string>& names,
                           ElfSymbols* symbols);

}  // namespace xla_ops

#endif  // XLA_OPS_CC_RUNTIME_ELF_SYMBOLS_H_
