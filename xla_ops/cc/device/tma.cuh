// Barriers in shared memory, bulk tensor copies (TMA), and the barriers and
// registers by which warpgroups of one block take different roles, on compute
// capability 9.0a. PTX ISA, "mbarrier", "cp.async.bulk.tensor" and
// "setmaxnreg".
//
// A barrier's phases alternate in parity. A waiter keeps the parity of the
// phase that it waits for, starting with 0; one that waits for a buffer to
// become free starts with 1, which a new barrier lets pass at once.

#ifndef XLA_OPS_CC_DEVICE_TMA_CUH_
#define XLA_OPS_CC_DEVICE_TMA_CUH_

#include <cuda.h>

#include <cstdint>

#include "xla_ops/cc/device/mma.cuh"
#include "xla_ops/cc/device/wgmma.cuh"

namespace xla_ops {

#if XLA_OPS_HAS_WGMMA

__device__ __forceinline__ void InitBarrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier),
               "r"(arrivals)
               : "memory");
}

__device__ __forceinline__ void InitBarrier(uint64_t* barrier, int arrivals) {
  InitBarrier(SharedAddress(barrier), arrivals);
}

// Makes new barriers known to the copy engine; the block's barrier follows.
__device__ __forceinline__ void FenceBarrierInit() {
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}

__device__ __forceinline__ void Arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(barrier)
               : "memory");
}

__device__ __forceinline__ void Arrive(uint64_t* barrier) {
  Arrive(SharedAddress(barrier));
}

// Arrives, and adds to what the phase waits for the bytes of copies.
__device__ __forceinline__ void ArriveExpecting(uint32_t barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier),
      "r"(bytes)
      : "memory");
}

__device__ __forceinline__ void ArriveExpecting(uint64_t* barrier, int bytes) {
  ArriveExpecting(SharedAddress(barrier), bytes);
}

// Waits until the phase of that parity is over, and sees what was written
// before its arrivals.
__device__ __forceinline__ void Wait(uint32_t barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

__device__ __forceinline__ void Wait(uint64_t* barrier, int parity) {
  Wait(SharedAddress(barrier), parity);
}

// Orders this thread's writes to shared memory before reads of the tensor
// cores and the copy engine that follow a barrier.
__device__ __forceinline__ void FenceSharedForAsync() {
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}

__device__ __forceinline__ void PrefetchMap(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(map) : "memory");
}

// Starts the copy of a box of a tensor of rank 5 to shared memory; elements
// outside the tensor become zero. Its bytes count towards `barrier`'s phase.
__device__ __forceinline__ void CopyBox(const CUtensorMap* map,
                                        uint32_t barrier, uint32_t target,
                                        int c0, int c1, int c2, int c3,
                                        int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile"
      ".mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], "
      "[%2];\n" ::"r"(target),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}

__device__ __forceinline__ void CopyBox(const CUtensorMap* map,
                                        uint64_t* barrier, uint32_t target,
                                        int c0, int c1, int c2, int c3,
                                        int c4) {
  CopyBox(map, SharedAddress(barrier), target, c0, c1, c2, c3, c4);
}

// How long what a copy reads should stay in the L2 cache, for CopyBox: first
// to go, as what is read once, or as usual.
__device__ __forceinline__ uint64_t MakeCachePolicy(bool evict_first) {
  uint64_t policy;
  if (evict_first) {
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;\n"
                 : "=l"(policy));
  } else {
    asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;\n"
                 : "=l"(policy));
  }
  return policy;
}

// The same of a matrix, whose inner coordinate is c0.
__device__ __forceinline__ void CopyBox(const CUtensorMap* map,
                                        uint64_t* barrier, uint32_t target,
                                        int c0, int c1, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile"
      ".mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4}], "
      "[%2], %5;\n" ::"r"(target),
      "l"(map), "r"(SharedAddress(barrier)), "r"(c0), "r"(c1), "l"(policy)
      : "memory");
}

// Starts to add floats of shared memory, a multiple of 16 bytes, to as many in
// global memory. Sums of several blocks come about in any order.
__device__ __forceinline__ void AddBytes(float* target, uint32_t source,
                                         int bytes) {
  asm volatile(
      "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 "
      "[%0], [%1], %2;\n"
      "cp.async.bulk.commit_group;\n" ::"l"(__cvta_generic_to_global(target)),
      "r"(source), "r"(bytes)
      : "memory");
}

// Waits until what this thread's AddBytes read may be overwritten.
__device__ __forceinline__ void WaitForAddsToRead() {
  asm volatile("cp.async.bulk.wait_group.read 0;\n" ::: "memory");
}

// Waits until this thread's AddBytes are done.
__device__ __forceinline__ void WaitForAdds() {
  asm volatile("cp.async.bulk.wait_group 0;\n" ::: "memory");
}

// Barrier `id` (1 to 15) of the block: SyncNamed waits until `threads`
// threads have called either.
__device__ __forceinline__ void SyncNamed(int id, int threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void ArriveNamed(int id, int threads) {
  asm volatile("bar.arrive %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}

// Moves registers between warpgroups; all four warps must call.
template <int kRegisters>
__device__ __forceinline__ void DeallocateRegisters() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void AllocateRegisters() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

#endif  // XLA_OPS_HAS_WGMMA

}  // namespace xla_ops

#endif  // XLA_OPS_CC_DEVICE_TMA_CUH_
