// RMSNorm and rotary embedding of queries' and keys' heads on CUDA, in place:
// bound by memory.
//
// A head belongs to a few neighbouring lanes, each of which holds a vector of
// its first half and one of its second: of 128 16-bit elements 8 lanes, so that
// a warp has four heads. Pairs are then in one thread in either order, and only
// the sum of squares goes from lane to lane. Heads that are not whole vectors,
// are not aligned or are too long for 32 lanes have a warp each, which reads
// their elements twice.
//
// Tested by tests/gpu/check_elementwise.py and
// tests/ops/test_fused_qk_norm_rope.py.

#include "xla_ops/cc/ops/fused_qk_norm_rope/fused_qk_norm_rope.h"

#include <algorithm>
#include <cstdint>

#include "xla_ops/cc/device/dtype.cuh"
#include "xla_ops/cc/device/exact_div.h"
#include "xla_ops/cc/device/fast_div.h"
#include "xla_ops/cc/device/launch.h"
#include "xla_ops/cc/device/reduce.cuh"
#include "xla_ops/cc/device/rms.cuh"
#include "xla_ops/cc/device/rope.cuh"
#include "xla_ops/cc/device/vector.cuh"
#include "xla_ops/cc/ops/fused_qk_norm_rope/fused_qk_norm_rope_launch.h"

namespace xla_ops {
namespace {

constexpr int kThreads = 256;

template <typename T, typename Table>
struct Task {
  T* qkv;
  const T* q_weight;
  const T* k_weight;
  const Table* cache;
  const void* positions;
  int64_t max_position;
  int64_t row_size;  // of qkv
  int num_heads;     // of all tokens, values apart
  int num_heads_q;   // of a token
  int head_dim;
  float eps;
  bool positions_are_32_bits;
  ExactDiv mean_of;     // head_dim elements
  FastDiv token_heads;  // of a token, values apart
};

// The head that some lanes work on.
template <typename T, typename Table>
struct Head {
  T* x;              // [head_dim]
  const T* weight;   // [head_dim]
  const Table* row;  // of the cache, or null where the token is not rotated

