// RMSNorm and rotary embedding of queries' and keys' heads and the write of
// keys and values into a paged cache, on CUDA: bound by latency for the tokens
// of a decode step, by memory for those of a prefill.
//
// A head, of queries, keys or values, goes to one place, its own in the result
// or in a cache, and belongs to a few neighbouring lanes, as in
// fused_qk_norm_rope.cu.cc: each holds a vector of its first half and one of
// its second. What a lane needs besides (weight, angles, slot) it loads before
// the sum goes from lane to lane, so that a head waits for memory twice in all:
// for its position, with the head itself, and for the angles of that position.
// Heads that are not whole vectors, are not aligned or are too long for 32
// lanes have a warp each, which reads their elements twice.
//
// Tested by tests/gpu/check_kernels.py and
// tests/ops/test_fused_qk_norm_rope_and_cache.py.

#include "xla_ops/cc/ops/fused_qk_norm_rope_and_cache/fused_qk_norm_rope_and_cache.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <type_traits>

#include "xla_ops/cc/device/cache_copy.h"
#include "xla_ops/cc/device/cache_write.cuh"
#include "xla_ops/cc/device/dtype.cuh"
#include "xla_ops/cc/device/exact_div.h"
#include "xla_ops/cc/device/fast_div.h"
#include "xla_ops/cc/device/launch.h"
#include "xla_ops/cc/device/overlap.cuh"
#include "xla_ops/cc/device/reduce.cuh"
#include "xla_ops/cc/device/rms.cuh"
#include "xla_ops/cc/device/rope.cuh"
#include "xla_ops/cc/device/vector.cuh"
#include "xla_ops/cc/ops/fused_qk_norm_rope_and_cache/fused_qk_norm_rope_and_cache_launch.h"

namespace xla_ops {
namespace {

constexpr int kThreads = 256;

enum class CacheFormat { kSame, kE4M3, kE5M2 };

template <typename T, typename Table>
struct Task {
  const T* qkv;
  T* query;           // [tokens, num_heads_q, head_dim]
  const T* q_weight;  // null without norm, as k_weight is
  const T* k_weight;
  const Table* table;
  const void* positions;
  const int64_t* slot_mapping;
  void* key_cache;
  void* value_cache;
  const float* k_scale;  // null: 1, as where there is no fp8
  const float* v_scale;
  int64_t max_position;
  int64_t row_size;  // of qkv
  int64_t num_slots;
  int64_t page_size;
  int64_t block_stride;
  int64_t page_stride;
  int64_t head_stride;
  int64_t num_cached_tokens;
  int num_heads;    // of all tokens
  int num_heads_q;  // of a token
  int num_kv_heads;
  int head_dim;
  float eps;
  bool positions_are_32_bits;
  CacheFormat format;
  ExactDiv mean_of;     // head_dim elements
  FastDiv token_heads;  // of a token
  FastDiv page;         // page_size
};

// The head that some lanes work on, its position and its slot as they are
// loaded: what follows from them waits for memory.
template <typename T, typename Table>
struct Head {
  const T* x;       // [head_dim]
  const T* weight;  // [head_dim], or null
  int kv_head;      // negative: of queries
  bool is_value;
  int64_t position;  // -1 of values
  int64_t slot;      // in its cache, or among all heads of queries; -1: none

  // `index`: of all heads, in range.
  __device__ static __forceinline__ Head Of(const Task<T, Table>& task,
                                            int index) {
    const int token = task.token_heads.Divide(index);
    const int head = index - token * task.token_heads.value();
    Head of;
    of.x = task.qkv + token * task.row_size + int64_t{head} * task.head_dim;
    of.kv_head = head - task.num_heads_q;
    of.is_value = of.kv_head >= task.num_kv_heads;
    if (of.is_value) of.kv_head -= task.num_kv_heads;
    of.weight = of.kv_head < 0 ? task.q_weight : task.k_weight;
    of.position = -1;
    if (!of.is_value) {
      of.position =
          LoadPosition(task.positions, task.positions_are_32_bits, token);
    }
    of.slot = -1;
    if (of.kv_head < 0) {
      of.slot = int64_t{token} * task.num_heads_q + head;
    } else if (token < task.num_cached_tokens) {
      of.slot = task.slot_mapping[token];
    }
    return of;
  }

