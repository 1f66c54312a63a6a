// The copied list of extensions; see extensions.h.
//
// In torch_xla 2.9.0's machine code the extensions looked for are the profiler
// (1), streams (3), layouts (4), FFI (5), memory descriptions (6) and
// cross-host transfers (12). Of these
//
// - 3, 4 and 6 are padded. An error of the last two ends the process.
// - The profiler's functions are in a table of its own, which newer plugins
// have
//   made longer. torch_xla ends the process at the start of a trace unless the
//   size is that which it knows: it gets a copy that ends there. The functions
//   stay as they are: it leaves the size of their arguments unset, so there is
//   nothing to go by.
// - 5 and 12 stay as they are: they are called for execute contexts and for
//   transfers between hosts, neither of which torch_xla uses.

#include "xla_ops/cc/bridge/extensions.h"

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <utility>

#include "xla_ops/cc/bridge/padded_call.h"

namespace xla_ops {
namespace {

// An extension whose functions are padded. They follow its head; torch_xla
// knows the first `num_functions`. What newer plugins have behind these may not
// be a function, as in the custom-call extension.
struct PaddedExtension {
  int type;
  int num_functions;
};
constexpr PaddedExtension kPaddedExtensions[] = {
    {kStreamExtension, 2},
    {kLayoutsExtension, 5},
    {kMemoryDescriptionsExtension, 2},
};
constexpr int kMaxFunctions = 5;

// The plugin's functions, by place in kPaddedExtensions. Written once, before
// the list is handed out, so calls read it without a lock.
PjrtFunction* wrapped[std::size(kPaddedExtensions)][kMaxFunctions];

template <int extension, int index>
PjrtError* Forward(void* args) {
  return PaddedCall<kNotInTable>(wrapped[extension][index], args);
}

// Makes functions[index] the wrapper of what it is. Null stays null: it says
// that the plugin lacks the function.
template <int extension, int index>
void WrapFunction(PjrtFunction** functions, int count) {
  if (index >= count || functions[index] == nullptr) return;
  wrapped[extension][index] = functions[index];
  functions[index] = &Forward<extension, index>;
}

template <int extension, int... indices>
void WrapFunctions(PjrtFunction** functions, int count,
                   std::integer_sequence<int, indices...>) {
  (WrapFunction<extension, indices>(functions, count), ...);
}

// Wraps what the `size` bytes at `copy` have, if they are of the type of
// kPaddedExtensions[extension].
template <int extension>
void WrapIfOfType(PjrtExtension* copy, size_t size) {
  constexpr PaddedExtension kExtension = kPaddedExtensions[extension];
  static_assert(kExtension.num_functions <= kMaxFunctions);
  if (copy->type != kExtension.type) return;
  const size_t count = (size - sizeof(PjrtExtension)) / sizeof(PjrtFunction*);
  WrapFunctions<extension>(
      reinterpret_cast<PjrtFunction**>(copy + 1),
      static_cast<int>(std::min<size_t>(count, kExtension.num_functions)),
      std::make_integer_sequence<int, kExtension.num_functions>());
}

template <int... extensions>
void WrapKnown(PjrtExtension* copy, size_t size,
               std::integer_sequence<int, extensions...>) {
  (WrapIfOfType<extensions>(copy, size), ...);
}

// Shortens the profiler's table to what torch_xla 2.9.0 knows of it. A shorter
// one stays: nothing can be put in the place of what is missing.
void ShortenProfilerTable(PjrtExtension* copy, size_t size) {
  constexpr size_t kSize = 10 * sizeof(void*);
  if (copy->type != kProfilerExtension) return;
  if (size < sizeof(PjrtExtension) + sizeof(void*)) return;
  void** table = reinterpret_cast<void**>(copy + 1);
  if (*table == nullptr || *static_cast<const size_t*>(*table) <= kSize) return;
  // As the list's, never freed.
  void* shorter = std::malloc(kSize);
  std::memcpy(shorter, *table, kSize);
  *static_cast<size_t*>(shorter) = kSize;
  *table = shorter;
}

}  // namespace

PjrtExtension* WrapExtensions(
    const std::vector<const PjrtExtension*>& extensions) {
  PjrtExtension* first = nullptr;
  for (auto it = extensions.rbegin(); it != extensions.rend(); ++it) {
    // A size below its head's is the plugin's mistake; the head is there.
    const size_t size = std::max((*it)->struct_size, sizeof(PjrtExtension));
    auto* copy = static_cast<PjrtExtension*>(std::malloc(size));
    std::memcpy(copy, *it, size);
    copy->next = first;
    first = copy;
    WrapKnown(copy, size,
              std::make_integer_sequence<int, std::size(kPaddedExtensions)>());
    ShortenProfilerTable(copy, size);
  }
  return first;
}

}  // namespace xla_ops
