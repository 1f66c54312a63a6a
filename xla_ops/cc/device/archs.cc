// Exports which GPU architectures and which CUDA an op library was built for,
// so that the doctor and the loader can tell a user whose GPU or driver is
// older.
//
// The build passes the list on the command line, in the form of its own
// flag: -DXLA_OPS_CUDA_ARCHS='"7.5 8.0 9.0a 12.0+PTX"'. Declared in
// xla_ops/cc/core/registry.h; this file does not include it, so that every op
// library can link this one.
//
// Tested by tests/ops/test_conformance.py and tests/tools/test_wheel.py.

#include <cuda_runtime_api.h>

#ifndef XLA_OPS_CUDA_ARCHS
#error "the build must define XLA_OPS_CUDA_ARCHS, such as \"8.0 9.0a\""
#endif

extern "C" __attribute__((visibility("default"))) const char*
xla_ops_cuda_archs() {
  return XLA_OPS_CUDA_ARCHS;
}

extern "C" __attribute__((visibility("default"))) int xla_ops_cuda_version() {
  return CUDART_VERSION;
}