  // The position's row of the table, or null where the head is not rotated.
  __device__ __forceinline__ const Table* Row(
      const Task<T, Table>& task) const {
    const bool rotate = position >= 0 && position < task.max_position;
    return rotate ? task.table + position * task.head_dim : nullptr;
  }

  __device__ __forceinline__ bool IsStored(const Task<T, Table>& task) const {
    return kv_head < 0 || (slot >= 0 && slot < task.num_slots);
  }

  // The first element where it is stored.
  __device__ __forceinline__ int64_t Start(const Task<T, Table>& task) const {
    if (kv_head < 0) return slot * task.head_dim;
    const int64_t block = slot < INT32_MAX
                              ? task.page.Divide(static_cast<int>(slot))
                              : slot / task.page_size;
    const int64_t offset = slot - block * task.page_size;
    return block * task.block_stride + offset * task.page_stride +
           kv_head * task.head_stride;
  }

  // Puts a part of it where it is stored, from that element on.
  template <int kSize>
  __device__ __forceinline__ void Store(const Task<T, Table>& task,
                                        int64_t start, float scale,
                                        const Vector<T, kSize>& x) const {
    if (kv_head < 0) {
      StoreGlobal(task.query + start, x);
      return;
    }
    void* const cache = is_value ? task.value_cache : task.key_cache;
    StoreToCache(cache, start, task.format, scale, x);
  }

