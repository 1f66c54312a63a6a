// The table by which an op's shared object tells a loader what it holds.
//
// Each op library exports one C function, `xla_ops_handlers`. A loader calls
// it and registers every entry with the FFI registry of its platform, so no
// list of names exists outside the library itself. XLA_OPS_CPU_HANDLER
// (handler.h) and XLA_OPS_CUDA_HANDLER (device/cuda_handler.h) fill the table.
//
// Plain C layout: the loader may be built by another compiler.
//
// Tested by xla_ops/cc/core/handler_test.cc and tests/ops/test_conformance.py.

#ifndef XLA_OPS_CC_CORE_REGISTRY_H_
#define XLA_OPS_CC_CORE_REGISTRY_H_

#include <cstddef>

#include "xla/ffi/api/c_api.h"

// What a library outside this project and the package that loads it must agree
// on: these structs, what handlers are promised, and the names of the public
// headers (docs/adr/0013-extend.md). A change that an older library would not
// survive takes the next number, here and in xla_ops/py/extend/library.py.
#define XLA_OPS_API_VERSION 1

extern "C" {

// Handlers of the four stages of a typed-FFI call; null where not needed. A
// CUDA handler works on the calling thread's current device, which must be that
// of the stream and of the buffers, as it is under XLA; a caller of its own has
// to set it.
struct XlaOpsHandlerBundle {
  XLA_FFI_Handler* instantiate;
  XLA_FFI_Handler* prepare;
  XLA_FFI_Handler* initialize;
  XLA_FFI_Handler* execute;
};

struct XlaOpsHandler {
  const char* target;    // custom-call target, such as "xla_ops.rms_norm"
  const char* platform;  // "Host" or "CUDA"
  XlaOpsHandlerBundle bundle;
};

// Returns the library's table and sets `*count` to its length. The table
// lives as long as the library.
typedef const XlaOpsHandler* XlaOpsHandlersFn(size_t* count);

// The library's XLA_OPS_API_VERSION.
typedef int XlaOpsApiVersionFn();

// CUDA libraries only: the architectures of the embedded device code as
// "7.5 8.0 9.0a 12.0+PTX", the form that the build flag takes.
typedef const char* XlaOpsCudaArchsFn();

// CUDA libraries only: the CUDA whose runtime they hold, as 13000 for 13.0.
// Drivers of an earlier major version cannot run it.
typedef int XlaOpsCudaVersionFn();

}  // extern "C"

#define XLA_OPS_EXPORT __attribute__((visibility("default")))
// Of what each library must have for itself: the loader would share it among
// all that were compiled without -fvisibility-inlines-hidden.
#define XLA_OPS_HIDDEN __attribute__((visibility("hidden")))

#endif  // XLA_OPS_CC_CORE_REGISTRY_H_
