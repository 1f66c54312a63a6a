// Collectives between processes of one host, through memory that they share.
//
// torch_xla's CPU client has no collectives between processes. With this
// handler a model that is split over processes, a device each, runs on the CPU
// as it does on GPUs: the same programs, with a custom call where a GPU has
// NCCL's all-reduce.
//
//   xla_ops.host_collective(input, after) -> out
//     gathers = false: out = the sum over the ranks' inputs, added up in fp32
//       in the order of ranks and rounded once: the same bits on every rank
//     gathers = true: out [size, ...] = the ranks' inputs
//     after: any array, not read: the call waits for what computes it
//
// Every rank has to make the same calls in the same order; `call` numbers them,
// so that another order is an error and not another rank's numbers. A rank that
// ends, or does not come in time, is an error of the others that names it.
//
// Tested by host_collective_test.cc.

#ifndef XLA_OPS_CC_OPS_HOST_COLLECTIVE_HOST_COLLECTIVE_H_
#define XLA_OPS_CC_OPS_HOST_COLLECTIVE_HOST_COLLECTIVE_H_

#include <cstdint>

#ifdef __cplusplus
extern "C" {
#endif

// How this process joins a group.
typedef struct {
  int64_t struct_size;
  // A file of at least HostGroupBytes(size, slot_bytes) bytes, zeroed
  // before any rank joins. It has to stay open, and to be opened here once: a
  // lock on it, which ends with the process, shows that the rank lives.
  int64_t fd;
  int64_t rank;
  int64_t size;
  // Of the piece that a rank hands over at a time.
  int64_t slot_bytes;
  // How long to wait for another rank.
  int64_t timeout_ms;
} XlaOpsHostGroupRequest;

typedef struct {
  int64_t struct_size;
  // The handler's attribute.
  int64_t group;
} XlaOpsHostGroup;

#define XLA_OPS_HOST_GROUP_MAX_RANKS 64

// Returns what is wrong with the request, or null; groups are never left.
__attribute__((visibility("default"))) const char* xla_ops_host_group_join(
    const XlaOpsHostGroupRequest* request, XlaOpsHostGroup* group);

#ifdef __cplusplus
}  // extern "C"

namespace xla_ops {

constexpr int64_t HostGroupBytes(int64_t size, int64_t slot_bytes) {
  return 64 * XLA_OPS_HOST_GROUP_MAX_RANKS + size * slot_bytes;
}

}  // namespace xla_ops
#endif

#endif  // XLA_OPS_CC_OPS_HOST_COLLECTIVE_HOST_COLLECTIVE_H_
