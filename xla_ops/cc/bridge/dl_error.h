// Why dlopen() or dlsym() failed.

#ifndef XLA_OPS_CC_BRIDGE_DL_ERROR_H_
#define XLA_OPS_CC_BRIDGE_DL_ERROR_H_

#include <dlfcn.h>

#include <string>

namespace xla_ops {

inline std::string LastDlError() {
  const char* reason = dlerror();
  return reason == nullptr ? "unknown reason" : reason;
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_BRIDGE_DL_ERROR_H_
