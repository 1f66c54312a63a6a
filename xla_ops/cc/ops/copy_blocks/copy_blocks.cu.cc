// Copies blocks of a paged cache on CUDA: bound by memory. A block is cut
// into units, the widest piece that its runs and strides allow, up to 16
// bytes.
//
// Pairs run in parallel unless they share a block. Each thread block looks
// through the mapping for pairs that share one with its own; the thread
// blocks of the first pair that has such a conflict copy all that have, in
// order, and the others' leave. A thread handles the same units of every
// pair, so that this order needs no barrier. Conflicts are rare, and without
// them the search reads the mapping once a thread block, from the L2 cache.
//
// Tested by tests/gpu/check_elementwise.py and
// tests/ops/test_copy_blocks.py.

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
  int64_t num_pairs;
  int64_t num_blocks;
  int64_t block_stride;
  int64_t outer_stride;
  int64_t inner_size;
  int64_t inner_stride;
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
__device__ __forceinline__ bool IsCopy(Pair pair, int64_t num_blocks) {
  return pair.source >= 0 && pair.source < num_blocks && pair.target >= 0 &&
         pair.target < num_blocks && pair.source != pair.target;
}

// Whether another pair reads or writes what pair `p` writes, or writes what
// it reads. All threads of the block must call, with the same `p`.
__device__ bool Conflicts(const int64_t* mapping, const Geometry& geometry,
                          int64_t p) {
  const Pair pair = LoadPair(mapping, p);
  bool found = false;
  for (int64_t q = threadIdx.x; q < geometry.num_pairs; q += blockDim.x) {
    const Pair other = LoadPair(mapping, q);
    found |= q != p && IsCopy(other, geometry.num_blocks) &&
             (other.target == pair.source || other.target == pair.target ||
              other.source == pair.target);
  }
  return __syncthreads_or(found);
}

// 64-bit division costs some 100 instructions; units of a block fit in 32
// bits (checked by the launcher).
template <typename Unit>
__device__ void CopyPair(Unit* cache, const Geometry& geometry, Pair pair) {
  const int64_t from = pair.source * geometry.block_stride;
  const int64_t to = pair.target * geometry.block_stride;
  const auto run_units = static_cast<uint32_t>(geometry.run_units);
  const auto inner_size = static_cast<uint32_t>(geometry.inner_size);
  const auto units = static_cast<uint32_t>(geometry.block_units);
  for (uint32_t unit = blockIdx.y * blockDim.x + threadIdx.x; unit < units;
       unit += blockDim.x * gridDim.y) {
    const uint32_t run = unit / run_units;
    const uint32_t outer = run / inner_size;
    const int64_t at = outer * geometry.outer_stride +
                       (run - outer * inner_size) * geometry.inner_stride +
                       (unit - run * run_units);
    cache[to + at] = cache[from + at];
  }
}

// Threads: blockIdx.x is the pair, x and blockIdx.y run over the units of a
// block. `cache`: unit-aligned (checked by the launcher), block 0.
template <typename Unit>
__global__ void __launch_bounds__(kThreads)
    CopyBlocksKernel(Unit* cache, const int64_t* __restrict__ mapping,
                     const Geometry geometry) {
  const int64_t p = blockIdx.x;
  const Pair pair = LoadPair(mapping, p);
  if (!IsCopy(pair, geometry.num_blocks)) return;
  if (!Conflicts(mapping, geometry, p)) {
    CopyPair(cache, geometry, pair);
    return;
  }
  for (int64_t q = 0; q < p; ++q) {
    if (IsCopy(LoadPair(mapping, q), geometry.num_blocks) &&
        Conflicts(mapping, geometry, q)) {
      return;
    }
  }
  for (int64_t q = p; q < geometry.num_pairs; ++q) {
    const Pair next = LoadPair(mapping, q);
    if (IsCopy(next, geometry.num_blocks) && Conflicts(mapping, geometry, q)) {
      CopyPair(cache, geometry, next);
    }
  }
}

// Debug only: says which pairs the kernel above skips, padding apart.
__global__ void ReportPairsKernel(const int64_t* mapping, int64_t num_pairs,
                                  int64_t num_blocks) {
  const int64_t p = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (p >= num_pairs) return;
  const Pair pair = LoadPair(mapping, p);
  if (pair.source < 0 || pair.target < 0) return;
  if (pair.source < num_blocks && pair.target < num_blocks) return;
  printf(
      "xla_ops: copy_blocks: block_mapping[%lld] must be less than %lld, got "
      "[%lld, %lld]; skipped\n",
      static_cast<long long>(p), static_cast<long long>(num_blocks),
      static_cast<long long>(pair.source), static_cast<long long>(pair.target));
}

// Whether every run is made of whole units of `size` bytes, aligned.
bool UnitsFit(const CopyBlocksParams& params, int64_t size) {
  return params.run_size % size == 0 && params.block_stride % size == 0 &&
         params.outer_stride % size == 0 && params.inner_stride % size == 0 &&
         IsAligned(params.cache, size);
}

template <typename Unit>
cudaError_t LaunchUnits(cudaStream_t stream, const CopyBlocksParams& params) {
  constexpr int64_t kSize = sizeof(Unit);
  Geometry geometry;
  geometry.num_pairs = params.num_pairs;
  geometry.num_blocks = params.num_blocks;
  geometry.block_stride = params.block_stride / kSize;
  geometry.outer_stride = params.outer_stride / kSize;
  geometry.inner_size = params.inner_size;
  geometry.inner_stride = params.inner_stride / kSize;
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
      stream, grid, kThreads, reinterpret_cast<Unit*>(params.cache),
      params.block_mapping, geometry);
}

}  // namespace

cudaError_t LaunchCopyBlocks(cudaStream_t stream,
                             const CopyBlocksParams& params) {
  if (params.num_pairs == 0) return cudaSuccess;
  if (params.debug) {
    const int64_t blocks = CeilDivide(params.num_pairs, kThreads);
    const cudaError_t error = LaunchKernel<ReportPairsKernel>(
        stream, static_cast<unsigned>(blocks), kThreads, params.block_mapping,
        params.num_pairs, params.num_blocks);

    if (error != cudaSuccess) return error;
  }
  if (IsEmpty(params)) return cudaSuccess;
  return DispatchUnit<1>(
      [&](int size) { return UnitsFit(params, size); },
      [&](auto unit) { return LaunchUnits<decltype(unit)>(stream, params); });
}

}  // namespace xla_ops
