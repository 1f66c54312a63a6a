// Clusters of blocks and each other's shared memory, on compute capability
// 9.0 and later. PTX ISA, "barrier.cluster", "mapa" and "ld". A launch without
// clusters is one of clusters of one block.

#ifndef XLA_OPS_CC_DEVICE_CLUSTER_CUH_
#define XLA_OPS_CC_DEVICE_CLUSTER_CUH_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "xla_ops/cc/device/overlap.cuh"

// Kernels for several architectures keep what needs clusters behind this.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define XLA_OPS_HAS_CLUSTERS 1
#else
#define XLA_OPS_HAS_CLUSTERS 0
#endif

namespace xla_ops {

// A launch whose blocks form clusters, for cudaLaunchKernelExC. `overlaps`:
// while the kernel before it may still run (overlap.cuh).
struct ClusterLaunch {
  ClusterLaunch(cudaStream_t stream, dim3 blocks, dim3 cluster, int threads,
                int shared_bytes, bool overlaps = false) {
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim.x = cluster.x;
    attributes[0].val.clusterDim.y = cluster.y;
    attributes[0].val.clusterDim.z = cluster.z;
    attributes[1] = OverlapAttribute();
    config.gridDim = blocks;
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = overlaps ? 2 : 1;
  }
  ClusterLaunch(const ClusterLaunch&) = delete;
  ClusterLaunch& operator=(const ClusterLaunch&) = delete;

  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = {};
};

#if XLA_OPS_HAS_CLUSTERS

__device__ __forceinline__ int ClusterRank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;\n" : "=r"(rank));
  return static_cast<int>(rank);
}

__device__ __forceinline__ int ClusterRanks() {
  uint32_t ranks;
  asm("mov.u32 %0, %%cluster_nctarank;\n" : "=r"(ranks));
  return static_cast<int>(ranks);
}

// Waits for all threads of the cluster, whose writes to shared memory can be
// seen after it.
__device__ __forceinline__ void SyncCluster() {
  __syncwarp();  // the instructions are for whole warps
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;\n" ::
          : "memory");
}

// The address in the cluster's shared memory of what lies at `address` of
// this block's own, in that of `rank`.
__device__ __forceinline__ uint32_t MapToRank(uint32_t address, int rank) {
  uint32_t mapped;
  asm("mapa.shared::cluster.u32 %0, %1, %2;\n"
      : "=r"(mapped)
      : "r"(address), "r"(rank));
  return mapped;
}

// Reads four floats, aligned to 16 bytes.
__device__ __forceinline__ void LoadFromCluster(uint32_t address,
                                                float* values) {
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];\n"
               : "=f"(values[0]), "=f"(values[1]), "=f"(values[2]),
                 "=f"(values[3])
               : "r"(address)
               : "memory");
}

// Reads two, aligned to 8 bytes.
__device__ __forceinline__ float2 LoadPairFromCluster(uint32_t address) {
  float2 pair;
  asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];\n"
               : "=f"(pair.x), "=f"(pair.y)
               : "r"(address)
               : "memory");
  return pair;
}

#endif  // XLA_OPS_HAS_CLUSTERS

}  // namespace xla_ops

#endif  // XLA_OPS_CC_DEVICE_CLUSTER_CUH_
