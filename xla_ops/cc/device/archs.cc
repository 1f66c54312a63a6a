// Exports which GPU architectures a CUDA op library was built for, so that
// the doctor and the loader can tell a user whose GPU is older.
//
// The build passes the list on the command line, in the form of its own
// flag: -DXLA_OPS_CUDA_ARCHS='"7.5 8.0 9.0a 12.0+PTX"'. Declared in
// xla_ops/cc/core/registry.h (XlaOpsCudaArchsFn); this file includes nothing
// so that every op library can link it.
//
// Tested by tests/test_conformance.py.

#ifndef XLA_OPS_CUDA_ARCHS
#error "the build must define XLA_OPS_CUDA_ARCHS, such as \"8.0 9.0a\""
#endif

extern "C" __attribute__((visibility("default"))) const char*
xla_ops_cuda_archs() {
  return XLA_OPS_CUDA_ARCHS;
}
