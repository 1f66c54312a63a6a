// The parts of the PJRT C ABI that the bridge touches, declared by hand.
//
// The bridge serves plugins of many generations, so it cannot be built from one
// generation's header: it may use only what all of them share. That is what
// stands here, and why it is safe to rely on:
//
// - A layout may only grow at its end as long as PJRT's major version stays the
//   same. The bridge refuses any other major version (kPjrtMajor).
// - The function table was last rearranged at minor version 57; the bridge asks
//   for 75 (kPjrtMinMinor), the version of torch_xla 2.9.0 itself and of jax
//   0.7.1's plugins. From there functions were only appended: read in PJRT's
//   own change log, and in the tables of plugins 0.75, 0.76 and 0.116.
// - Every argument struct begins {size_t struct_size; void* extension_start};
//   those of the stream extension have no extension_start, but are as long.

#ifndef XLA_OPS_CC_BRIDGE_PJRT_ABI_H_
#define XLA_OPS_CC_BRIDGE_PJRT_ABI_H_

#include <cstddef>
#include <cstdint>

namespace xla_ops {

inline constexpr int kPjrtMajor = 0;
inline constexpr int kPjrtMinMinor = 75;

// The newest that tests ran with on a GPU: the one of jax 0.11.2's plugins.
inline constexpr int kPjrtNewestTestedMinor = 115;

// One entry of the list of optional features that a plugin offers.
struct PjrtExtension {
  size_t struct_size;
  int type;  // a C enum, 4 bytes on this ABI
  PjrtExtension* next;
};
static_assert(sizeof(PjrtExtension) == 24);

// Values of PjrtExtension::type, the same since version 0.59.
enum PjrtExtensionType : int {
  kGpuCustomCallExtension = 0,  // registers FFI handlers
  kProfilerExtension = 1,
  kStreamExtension = 3,
  kLayoutsExtension = 4,
  kMemoryDescriptionsExtension = 6,
};

struct PjrtApiVersion {
  size_t struct_size;
  PjrtExtension* extension_start;
  int major_version;
  int minor_version;
};
static_assert(sizeof(PjrtApiVersion) == 24);

// Opaque; made and freed by the plugin.
struct PjrtError;

// Takes a pointer to the function's own argument struct. Returns null for
// success, except the first two of the table, which return nothing.
using PjrtFunction = PjrtError*(void* args);
using PjrtVoidFunction = void(void* args);

// The head of PJRT_Api. `functions` goes on to the end given by `struct_size`;
// each is a PjrtFunction*, but the first two, which are PjrtVoidFunction*.
struct PjrtApi {
  size_t struct_size;
  PjrtExtension* extension_start;
  PjrtApiVersion version;
  void* functions[1];
};
static_assert(offsetof(PjrtApi, version) == 16);
static_assert(offsetof(PjrtApi, functions) == 40);
static_assert(sizeof(void*) == 8 && sizeof(PjrtFunction*) == sizeof(void*));

using GetPjrtApiFunction = const PjrtApi*();

// Positions in PjrtApi::functions.
enum PjrtFunctionIndex : int {
  kErrorDestroy = 0,  // returns void
  kErrorMessage = 1,  // returns void
  kErrorGetCode = 2,
  kPluginInitialize = 3,
  kClientCreate = 10,
  kClientPlatformName = 12,
  kClientCompile = 20,
  kExecutableOptimizedProgram = 48,
  kLoadedExecutableExecute = 55,
  kCompile = 89,
};

// The number of functions in the table of `api`.
inline size_t FunctionCount(const PjrtApi& api) {
  if (api.struct_size < offsetof(PjrtApi, functions)) return 0;
  return (api.struct_size - offsetof(PjrtApi, functions)) / sizeof(void*);
}

// What every argument struct begins with.
struct PjrtArgs {
  size_t struct_size;
  PjrtExtension* extension_start;
};
static_assert(sizeof(PjrtArgs) == 16);

struct PjrtErrorDestroyArgs {
  PjrtArgs base;
  PjrtError* error;
};
static_assert(sizeof(PjrtErrorDestroyArgs) == 24);

struct PjrtErrorMessageArgs {
  PjrtArgs base;
  const PjrtError* error;
  const char* message;  // out; lives as long as `error`
  size_t message_size;  // out
};
static_assert(sizeof(PjrtErrorMessageArgs) == 40);

struct PjrtErrorGetCodeArgs {
  PjrtArgs base;
  const PjrtError* error;
  int code;  // out; an absl::StatusCode
};
static_assert(offsetof(PjrtErrorGetCodeArgs, code) == 24);

struct PjrtPlatformNameArgs {
  PjrtArgs base;
  void* client;
  const char* platform_name;  // out; lives as long as `client`
  size_t platform_name_size;  // out
};
static_assert(sizeof(PjrtPlatformNameArgs) == 40);

struct PjrtClientCompileArgs {
  PjrtArgs base;
  void* client;
  const void* program;
  const char* compile_options;  // a serialized CompileOptionsProto
  size_t compile_options_size;
  void* executable;  // out
};
static_assert(sizeof(PjrtClientCompileArgs) == 56);

// The custom-call extension. `traits` and `handles_traits` came with its third
// version; a plugin's own struct_size says whether they are there.
struct PjrtRegisterCustomCallArgs {
  size_t struct_size;
  const char* function_name;
  size_t function_name_size;
  int api_version;
  void* instantiate;
  void* prepare;
  void* initialize;
  void* execute;
  uint32_t traits;
};
static_assert(offsetof(PjrtRegisterCustomCallArgs, instantiate) == 32);
static_assert(offsetof(PjrtRegisterCustomCallArgs, traits) == 64);

inline constexpr int kTypedFfi = 1;  // the value of `api_version`

struct PjrtGpuCustomCallExtension {
  PjrtExtension base;
  PjrtError* (*custom_call)(PjrtRegisterCustomCallArgs* args);
  bool handles_traits;
};
static_assert(offsetof(PjrtGpuCustomCallExtension, custom_call) == 24);
static_assert(offsetof(PjrtGpuCustomCallExtension, handles_traits) == 32);

}  // namespace xla_ops

#endif  // XLA_OPS_CC_BRIDGE_PJRT_ABI_H_
