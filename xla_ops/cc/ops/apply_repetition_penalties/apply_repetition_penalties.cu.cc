// Repetition penalties on CUDA. Few tokens of a vocabulary are in a sequence,
// so the masks are nearly all that is read: a thread takes several vectors of
// both at once, and touches the logits of those alone in which a token is
// marked. Rows need no alignment of their own, since vectors run over all rows
// as one.
//
// Tested by tests/gpu/check_elementwise.py and
// tests/ops/test_apply_repetition_penalties.py.

#include "xla_ops/cc/ops/apply_repetition_penalties/apply_repetition_penalties.h"

#include <cstdint>

#include "xla_ops/cc/device/dtype.cuh"
#include "xla_ops/cc/device/launch.h"
#include "xla_ops/cc/device/vector.cuh"
#include "xla_ops/cc/ops/apply_repetition_penalties/apply_repetition_penalties_launch.h"

namespace xla_ops {
namespace {

constexpr int kThreads = 256;
// Vectors of a thread where there are many elements; one where there are few.
constexpr int kManyVectors = 4;
constexpr int64_t kFewElements = int64_t{1} << 21;

// 64-bit division costs some 100 instructions; elements nearly always can be
// counted in 32 bits.
__device__ __forceinline__ int64_t RowOf(int64_t element, int64_t vocab_size) {
  if (((element | vocab_size) >> 32) == 0) {
    return static_cast<uint32_t>(element) / static_cast<uint32_t>(vocab_size);
  }
  return element / vocab_size;
}

template <int kSize>
__device__ __forceinline__ bool Any(const Vector<uint8_t, kSize>& a,
                                    const Vector<uint8_t, kSize>& b) {
  unsigned any = 0;
#pragma unroll
  for (int i = 0; i < kSize; ++i) any |= a[i] | b[i];
  return any != 0;
}

template <typename T>
__device__ __forceinline__ T Penalise(T logit, float penalty) {
  const float x = ToFloat(logit);
  return FromFloat<T>(x > 0.0f ? x / penalty : x * penalty);
}

// kWidth logits in a row of memory, maybe of several sequences. `at`: the
// first.
template <typename T, int kWidth>
__device__ __forceinline__ void PenaliseVector(
    const Vector<uint8_t, kWidth>& prompt,
    const Vector<uint8_t, kWidth>& output, const T* penalties,
    int64_t vocab_size, int64_t at, T* logits) {
  int64_t row = RowOf(at, vocab_size);
  int64_t row_end = (row + 1) * vocab_size;
  float penalty = ToFloat(penalties[row]);
  Vector<T, kWidth> values = LoadVector<kWidth>(logits + at);
#pragma unroll
  for (int j = 0; j < kWidth; ++j) {
    while (at + j >= row_end) {
      row_end += vocab_size;
      penalty = ToFloat(penalties[++row]);
    }
    if (prompt[j] | output[j]) values[j] = Penalise(values[j], penalty);
  }
  StoreGlobal(logits + at, values);
}

// Does logits [start, size). Vectors of a thread are a block's threads apart.
// They are aligned (checked by the launcher), but for the last elements, which
// are fewer than a vector.
template <typename T, int kWidth, int kVectors>
__global__ void __launch_bounds__(kThreads) ApplyRepetitionPenaltiesKernel(
    T* logits,                                // [size]
    const uint8_t* __restrict__ prompt_mask,  // [size]
    const uint8_t* __restrict__ output_mask,  // [size]
    const T* __restrict__ penalties,          // [size / vocab_size]
    int64_t start, int64_t size, int64_t vocab_size) {
  constexpr int64_t kStep = kThreads * kWidth;
  const int64_t first =
      start + int64_t{blockIdx.x} * kStep * kVectors + threadIdx.x * kWidth;
  Vector<uint8_t, kWidth> prompt[kVectors];
  Vector<uint8_t, kWidth> output[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int64_t at = first + i * kStep;
    if (at + kWidth > size) break;
    prompt[i] = LoadVector<kWidth>(prompt_mask + at);
    output[i] = LoadVector<kWidth>(output_mask + at);
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int64_t at = first + i * kStep;
    if (at + kWidth <= size) {
      if (!Any(prompt[i], output[i])) continue;
      PenaliseVector(prompt[i], output[i], penalties, vocab_size, at, logits);
      continue;
    }
    for (int64_t j = at; j < size; ++j) {
      if (!(prompt_mask[j] | output_mask[j])) continue;
      const float penalty = ToFloat(penalties[RowOf(j, vocab_size)]);
      logits[j] = Penalise(logits[j], penalty);
    }
    break;
  }
}

template <typename T, int kWidth, int kVectors>
cudaError_t LaunchVectors(cudaStream_t stream,
                          const ApplyRepetitionPenaltiesParams& params) {
  constexpr int64_t kStep = int64_t{kThreads} * kWidth * kVectors;
  return ForEachGrid(
      params.num_seqs * params.vocab_size, kStep,
      [&](int64_t first, int64_t count) {
        return LaunchKernel<
            ApplyRepetitionPenaltiesKernel<T, kWidth, kVectors>>(
            stream, static_cast<unsigned>(CeilDivide(count, kStep)), kThreads,
            static_cast<T*>(params.out), params.prompt_mask, params.output_mask,
            static_cast<const T*>(params.penalties), first, first + count,
            params.vocab_size);
      });
}

}  // namespace

cudaError_t LaunchApplyRepetitionPenalties(
    cudaStream_t stream, const ApplyRepetitionPenaltiesParams& params) {
  const int64_t size = params.num_seqs * params.vocab_size;
  if (size == 0) return cudaSuccess;
  return DispatchCudaFloat(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int kWidth = kWideSize<T>;
    if (!IsAligned(params.out, 16) || !IsAligned(params.prompt_mask, kWidth) ||
        !IsAligned(params.output_mask, kWidth)) {
      return LaunchVectors<T, 1, kManyVectors>(stream, params);
    }
    return size < kFewElements
               ? LaunchVectors<T, kWidth, 1>(stream, params)
               : LaunchVectors<T, kWidth, kManyVectors>(stream, params);
  });
}

}  // namespace xla_ops
