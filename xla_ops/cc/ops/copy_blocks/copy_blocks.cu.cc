// Copies blocks of a paged cache, to others of it or to another cache, on CUDA:
// bound by memory. A block is cut into units, the widest piece that its runs
// and strides allow, up to 16 bytes.
//
// Pairs run in parallel unless they share a block. Each thread block looks
// through the mapping for pairs that share one with its own; the thread
// blocks of the first pair that has such a conflict copy all that have, in
// order, and the others' leave. A thread handles the same units of every
// pair, so that this order needs no barrier. Conflicts are rare, and without
// them the search reads the mapping once a thread block, from the L2 cache.
//
// Tested by tests/gpu/check_elementwise.py, tests/ops/test_copy_blocks.py and
// tests/ops/test_swap_blocks.py.

#include "xla_ops/cc/ops/copy_blocks/copy_blocks.h"

#include <cstdint>
#include <cstdio>

#include "xla_ops/cc/device/launch.h"
#include "xla_ops/cc/device/vector.cuh"
#include "xla_ops/cc/ops/copy_blocks/copy_blocks_launch.h"

namespace xla_ops {
namespace {

constexpr int kThreads = 256;
// Thread blocks that fill any GPU; beyond it each thread copies several
// units, so that the mapping is searched less often.
constexpr int64_t kManyBlocks = 4096;

// Sizes and strides in units.
struct Geometry {
  bool within_one;
  int64_t num_pairs;
  int64_t num_source_blocks;
  int64_t num_target_blocks;
  BlockStrides source_strides;
  BlockStrides target_strides;
  int64_t inner_size;
  int64_t run_units;
  int64_t block_units;  // of one block, all runs together
};

struct Pair {
  int64_t source;
  int64_t target;
};

__device__ __forceinline__ Pair LoadPair(const int64_t* mapping, int64_t p) {
  return {mapping[2 * p], mapping[2 * p + 1]};
}

// Whether the pair copies anything.
__device__ __forceinline__ bool IsCopy(Pair pair, const Geometry& geometry) {
  return pair.source >= 0 && pair.source < geometry.num_source_blocks &&
         pair.target >= 0 && pair.target < geometry.num_target_blocks &&
         !(geometry.within_one && pair.source == pair.target);
}

// Whether another pair reads or writes what pair `p` writes, or writes what
// it reads; what one cache gives and another gets are apart. All threads of the
// block must call, with the same `p`.
__device__ bool Conflicts(const int64_t* mapping, const Geometry& geometry,
                          int64_t p) {
  const Pair pair = LoadPair(mapping, p);
  bool found = false;
  for (int64_t q = threadIdx.x; q < geometry.num_pairs; q += blockDim.x) {
    const Pair other = LoadPair(mapping, q);
    found |= q != p && IsCopy(other, geometry) &&
             (other.target == pair.target ||
              (geometry.within_one &&
               (other.target == pair.source || other.source == pair.target)));
  }
  return __syncthreads_or(found);
}

// 64-bit division costs some 100 instructions; units of a block fit in 32
// bits (checked by the launcher).
template <typename Unit>
__device__ void CopyPair(const Unit* source, Unit* target,
                         const Geometry& geometry, Pair pair) {
  const BlockStrides& from = geometry.source_strides;
  const BlockStrides& to = geometry.target_strides;
  source += pair.source * from.block;
  target += pair.target * to.block;
  const auto run_units = static_cast<uint32_t>(geometry.run_units);
  const auto inner_size = static_cast<uint32_t>(geometry.inner_size);
  const auto units = static_cast<uint32_t>(geometry.block_units);
  for (uint32_t unit = blockIdx.y * blockDim.x + threadIdx.x; unit < units;
       unit += blockDim.x * gridDim.y) {
    const uint32_t run = unit / run_units;
    const uint32_t outer = run / inner_size;
    const uint32_t inner = run - outer * inner_size;
    const uint32_t in_run = unit - run * run_units;
    target[outer * to.outer + inner * to.inner + in_run] =
        source[outer * from.outer + inner * from.inner + in_run];
  }
}

// Threads: blockIdx.x is the pair, x and blockIdx.y run over the units of a
// block. `source`, `target`: unit-aligned (checked by the launcher), block 0.
template <typename Unit>
__global__ void __launch_bounds__(kThreads)
    CopyBlocksKernel(const Unit* source, Unit* target,
                     const int64_t* __restrict__ mapping,
                     const Geometry geometry) {
  const int64_t p = blockIdx.x;
  const Pair pair = LoadPair(mapping, p);
  if (!IsCopy(pair, geometry)) return;
  if (!Conflicts(mapping, geometry, p)) {
    CopyPair(source, target, geometry, pair);
    return;
  }
  for (int64_t q = 0; q < p; ++q) {
    if (IsCopy(LoadPair(mapping, q), geometry) &&
        Conflicts(mapping, geometry, q)) {
      return;
    }
  }
  for (int64_t q = p; q < geometry.num_pairs; ++q) {
    const Pair next = LoadPair(mapping, q);
    if (IsCopy(next, geometry) && Conflicts(mapping, geometry, q)) {
      CopyPair(source, target, geometry, next);
    }
  }
}

// Debug only: says which pairs the kernel above skips, padding apart.
__global__ void ReportPairsKernel(const int64_t* mapping, int64_t num_pairs,
                                  int64_t num_source_blocks,
                                  int64_t num_target_blocks, bool within_one) {
  const int64_t p = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (p >= num_pairs) return;
  const Pair pair = LoadPair(mapping, p);
  if (pair.source < 0 || pair.target < 0) return;
  if (pair.source < num_source_blocks && pair.target < num_target_blocks) {
    return;
  }
  printf(
      "xla_ops: %s: block_mapping[%lld] must be less than [%lld, %lld], got "
      "[%lld, %lld]; skipped\n",
      within_one ? "copy_blocks" : "swap_blocks", static_cast<long long>(p),
      static_cast<long long>(num_source_blocks),
      static_cast<long long>(num_target_blocks),
      static_cast<long long>(pair.source), static_cast<long long>(pair.target));
}

// Whether every run is made of whole units of `size` bytes, aligned.
bool UnitsFit(const CopyBlocksParams& params, int64_t size) {
  const auto fit = [size](const BlockStrides& strides, const void* cache) {
    return strides.block % size == 0 && strides.outer % size == 0 &&
           strides.inner % size == 0 && IsAligned(cache, size);
  };
  return params.run_size % size == 0 &&
         fit(params.source_strides, params.source) &&
         fit(params.target_strides, params.target);
}

BlockStrides InUnits(const BlockStrides& strides, int64_t size) {
  return {strides.block / size, strides.outer / size, strides.inner / size};
}

template <typename Unit>
cudaError_t LaunchUnits(cudaStream_t stream, const CopyBlocksParams& params) {
  constexpr int64_t kSize = sizeof(Unit);
  Geometry geometry;
  geometry.within_one = params.within_one;
  geometry.num_pairs = params.num_pairs;
  geometry.num_source_blocks = params.num_source_blocks;
  geometry.num_target_blocks = params.num_target_blocks;
  geometry.source_strides = InUnits(params.source_strides, kSize);
  geometry.target_strides = InUnits(params.target_strides, kSize);
  geometry.inner_size = params.inner_size;
  geometry.run_units = params.run_size / kSize;
  geometry.block_units =
      params.outer_size * params.inner_size * geometry.run_units;
  // Units are counted in 32 bits, with room for one more step of the grid.
  static_assert(kMaxCudaBlockBytes <= UINT32_MAX - kThreads * kMaxGridY);
  static_assert(kMaxCudaPairs <= kMaxGridX);
  const dim3 grid(static_cast<unsigned>(params.num_pairs),
                  BlocksPerRow(CeilDivide(geometry.block_units, kThreads),
                               params.num_pairs, kManyBlocks));
  return LaunchKernel<CopyBlocksKernel<Unit>>(
      stream, grid, kThreads, reinterpret_cast<const Unit*>(params.source),
      reinterpret_cast<Unit*>(params.target), params.block_mapping, geometry);
}

}  // namespace

cudaError_t LaunchCopyBlocks(cudaStream_t stream,
                             const CopyBlocksParams& params) {
  if (params.num_pairs == 0) return cudaSuccess;
  if (params.debug) {
    const int64_t blocks = CeilDivide(params.num_pairs, kThreads);
    const cudaError_t error = LaunchKernel<ReportPairsKernel>(
        stream, static_cast<unsigned>(blocks), kThreads, params.block_mapping,
        params.num_pairs, params.num_source_blocks, params.num_target_blocks,
        params.within_one);

    if (error != cudaSuccess) return error;
  }
  if (IsEmpty(params)) return cudaSuccess;
  return DispatchUnit<1>(
      [&](int size) { return UnitsFit(params, size); },
      [&](auto unit) { return LaunchUnits<decltype(unit)>(stream, params); });
}

}  // namespace xla_ops