  // `index`: of all heads, in range.
  __device__ static __forceinline__ Head Of(const Task<T, Table>& task,
                                            int index) {
    const int token = task.token_heads.Divide(index);
    const int head = index - token * task.token_heads.value();
    const int64_t position =
        LoadPosition(task.positions, task.positions_are_32_bits, token);
    const bool rotate = position >= 0 && position < task.max_position;
    return {
        task.qkv + token * task.row_size + int64_t{head} * task.head_dim,
        head < task.num_heads_q ? task.q_weight : task.k_weight,
        rotate ? task.cache + position * task.head_dim : nullptr,
    };
  }
};

// Threads: x is the lane of a head, a power of two of them; y and blockIdx.x
// run over heads. All vectors are aligned, and a half of a head is whole
// vectors, no more than there are lanes (checked by the launcher).
template <typename T, typename Table, bool kNeox>
__global__ void __launch_bounds__(kThreads)
    FusedQkNormRopeKernel(const Task<T, Table> task) {
  constexpr int kWidth = kWideSize<T>;
  const int index = blockIdx.x * blockDim.y + threadIdx.y;
  const int pairs = task.head_dim / 2;
  const int at = threadIdx.x * kWidth;  // in each half
  const bool active = index < task.num_heads && at < pairs;
  Head<T, Table> head = {};
  Halves<T, kWidth> x;
  float sum = 0.0f;
  if (active) {
    head = Head<T, Table>::Of(task, index);
    x = Halves<T, kWidth>::Load(head.x, at, pairs);
    sum = SumOfSquares(x.low) + SumOfSquares(x.high);
  }
  sum = WarpSum(sum, blockDim.x);
  if (!active) return;
  const float scale = RootMeanSquareScale(sum, task.mean_of, task.eps);
  using Turn = Angles<Table, kWidth, kNeox>;
  const auto weight = Halves<T, kWidth>::Load(head.weight, at, pairs);
  const auto angles =
      head.row != nullptr ? Turn::Load(head.row, at, pairs) : Turn::None();
  NormAndRotate(weight, scale, angles, x);
  StoreGlobal(head.x + at, x.low);
  StoreGlobal(head.x + pairs + at, x.high);
}

// Any head, of a warp. Threads: x is the lane, y and blockIdx.x run over heads.
// A lane alone writes what it reads again, after all lanes have read it for the
// sum.
template <typename T, typename Table>
__global__ void __launch_bounds__(kThreads)
    WarpPerHeadKernel(const Task<T, Table> task, bool is_neox) {
  const int index = blockIdx.x * blockDim.y + threadIdx.y;
  if (index >= task.num_heads) return;
  const auto head = Head<T, Table>::Of(task, index);
  float sum = 0.0f;
  for (int d = threadIdx.x; d < task.head_dim; d += 32) {
    sum += ToFloat(head.x[d]) * ToFloat(head.x[d]);
  }
  sum = WarpSum(sum);
  const float scale = RootMeanSquareScale(sum, task.mean_of, task.eps);
  const int pairs = task.head_dim / 2;
  for (int i = threadIdx.x; i < pairs; i += 32) {
    const int a = is_neox ? i : 2 * i;
    const int b = is_neox ? i + pairs : 2 * i + 1;
    NormAndRotatePair(head.x, head.weight, scale, head.row, i, pairs, a, b,
                      &head.x[a], &head.x[b]);
  }
}

template <typename T, typename Table>
cudaError_t LaunchHeads(cudaStream_t stream,
                        const FusedQkNormRopeParams& params,
                        const Task<T, Table>& task) {
  constexpr int kWidth = kWideSize<T>;
  const int64_t vectors = params.head_dim / 2 / kWidth;
  const bool wide =
      params.head_dim % (2 * kWidth) == 0 && vectors <= 32 &&
      IsAligned(params.out, 16) && IsAligned(params.q_weight, 16) &&
      IsAligned(params.k_weight, 16) && IsAligned(params.cos_sin_cache, 16);
  const dim3 block = RowBlock(wide ? vectors : 32, 32, kThreads);
  const auto blocks =
      static_cast<unsigned>(CeilDivide(task.num_heads, block.y));
  if (!wide) {
    return LaunchKernel<WarpPerHeadKernel<T, Table>>(stream, blocks, block,
                                                     task, params.is_neox);
  }
  return params.is_neox ? LaunchKernel<FusedQkNormRopeKernel<T, Table, true>>(
                              stream, blocks, block, task)
                        : LaunchKernel<FusedQkNormRopeKernel<T, Table, false>>(
                              stream, blocks, block, task);
}

template <typename T, typename Table>
cudaError_t Launch(cudaStream_t stream, const FusedQkNormRopeParams& params) {
  const int64_t heads = params.num_heads_q + params.num_heads_k;
  // Heads are counted in int, with room for a block's.
  static_assert(kMaxCudaTokenElements <= INT32_MAX - kThreads);
  const int64_t most_tokens = (INT32_MAX - kThreads) / heads;
  Task<T, Table> task;
  task.q_weight = static_cast<const T*>(params.q_weight);
  task.k_weight = static_cast<const T*>(params.k_weight);
  task.cache = static_cast<const Table*>(params.cos_sin_cache);
  task.max_position = params.max_position;
  task.row_size = NumHeads(params) * params.head_dim;
  task.num_heads_q = static_cast<int>(params.num_heads_q);
  task.head_dim = static_cast<int>(params.head_dim);
  task.eps = params.eps;
  task.mean_of = ExactDiv(static_cast<float>(params.head_dim));
  task.positions_are_32_bits = params.positions_dtype == DType::kS32;
  task.token_heads = FastDiv(heads);
  // One launch, but for gigantic tensors.
  for (int64_t first = 0; first < params.num_tokens; first += most_tokens) {
    const int64_t tokens = std::min(most_tokens, params.num_tokens - first);
    task.num_heads = static_cast<int>(tokens * heads);
    task.qkv = static_cast<T*>(params.out) + first * task.row_size;
    task.positions = static_cast<const char*>(params.positions) +
                     first * SizeOf(params.positions_dtype);
    const cudaError_t error = LaunchHeads(stream, params, task);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t LaunchFusedQkNormRope(cudaStream_t stream,
                                  const FusedQkNormRopeParams& params) {
  if (params.num_tokens == 0 || params.num_heads_q + params.num_heads_k == 0) {
    return cudaSuccess;
  }
  return DispatchCudaFloat(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return params.cache_dtype == DType::kF32 ? Launch<T, float>(stream, params)
                                             : Launch<T, T>(stream, params);
  });
}

}  // namespace xla_ops
