// The epilogue of the Hopper attention kernel (attention_sm90.cuh): ends the
// rows' softmax and writes `out` and `lse`, or leaves both to the kernel that
// combines splits.

#ifndef XLA_OPS_CC_OPS_ATTENTION_ATTENTION_SM90_EPILOGUE_CUH_
#define XLA_OPS_CC_OPS_ATTENTION_ATTENTION_SM90_EPILOGUE_CUH_

#include <math_constants.h>

#include <cstdint>

#include "xla_ops/cc/device/mma.cuh"
#include "xla_ops/cc/device/reduce.cuh"
#include "xla_ops/cc/device/softmax_fragment.cuh"
#include "xla_ops/cc/device/wgmma.cuh"
#include "xla_ops/cc/ops/attention/attention_rows.cuh"
#include "xla_ops/cc/ops/attention/attention_sm90_scheduler.cuh"

namespace xla_ops {

#if XLA_OPS_HAS_WGMMA

// Transposes a 4x4 matrix of words over the four lanes of a quad: lane t
// begins with column t and ends with row t.
__device__ __forceinline__ void TransposeQuad(uint32_t (&m)[4]) {
  const int lane = threadIdx.x % 4;
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    const bool upper = lane & step;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & step) continue;
      const uint32_t mine = upper ? m[i] : m[i + step];
      const uint32_t other = __shfl_xor_sync(kFullWarp, mine, step);
      m[i] = upper ? other : m[i];
      m[i + step] = upper ? m[i + step] : other;
    }
  }
}

// Writes a thread's part of its row `i`, as it is, for the combining kernel.
template <int kOut>
__device__ __forceinline__ void StorePartialRow(const AttentionArgs& args,
                                                int64_t partial_row, float max,
                                                float sum, int i,
                                                const float (&out)[kOut]) {
  const int lane = threadIdx.x % 32;
  if (lane % 4 == 0) {
    args.partial_max[partial_row] = max;
    args.partial_sum[partial_row] = sum;
  }
  float* target = args.partial_out + partial_row * args.head_dim;
#pragma unroll
  for (int n = 0; n < kOut / 4; ++n) {
    const int column = 8 * n + 2 * (lane % 4);
    if (column >= args.head_dim) break;
    *reinterpret_cast<float2*>(target + column) =
        make_float2(out[4 * n + 2 * i], out[4 * n + 2 * i + 1]);
  }
}

// Normalises and writes a warp's 16 rows from `first_row` on, 16 bytes a lane.
// With splits the rows are those of the split's partial results.
template <typename T, int kOut>
__device__ __forceinline__ void StoreOutput(const AttentionArgs& args,
                                            const Sm90Item& item, int first_row,
                                            const LaggingSoftmax& softmax,
                                            const float (&out)[kOut]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = first_row + lane / 4 + 8 * i;
    const QueryRow query_row = item.rows.Row(args, item.kv_head, row);
    const bool valid = row < item.rows.num_rows;
    const float total = QuadSum(softmax.sum[i]);
    const float max = softmax.Max(i, total);
    const bool empty = total == 0.0f;
    const SoftmaxEnd end = EndRowSoftmax(args, query_row.head, max, total);
    if (args.partial_out != nullptr) {
      if (valid) {
        StorePartialRow(args, query_row.Index(args), max, total, i, out);
      }
      continue;
    }
    if (valid && lane % 4 == 0) StoreLse(args, query_row, end.lse);
    T* target =
        static_cast<T*>(args.out) + query_row.Index(args) * args.head_dim;
#pragma unroll
    for (int n = 0; n < kOut / 4; n += 4) {
      uint32_t words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int first = 4 * (n + j) + 2 * i;
        words[j] = PackPair<T>(empty ? 0.0f : out[first] * end.factor,
                               empty ? 0.0f : out[first + 1] * end.factor);
      }
      TransposeQuad(words);
      const int column = 8 * (n + lane % 4);
      if (valid && column < args.head_dim) {
        *reinterpret_cast<uint4*>(target + column) =
            make_uint4(words[0], words[1], words[2], words[3]);
      }
    }
  }
}

// Writes a warp's 16 rows from `first_row` on where none sees a token.
template <typename T>
__device__ __forceinline__ void StoreZeros(const AttentionArgs& args,
                                           const Sm90Item& item,
                                           int first_row) {
  const int lane = threadIdx.x % 32;
  const int end = min(first_row + 16, item.rows.num_rows);
  for (int row = first_row; row < end; ++row) {
    const QueryRow query_row = item.rows.Row(args, item.kv_head, row);
    if (args.partial_out != nullptr) {
      // The combining kernel reads no accumulator where the sum is zero.
      if (lane == 0) {
        args.partial_max[query_row.Index(args)] = -CUDART_INF_F;
        args.partial_sum[query_row.Index(args)] = 0.0f;
      }
      continue;
    }
    if (lane == 0) StoreLse(args, query_row, CUDART_INF_F);
    if (lane * 8 < args.head_dim) {
      T* target =
          static_cast<T*>(args.out) + query_row.Index(args) * args.head_dim;
      *reinterpret_cast<uint4*>(target + lane * 8) = make_uint4(0, 0, 0, 0);
    }
  }
}

#endif  // XLA_OPS_HAS_WGMMA

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_ATTENTION_ATTENTION_SM90_EPILOGUE_CUH_
