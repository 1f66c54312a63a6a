// Collectives between processes of one host, through the memory of their GPUs.
//
// NCCL's all-reduce of a decode step's few rows takes as long as the products
// between: XLA launches it by itself, between graphs. Here it is a kernel like
// any other of the step's graph: it stores this rank's rows into the others'
// memory, waits for theirs in its own, and adds up.
//
//   xla_ops.peer_collective(input, after) -> out
//     gathers = false: out = the sum over the ranks' inputs, added up in fp32
//       in the order of ranks and rounded once: the same bits on every rank;
//       fp32, fp16 or bf16
//     gathers = true: out [size, ...] = the ranks' inputs, of any type
//     input: of a multiple of 8 bytes, at most slot_bytes
//     after: any array, not read: the call waits for what computes it
//
//   xla_ops.peer_add_rms_norm(input, after, residual, weight)
//       -> (out, residual_out)
//     fused_add_rms_norm of the sum of the ranks' inputs, rounded as by the two
//     calls; input [..., hidden], of at most 16 KB a row
//
// Every rank has to make the same calls in the same order, one after the
// other: a program has each after the one before. A rank that does not come in
// time is a fault of the others' device, as with NCCL.
//
// Run by tests/gpu/check_peers.py.

#ifndef XLA_OPS_CC_OPS_PEER_COLLECTIVE_PEER_COLLECTIVE_H_
#define XLA_OPS_CC_OPS_PEER_COLLECTIVE_PEER_COLLECTIVE_H_

#include <cstdint>

#define XLA_OPS_PEER_GROUP_MAX_RANKS 8
// int64 fields of a cudaIpcMemHandle_t.
#define XLA_OPS_PEER_HANDLE_WORDS 8

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  int64_t struct_size;
  int64_t device;  // this process's, as CUDA counts
  int64_t rank;
  int64_t size;
  // Of the largest input: a multiple of 8.
  int64_t slot_bytes;
  // How long a kernel waits for another rank.
  int64_t timeout_ms;
} XlaOpsPeerGroupRequest;

typedef struct {
  int64_t struct_size;
  int64_t group;  // the handler's attribute, once the group is open
  int64_t handle[XLA_OPS_PEER_HANDLE_WORDS];  // for the other ranks
} XlaOpsPeerGroup;

typedef struct {
  int64_t struct_size;
  int64_t group;
  // Of every rank; those beyond the group's size are not read.
  int64_t handles[XLA_OPS_PEER_GROUP_MAX_RANKS][XLA_OPS_PEER_HANDLE_WORDS];
} XlaOpsPeerHandles;

typedef struct {
  int64_t struct_size;
  int64_t ready;  // 1
} XlaOpsPeerGroupReady;

// Takes the memory that other ranks store to. Both return what is wrong, until
// the thread's next call, or null; groups are never left.
__attribute__((visibility("default"))) const char* xla_ops_peer_group_make(
    const XlaOpsPeerGroupRequest* request, XlaOpsPeerGroup* group);

// Opens the other ranks' memory. No rank may make a call before all have
// returned from this.
__attribute__((visibility("default"))) const char* xla_ops_peer_group_open(
    const XlaOpsPeerHandles* handles, XlaOpsPeerGroupReady* ready);

#ifdef __cplusplus
}  // extern "C"
#endif

#endif  // XLA_OPS_CC_OPS_PEER_COLLECTIVE_PEER_COLLECTIVE_H_
