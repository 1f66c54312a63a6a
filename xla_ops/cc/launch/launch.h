// Launches a kernel that a user brought: what `xla_ops.launch_kernel` does.
//
// Attributes of the call, which Python writes (xla_ops/py/extend):
//
//   op            the user's name of it, for error texts
//   kernel        the kernel's name in its code
//   code          the digest of the code (code.h)
//   code_bytes    i64: its size
//   grid          "x y z", blocks; with clusters a multiple of their size
//   block         "x y z", threads
//   cluster       "x y z", blocks; "1 1 1": no clusters
//   shared_bytes  i64: dynamic shared memory of a block
//   alignment     i64: of every buffer, in bytes, since the code relies on it
//   guarded       "" but in debug mode: a word for each result that is computed
//   in
//                 a scratch result, "1:3", which has kGuardBytes more before
//                 and behind. Where they changed the call fails.
//   parameters    what the kernel is given, in its order, a word each:
//                   a2          operand 2
//                   r0          result 0
//                   null        a null pointer
//                   v0000803f   a value, its bytes in hexadecimal, in the order
//                               of memory; 1, 2, 4 or 8 of them
//
// Tested by launch_test.cc.

#ifndef XLA_OPS_CC_LAUNCH_LAUNCH_H_
#define XLA_OPS_CC_LAUNCH_LAUNCH_H_

#include <cstdint>
#include <string_view>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/launch/code.h"
#include "xla_ops/cc/launch/driver.h"

namespace xla_ops {

inline constexpr int64_t kGuardBytes = 256;

struct LaunchAttributes {
  std::string_view op;
  std::string_view kernel;
  std::string_view code;
  int64_t code_bytes = 0;
  std::string_view grid;
  std::string_view block;
  std::string_view cluster;
  int64_t shared_bytes = 0;
  int64_t alignment = 1;
  std::string_view guarded;
  std::string_view parameters;
};

// Loads the kernel on the current device, before any launch.
::xla::ffi::Error PrepareKernel(const CuDriver& driver, CodeTable& table,
                                const LaunchAttributes& call);

// Queues the kernel on `stream`, of the current device.
::xla::ffi::Error LaunchUserKernel(const CuDriver& driver, CodeTable& table,
                                   const LaunchAttributes& call, void* stream,
                                   ::xla::ffi::RemainingArgs operands,
                                   ::xla::ffi::RemainingRets results);

}  // namespace xla_ops

#endif  // XLA_OPS_CC_LAUNCH_LAUNCH_H_
