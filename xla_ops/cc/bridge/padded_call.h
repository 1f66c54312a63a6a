// Calls a function of a PJRT plugin that is newer than its caller.
//
// PJRT's structs carry their size, and grow at the end from version to version.
// A plugin refuses a struct shorter than the one it was built with
// ("Unexpected PJRT_ExecuteOptions size: expected 88, got 80"), although zero
// in every newer field means "not set". So each call's struct, and the structs
// inside it whose size plugins check too, are copied into larger zeroed ones,
// and what the plugin wrote is copied back.
//
// Which inner structs: in plugin 0.116 the names of the structs whose size it
// checks, apart from the argument structs, are PJRT_Program,
// PJRT_ExecuteOptions and PJRT_LoadOptions (of a function that torch_xla does
// not know). PJRT_NamedValue arrays are not checked. Arguments of extensions'
// functions have no inner structs.
//
// Tested by tests/gpu/test_bridge.py, on a plugin that refuses short structs.

#ifndef XLA_OPS_CC_BRIDGE_PADDED_CALL_H_
#define XLA_OPS_CC_BRIDGE_PADDED_CALL_H_

#include <cstddef>
#include <cstring>

#include "xla_ops/cc/bridge/pjrt_abi.h"

namespace xla_ops {

// Bytes of a padded struct. The largest of plugin 0.116 has 152.
inline constexpr size_t kPaddedSize = 512;

// A copy of a PJRT struct, zeros after its end, that says it has kPaddedSize
// bytes.
class PaddedStruct {
 public:
  // Whether `original` can be padded. Null cannot; nor can one that is already
  // as long (it needs no padding) or says that it is shorter than its own head
  // (left for the plugin to refuse).
  static bool CanPad(const void* original) {
    if (original == nullptr) return false;
    const size_t size = SizeOf(original);
    return size >= sizeof(PjrtArgs) && size < kPaddedSize;
  }

  explicit PaddedStruct(const void* original) : size_(SizeOf(original)) {
    std::memcpy(bytes_, original, size_);
    std::memset(bytes_ + size_, 0, kPaddedSize - size_);
    std::memcpy(bytes_, &kPaddedSize, sizeof(kPaddedSize));
  }

  // Copies everything but the size back.
  void CopyTo(void* original) const {
    std::memcpy(static_cast<char*>(original) + sizeof(size_t),
                bytes_ + sizeof(size_t), size_ - sizeof(size_t));
  }

  void* data() { return bytes_; }

  void* pointer_at(size_t offset) const {
    void* pointer;
    std::memcpy(&pointer, bytes_ + offset, sizeof(pointer));
    return pointer;
  }
  void set_pointer_at(size_t offset, void* pointer) {
    std::memcpy(bytes_ + offset, &pointer, sizeof(pointer));
  }
  bool has_pointer_at(size_t offset) const {
    return size_ >= offset + sizeof(void*);
  }

 private:
  static size_t SizeOf(const void* original) {
    size_t size;
    std::memcpy(&size, original, sizeof(size));
    return size;
  }

  alignas(16) char bytes_[kPaddedSize];
  size_t size_;
};

// Where an argument struct points to another whose size plugins check.
// In all four it is the second field after the head:
//   Client_Compile:              client, const program*, ...
//   Compile:                     topology, const program*, ...
//   Executable_OptimizedProgram: executable, program*
//   LoadedExecutable_Execute:    executable, options*, ...
inline constexpr size_t kInnerStructOffset = sizeof(PjrtArgs) + sizeof(void*);

constexpr bool HasInnerStruct(int index) {
  return index == kClientCompile || index == kCompile ||
         index == kExecutableOptimizedProgram ||
         index == kLoadedExecutableExecute;
}

// The plugin writes its answer into the inner struct of this one alone; the
// others are const for it.
constexpr bool WritesInnerStruct(int index) {
  return index == kExecutableOptimizedProgram;
}

constexpr bool ReturnsVoid(int index) {
  return index == kErrorDestroy || index == kErrorMessage;
}

// In the place of a position: of a function of an extension.
inline constexpr int kNotInTable = -1;

// Calls `function`, number `index` of the table, with padded `args`.
template <int index>
PjrtError* PaddedCall(PjrtFunction* function, void* args) {
  if (!PaddedStruct::CanPad(args)) return function(args);
  PaddedStruct padded(args);
  PjrtError* error;
  if constexpr (HasInnerStruct(index)) {
    void* inner = padded.has_pointer_at(kInnerStructOffset)
                      ? padded.pointer_at(kInnerStructOffset)
                      : nullptr;
    if (PaddedStruct::CanPad(inner)) {
      PaddedStruct padded_inner(inner);
      padded.set_pointer_at(kInnerStructOffset, padded_inner.data());
      error = function(padded.data());
      padded.set_pointer_at(kInnerStructOffset, inner);
      if constexpr (WritesInnerStruct(index)) padded_inner.CopyTo(inner);
    } else {
      error = function(padded.data());
    }
  } else {
    error = function(padded.data());
  }
  padded.CopyTo(args);
  return error;
}

// The same for the functions that return nothing.
inline void PaddedVoidCall(PjrtVoidFunction* function, void* args) {
  if (!PaddedStruct::CanPad(args)) return function(args);
  PaddedStruct padded(args);
  function(padded.data());
  padded.CopyTo(args);
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_BRIDGE_PADDED_CALL_H_
