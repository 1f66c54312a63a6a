// How the attention kernels read query rows, scales and slopes, and end and
// write rows of `out`, `lse` and the splits' partial results.

#ifndef XLA_OPS_CC_OPS_ATTENTION_ATTENTION_ROWS_CUH_
#define XLA_OPS_CC_OPS_ATTENTION_ATTENTION_ROWS_CUH_

#include <cstdint>
#include <type_traits>

#include "xla_ops/cc/device/dtype.cuh"
#include "xla_ops/cc/device/softmax.cuh"
#include "xla_ops/cc/device/vector.cuh"
#include "xla_ops/cc/ops/attention/attention_tiles.cuh"

namespace xla_ops {

// Elements of head_dim, always a multiple of it, that are moved together.
constexpr int kPiece = 8;

// Reads a piece as floats; `aligned`: by loads of 16 bytes.
template <typename T>
__device__ __forceinline__ void LoadPiece(const T* source, bool aligned,
                                          float (&piece)[kPiece]) {
  constexpr int kSize = kWideSize<T>;
#pragma unroll
  for (int i = 0; i < kPiece; i += kSize) {
    Vector<T, kSize> wide;
    if (aligned) {
      wide = LoadVector<kSize>(source + i);
    } else {
#pragma unroll
      for (int j = 0; j < kSize; ++j) wide[j] = source[i + j];
    }
#pragma unroll
    for (int j = 0; j < kSize; ++j) piece[i + j] = ToFloat(wide[j]);
  }
}

// Calls f(pointer of dtype's type) for query's and out's element type.
template <typename F>
__device__ __forceinline__ void WithElements(DType dtype, F&& f) {
  if (dtype == DType::kF32) return f(static_cast<float*>(nullptr));
  if (dtype == DType::kF16) return f(static_cast<__half*>(nullptr));
  f(static_cast<__nv_bfloat16*>(nullptr));
}

// Reads the piece of query that begins with element `index`.
__device__ __forceinline__ void LoadQueryPiece(const AttentionArgs& args,
                                               int64_t index,
                                               float (&piece)[kPiece]) {
  WithElements(args.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    LoadPiece(static_cast<const T*>(args.query) + index, args.aligned, piece);
  });
}

// Writes neighbouring elements of out from `index` on, a multiple of kSize.
template <int kSize>
__device__ __forceinline__ void StoreOut(const AttentionArgs& args,
                                         int64_t index,
                                         const float (&values)[kSize]) {
  WithElements(args.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* out = static_cast<T*>(args.out) + index;
    constexpr int kStore = kSize < kWideSize<T> ? kSize : kWideSize<T>;
#pragma unroll
    for (int i = 0; i < kSize; i += kStore) {
      Vector<T, kStore> wide;
#pragma unroll
      for (int j = 0; j < kStore; ++j) wide[j] = FromFloat<T>(values[i + j]);
      if (args.aligned) {
        StoreVector(out + i, wide);
      } else {
#pragma unroll
        for (int j = 0; j < kStore; ++j) out[i + j] = wide[j];
      }
    }
  });
}

// k_scale (kWhich 0) or v_scale (1) of a sequence and KV head; 1 without.
template <int kWhich>
__device__ __forceinline__ float KvScale(const AttentionArgs& args, int seq,
                                         int kv_head) {
  const float* scales = kWhich == 0 ? args.k_scale : args.v_scale;
  if (scales == nullptr || seq < 0) return 1.0f;
  return scales[seq * args.kv_scale_seq_stride[kWhich] +
                kv_head * args.kv_scale_head_stride[kWhich]];
}

// The ALiBi slope of a query head, in base 2.
__device__ __forceinline__ float AlibiSlope(const AttentionArgs& args, int seq,
                                            int head) {
  if (args.alibi_slopes == nullptr || seq < 0) return 0.0f;
  return kLog2E * args.alibi_slopes[seq * args.alibi_seq_stride + head];
}

// Ends the softmax of a row of query head `head`.
__device__ __forceinline__ SoftmaxEnd EndRowSoftmax(const AttentionArgs& args,
                                                    int head, float max,
                                                    float sum) {
  return EndSoftmax(max, sum,
                    args.sinks != nullptr ? args.sinks[head] : -CUDART_INF_F);
}

__device__ __forceinline__ void StoreLse(const AttentionArgs& args,
                                         const QueryRow& row, float lse) {
  args.lse[int64_t{row.head} * args.num_tokens + row.token] = lse;
}

// Both, for one thread or more of the row: what to multiply its accumulator
// by.
__device__ __forceinline__ float EndRow(const AttentionArgs& args,
                                        const QueryRow& row, float max,
                                        float sum) {
  const SoftmaxEnd end = EndRowSoftmax(args, row.head, max, sum);
  StoreLse(args, row, end.lse);
  return end.factor;
}

// Leaves a row's softmax as it is for the combining kernel. Called by all lanes
// that hold the row, with the same values; `writer` is one of them.
__device__ __forceinline__ void StorePartial(const AttentionArgs& args,
                                             int64_t partial_row, float max,
                                             float sum, bool writer) {
  if (!writer) return;
  args.partial_max[partial_row] = max;
  args.partial_sum[partial_row] = sum;
}

// EndRow or StorePartial, where the row may be one split's.
__device__ __forceinline__ float EndOrSplitRow(const AttentionArgs& args,
                                               const QueryRow& row,
                                               int64_t partial_row, float max,
                                               float sum, bool writer) {
  if (args.partial_out == nullptr) return EndRow(args, row, max, sum);
  StorePartial(args, partial_row, max, sum, writer);
  return 1.0f;
}

// A split that has no token: partial results of nothing for the tile's rows.
// The combining kernel reads no accumulator where the sum is zero.
__device__ __forceinline__ void StoreEmptySplit(const AttentionArgs& args,
                                                const QueryTile& tile,
                                                int kv_head,
                                                int64_t split_start) {
  for (int row = threadIdx.x; row < tile.num_rows; row += blockDim.x) {
    const int64_t partial_row =
        split_start + tile.Row(args, kv_head, row).Index(args);
    args.partial_max[partial_row] = -CUDART_INF_F;
    args.partial_sum[partial_row] = 0.0f;
  }
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_ATTENTION_ATTENTION_ROWS_CUH_
