// Bounds-checked ELF64 symbol lookup; see elf_symbols.h.

#include "xla_ops/cc/runtime/elf_symbols.h"

#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <utility>

namespace xla_ops {
namespace {

// The file's bytes. Headers are copied out with memcpy because nothing says
// that a malformed file aligns them.
class Image {
 public:
  Image(const uint8_t* data, size_t size) : data_(data), size_(size) {}

  // Whether [offset, offset + length) lies inside, without overflow.
  bool Contains(uint64_t offset, uint64_t length) const {
    return offset <= size_ && length <= size_ - offset;
  }

  template <typename T>
  bool Read(uint64_t offset, T* value) const {
    if (!Contains(offset, sizeof(T))) return false;
    std::memcpy(value, data_ + offset, sizeof(T));
    return true;
  }

  const uint8_t* at(uint64_t offset) const { return data_ + offset; }

 private:
  const uint8_t* data_;
  size_t size_;
};

std::string CheckHeader(const Elf64_Ehdr& header) {
  if (std::memcmp(header.e_ident, ELFMAG, SELFMAG) != 0) {
    return "not an ELF file";
  }
  if (header.e_ident[EI_CLASS] != ELFCLASS64 ||
      header.e_ident[EI_DATA] != ELFDATA2LSB || header.e_machine != EM_X86_64) {
    return "not a 64-bit little-endian x86-64 ELF file";
  }
  if (header.e_type != ET_DYN) return "not a shared object";
  if (header.e_shoff == 0) return "it has no section table (stripped)";
  if (header.e_shentsize != sizeof(Elf64_Shdr)) {
    return "malformed: wrong size of a section header";
  }
  return "";
}

// Reads the section headers. A count of 0 in the file header means that the
// real one is in the first section header (more than 65,279 sections).
std::string ReadSections(const Image& image, const Elf64_Ehdr& header,
                         std::vector<Elf64_Shdr>* sections) {
  uint64_t count = header.e_shnum;
  if (count == 0) {
    Elf64_Shdr first;
    if (!image.Read(header.e_shoff, &first)) {
      return "truncated: the section table lies outside the file";
    }
    count = first.sh_size;
  }
  if (count > UINT64_MAX / sizeof(Elf64_Shdr) ||
      !image.Contains(header.e_shoff, count * sizeof(Elf64_Shdr))) {
    return "truncated: the section table lies outside the file";
  }
  sections->resize(count);
  if (count != 0) {
    std::memcpy(sections->data(), image.at(header.e_shoff),
                count * sizeof(Elf64_Shdr));
  }
  return "";
}

// Offsets in the string table at which the bytes of `name` and its NUL stand.
// Linkers share tails, so a name may be found inside a longer one, and more
// than once. Searching the strings first and comparing numbers afterwards
// keeps the walk over half a million symbols free of random reads (37 ms for
// torch_xla's 305 MB library, in the page cache).
std::vector<uint64_t> OffsetsOf(const std::string& name, const uint8_t* strings,
                                size_t size) {
  std::vector<uint64_t> offsets;
  const size_t length = name.size() + 1;  // with the NUL
  size_t begin = 0;
  while (begin < size) {
    const void* hit =
        memmem(strings + begin, size - begin, name.c_str(), length);
    if (hit == nullptr) break;
    const size_t offset = static_cast<const uint8_t*>(hit) - strings;
    offsets.push_back(offset);
    begin = offset + 1;
  }
  return offsets;
}

}  // namespace

std::string FindElfSymbolsInImage(const uint8_t* data, size_t size,
                                  const std::vector<std::string>& names,
                                  ElfSymbols* symbols) {
  const Image image(data, size);
  Elf64_Ehdr header;
  if (!image.Read(0, &header)) return "not an ELF file";
  std::string error = CheckHeader(header);
  if (!error.empty()) return error;
  std::vector<Elf64_Shdr> sections;
  error = ReadSections(image, header, &sections);
  if (!error.empty()) return error;

  const auto symtab =
      std::find_if(sections.begin(), sections.end(),
                   [](const Elf64_Shdr& s) { return s.sh_type == SHT_SYMTAB; });
  if (symtab == sections.end()) {
    return "it has no symbol table (.symtab): the file was stripped";
  }
  if (symtab->sh_entsize != sizeof(Elf64_Sym)) {
    return "malformed: wrong size of a symbol table entry";
  }
  if (!image.Contains(symtab->sh_offset, symtab->sh_size)) {
    return "truncated: the symbol table lies outside the file";
  }
  if (symtab->sh_link >= sections.size() ||
      sections[symtab->sh_link].sh_type != SHT_STRTAB) {
    return "malformed: the symbol table has no string table";
  }
  const Elf64_Shdr& strtab = sections[symtab->sh_link];
  if (!image.Contains(strtab.sh_offset, strtab.sh_size)) {
    return "truncated: the string table lies outside the file";
  }

  // (string offset, index into names), sorted for the search below.
  std::vector<std::pair<uint64_t, size_t>> wanted;
  for (size_t i = 0; i < names.size(); ++i) {
    for (uint64_t offset :
         OffsetsOf(names[i], image.at(strtab.sh_offset), strtab.sh_size)) {
      wanted.emplace_back(offset, i);
    }
  }
  std::sort(wanted.begin(), wanted.end());

  ElfSymbols found;
  const uint64_t count = symtab->sh_size / sizeof(Elf64_Sym);
  for (uint64_t i = 0; i < count && found.size() < names.size(); ++i) {
    Elf64_Sym symbol;
    image.Read(symtab->sh_offset + i * sizeof(Elf64_Sym), &symbol);
    const auto it =
        std::lower_bound(wanted.begin(), wanted.end(),
                         std::pair<uint64_t, size_t>(symbol.st_name, 0));
    if (it == wanted.end() || it->first != symbol.st_name) continue;
    // An undefined entry is a reference to another library's function.
    if (symbol.st_shndx == SHN_UNDEF ||
        ELF64_ST_TYPE(symbol.st_info) != STT_FUNC) {
      continue;
    }
    found.emplace(names[it->second], symbol.st_value);
  }
  for (const std::string& name : names) {
    if (found.count(name) == 0) {
      return "its symbol table has no function " + name;
    }
  }
  *symbols = std::move(found);
  return "";
}

std::string FindElfSymbols(const std::string& path,
                           const std::vector<std::string>& names,
                           ElfSymbols* symbols) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return path + ": " + strerror(errno);
  struct stat status;
  if (fstat(fd, &status) != 0) {
    const std::string error = path + ": " + strerror(errno);
    close(fd);
    return error;
  }
  if (!S_ISREG(status.st_mode) || status.st_size == 0) {
    close(fd);
    return path + ": not an ELF file";
  }
  const size_t size = static_cast<size_t>(status.st_size);
  void* data = mmap(nullptr, size, PROT_READ, MAP_PRIVATE, fd, 0);
  const int map_errno = errno;
  close(fd);
  if (data == MAP_FAILED) return path + ": " + strerror(map_errno);
  const std::string error = FindElfSymbolsInImage(
      static_cast<const uint8_t*>(data), size, names, symbols);
  munmap(data, size);
  return error.empty() ? "" : path + ": " + error;
}

}  // namespace xla_ops
