// libxla_ops_pjrt.so: a PJRT plugin that wraps JAX's CUDA plugin for torch_xla
// 2.9.0. Decisions: docs/adr/0005-pjrt-bridge.md.
//
// It passes every call on to the wrapped plugin and changes four things:
// arguments are padded for plugins newer than torch_xla (padded_call.h); the
// client's platform is named "gpu", since torch_xla 2.9.0 aborts the process
// for a device type named CUDA; handlers can be registered through the plugin's
// custom-call extension, which torch_xla 2.9.0 cannot reach; and a program can
// be compiled with options of its own, for which torch_xla 2.9.0 has no way.
//
// The functions below are what the library exports, all in C.
//
// Tested by tests/gpu/test_bridge.py.

#ifndef XLA_OPS_CC_BRIDGE_BRIDGE_H_
#define XLA_OPS_CC_BRIDGE_BRIDGE_H_

#include <cstddef>
#include <cstdint>

#define XLA_OPS_BRIDGE_EXPORT __attribute__((visibility("default")))

extern "C" {

// What the bridge wraps.
struct XlaOpsPjrtInfo {
  const char* plugin_path;  // lives as long as the process
  int major_version;
  int minor_version;
  int has_custom_call;  // whether handlers can be registered
};

// Chooses and opens the plugin to wrap. To be called before the framework asks
// for the function table; else the plugin named by the environment variable
// XLA_OPS_PJRT_PLUGIN is taken. Returns 0, or non-zero with a text in `error`,
// cut to `error_size` bytes. Opening the same path again is fine; another path
// is refused, since one process can wrap one plugin.
XLA_OPS_BRIDGE_EXPORT int xla_ops_pjrt_open(const char* plugin_path,
                                            char* error, size_t error_size);

// Makes the plugin fail: where nothing is open, GetPjrtApi returns a table
// whose every function fails with `reason`. For a caller that found out itself
// why no plugin can work, and has no other way to say so to the framework.
XLA_OPS_BRIDGE_EXPORT void xla_ops_pjrt_fail(const char* reason);

// What this thread compiles from now on has these options too: a serialized
// CompileOptionsProto, merged into the framework's. None if empty.
XLA_OPS_BRIDGE_EXPORT void xla_ops_pjrt_set_compile_options(const char* options,
                                                            size_t size);

// Tells what was opened. Returns 0, or non-zero where nothing is open.
XLA_OPS_BRIDGE_EXPORT int xla_ops_pjrt_info(XlaOpsPjrtInfo* info);

// Registers a typed-FFI handler for CUDA under the custom-call target `target`.
// The stages are XLA_FFI_Handler*, null where unused; `traits` are
// XLA_FFI_Handler_TraitsBits. Returns as xla_ops_pjrt_open.
XLA_OPS_BRIDGE_EXPORT int xla_ops_pjrt_register(const char* target,
                                                void* instantiate,
                                                void* prepare, void* initialize,
                                                void* execute, uint32_t traits,
                                                char* error, size_t error_size);

// The entry point of a PJRT plugin. Never null: where no plugin can be wrapped,
// every function of the table fails with the reason.
XLA_OPS_BRIDGE_EXPORT const void* GetPjrtApi();

}  // extern "C"

#endif  // XLA_OPS_CC_BRIDGE_BRIDGE_H_