  // The number that an fp8 cache's elements are divided by.
  __device__ __forceinline__ float CacheScale(
      const Task<T, Table>& task) const {
    const float* scale = is_value ? task.v_scale : task.k_scale;
    return kv_head >= 0 && scale != nullptr ? *scale : 1.0f;
  }
};

// Puts elements into a cache, from its element `start` on.
template <int kSize, typename T>
__device__ __forceinline__ void StoreToCache(void* cache, int64_t start,
                                             CacheFormat format, float scale,
                                             const Vector<T, kSize>& x) {
  if (format == CacheFormat::kSame) {
    StoreGlobal(static_cast<T*>(cache) + start, x);
  } else {
    StoreGlobal(static_cast<uint8_t*>(cache) + start,
                format == CacheFormat::kE4M3
                    ? ToFp8Vector<__NV_E4M3>(x, scale)
                    : ToFp8Vector<__NV_E5M2>(x, scale));
  }
}

// Threads: x is the lane of a head, a power of two of them; y and blockIdx.x
// run over heads. All vectors are aligned, and a half of a head is whole
// vectors, no more than there are lanes (checked by the launcher).
template <typename T, typename Table, bool kNormed, bool kNeox>
__global__ void __launch_bounds__(kThreads)
    FusedQkNormRopeAndCacheKernel(const Task<T, Table> task) {
  constexpr int kWidth = kWideSize<T>;
  using Part = Halves<T, kWidth>;
  using Turn = Angles<Table, kWidth, kNeox>;
  LetNextKernelStart();
  const int index = blockIdx.x * blockDim.y + threadIdx.y;
  const int pairs = task.head_dim / 2;
  const int at = threadIdx.x * kWidth;  // in each half
  const bool active = index < task.num_heads && at < pairs;
  Head<T, Table> head = {};
  Part x;
  Part weight;
  Turn angles;
  const Table* row = nullptr;
  int64_t start = -1;  // of where it is stored; negative: nowhere
  float cache_scale = 1.0f;
  float sum = 0.0f;
  const auto find_start = [&] {
    if (head.IsStored(task)) start = head.Start(task) + at;
  };
  if (active) {
    head = Head<T, Table>::Of(task, index);
    x = Part::Load(head.x, at, pairs);
    cache_scale = head.CacheScale(task);
    if (!head.is_value) {
      if constexpr (kNormed) weight = Part::Load(head.weight, at, pairs);
      row = head.Row(task);
      angles = row != nullptr ? Turn::Load(row, at, pairs) : Turn::None();
    }
    if constexpr (kNormed) {
      find_start();  // while the head is on its way
      sum = SumOfSquares(x.low) + SumOfSquares(x.high);
    }
    KeepPacked(x.low);
    KeepPacked(x.high);
  }
  if constexpr (kNormed) sum = WarpSum(sum, blockDim.x);
  if (!active) return;
  if (!head.is_value) {
    if constexpr (kNormed) {
      const float scale = RootMeanSquareScale(sum, task.mean_of, task.eps);
      NormAndRotate(weight, scale, angles, x);
    } else if (row != nullptr) {
      RotateHalves(angles, x);
    }
  }
  // Without a sum to wait for, the registers are worth more.
  if constexpr (!kNormed) find_start();
  if (start < 0) return;
  head.Store(task, start, cache_scale, x.low);
  head.Store(task, start + pairs, cache_scale, x.high);
}

// Any head, of a warp. Threads: x is the lane, y and blockIdx.x run over heads.
template <typename T, typename Table>
__global__ void __launch_bounds__(kThreads)
    WarpPerHeadKernel(const Task<T, Table> task, bool is_neox) {
  LetNextKernelStart();
  const int index = blockIdx.x * blockDim.y + threadIdx.y;
  if (index >= task.num_heads) return;
  const auto head = Head<T, Table>::Of(task, index);
  if (!head.IsStored(task)) return;
  const int64_t start = head.Start(task);
  const float cache_scale = head.CacheScale(task);
  const auto store = [&](int d, T x) {
    head.Store(task, start + d, cache_scale, Vector<T, 1>{x});
  };
  if (head.is_value) {
    for (int d = threadIdx.x; d < task.head_dim; d += 32) store(d, head.x[d]);
    return;
  }
  const Table* row = head.Row(task);
  float scale = 1.0f;
  if (head.weight != nullptr) {
    float sum = 0.0f;
    for (int d = threadIdx.x; d < task.head_dim; d += 32) {
      sum += ToFloat(head.x[d]) * ToFloat(head.x[d]);
    }
    scale = RootMeanSquareScale(WarpSum(sum), task.mean_of, task.eps);
  }
  const int pairs = task.head_dim / 2;
  for (int i = threadIdx.x; i < pairs; i += 32) {
    const int a = is_neox ? i : 2 * i;
    const int b = is_neox ? i + pairs : 2 * i + 1;
    T x = head.x[a];
    T y = head.x[b];
    if (head.weight != nullptr) {
      NormAndRotatePair(head.x, head.weight, scale, row, i, pairs, a, b, &x,
                        &y);
    } else if (row != nullptr) {
      const T cos = FromFloat<T>(ToFloat(row[i]));
      const T sin = FromFloat<T>(ToFloat(row[pairs + i]));
      RotateRounded(cos, sin, &x, &y);
    }
    store(a, x);
    store(b, y);
  }
}

// Debug only: says which tokens the kernels above skip for their slot.
// Negative slots are padding and no error.
__global__ void ReportSlotsKernel(const int64_t* slot_mapping,
                                  int64_t num_tokens, int64_t num_slots) {
  const int64_t token = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (token >= num_tokens || slot_mapping[token] < num_slots) return;
  printf(
      "xla_ops: fused_qk_norm_rope_and_cache: slot_mapping[%lld] must be less "
      "than %lld, got %lld; skipped\n",
      static_cast<long long>(token), static_cast<long long>(num_slots),
      static_cast<long long>(slot_mapping[token]));
}

// Whether a lane's vectors of `width` elements are aligned wherever they lie,
// and a half of a head is whole ones, for 32 lanes at most.
bool VectorsFit(const FusedQkNormRopeAndCacheParams& params, int64_t width) {
  const int64_t cached = width * SizeOf(params.cache_dtype);
  return params.head_dim % (2 * width) == 0 &&
         params.head_dim / 2 / width <= 32 && IsAligned(params.qkv, 16) &&
         IsAligned(params.query, 16) && IsAligned(params.q_weight, 16) &&
         IsAligned(params.k_weight, 16) &&
         IsAligned(params.cos_sin_cache, 16) &&
         IsAligned(params.key_cache, cached) &&
         IsAligned(params.value_cache, cached) &&
         params.block_stride % width == 0 && params.page_stride % width == 0 &&
         params.head_stride % width == 0;
}

template <typename T, typename Table>
cudaError_t LaunchHeads(cudaStream_t stream,
                        const FusedQkNormRopeAndCacheParams& params,
                        const Task<T, Table>& task) {
  constexpr int kWidth = kWideSize<T>;
  const bool wide = VectorsFit(params, kWidth);
  const int64_t lanes = wide ? params.head_dim / 2 / kWidth : 32;
  const dim3 block = RowBlock(lanes, 32, kThreads);
  const auto blocks =
      static_cast<unsigned>(CeilDivide(task.num_heads, block.y));
  if (!wide) {
    return LaunchKernel<WarpPerHeadKernel<T, Table>>(stream, blocks, block,
                                                     task, params.is_neox);
  }
  const auto launch = [&](auto normed) {
    constexpr bool kNormed = decltype(normed)::value;
    return params.is_neox
               ? LaunchKernel<
                     FusedQkNormRopeAndCacheKernel<T, Table, kNormed, true>>(
                     stream, blocks, block, task)
               : LaunchKernel<
                     FusedQkNormRopeAndCacheKernel<T, Table, kNormed, false>>(
                     stream, blocks, block, task);
  };
  return task.q_weight != nullptr ? launch(std::true_type())
                                  : launch(std::false_type());
}

template <typename T, typename Table>
cudaError_t Launch(cudaStream_t stream,
                   const FusedQkNormRopeAndCacheParams& params) {
  const int64_t heads = NumHeads(params);
  // Heads are counted in int, with room for a block's.
  static_assert(kMaxCudaTokenElements <= INT32_MAX - kThreads);
  const int64_t most_tokens = (INT32_MAX - kThreads) / heads;
  Task<T, Table> task;
  task.q_weight = static_cast<const T*>(params.q_weight);
  task.k_weight = static_cast<const T*>(params.k_weight);
  task.table = static_cast<const Table*>(params.cos_sin_cache);
  task.key_cache = params.key_cache;
  task.value_cache = params.value_cache;
  task.format = params.cache_dtype == params.dtype       ? CacheFormat::kSame
                : params.cache_dtype == DType::kF8E4M3FN ? CacheFormat::kE4M3
                                                         : CacheFormat::kE5M2;
  const bool is_scaled = task.format != CacheFormat::kSame;
  task.k_scale = is_scaled ? params.k_scale : nullptr;
  task.v_scale = is_scaled ? params.v_scale : nullptr;
  task.max_position = params.max_position;
  task.row_size = heads * params.head_dim;
  task.num_slots = params.num_blocks * params.page_size;
  task.page_size = params.page_size;
  task.block_stride = params.block_stride;
  task.page_stride = params.page_stride;
  task.head_stride = params.head_stride;
  task.num_heads_q = static_cast<int>(params.num_heads);
  task.num_kv_heads = static_cast<int>(params.num_kv_heads);
  task.head_dim = static_cast<int>(params.head_dim);
  task.eps = params.eps;
  task.mean_of = ExactDiv(static_cast<float>(params.head_dim));
  task.positions_are_32_bits = params.positions_dtype == DType::kS32;
  task.token_heads = FastDiv(heads);
  task.page = FastDiv(std::max<int64_t>(1, params.page_size));
  // One launch, but for gigantic tensors.
  for (int64_t first = 0; first < params.num_tokens; first += most_tokens) {
    const int64_t tokens = std::min(most_tokens, params.num_tokens - first);
    task.num_heads = static_cast<int>(tokens * heads);
    task.num_cached_tokens = params.num_cached_tokens - first;
    task.qkv = static_cast<const T*>(params.qkv) + first * task.row_size;
    task.query = static_cast<T*>(params.query) +
                 first * params.num_heads * params.head_dim;
    task.positions = static_cast<const char*>(params.positions) +
                     first * SizeOf(params.positions_dtype);
    task.slot_mapping = params.slot_mapping + first;
    const cudaError_t error = LaunchHeads(stream, params, task);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t LaunchFusedQkNormRopeAndCache(
    cudaStream_t stream, const FusedQkNormRopeAndCacheParams& params) {
  cudaError_t error = CopyCaches(stream, params.copies);
  if (error != cudaSuccess) return error;
  if (params.debug && params.num_cached_tokens > 0) {
    const int64_t blocks = CeilDivide(params.num_cached_tokens, kThreads);
    error = LaunchKernel<ReportSlotsKernel>(
        stream, static_cast<unsigned>(blocks), kThreads, params.slot_mapping,
        params.num_cached_tokens, params.num_blocks * params.page_size);
    if (error != cudaSuccess) return error;
  }
  if (params.num_tokens == 0 || NumHeads(params) == 0) return cudaSuccess;
  return DispatchCudaFloat(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return params.table_dtype == DType::kF32 ? Launch<T, float>(stream, params)
                                             : Launch<T, T>(stream, params);
  });
}

}  // namespace xla_ops
