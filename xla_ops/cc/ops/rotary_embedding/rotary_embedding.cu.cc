// Rotary embedding on CUDA: bound by memory. A head is cut into units: some
// rotate kPairs pairs, the rest copy what lies past rotary_dim (nothing to do
// in place). Queries and keys share one launch.
//
// RotateHeadsKernel      NeoX heads that rotate whole: a thread has the same
//                        unit of several heads, and loads its angles once
// RotaryEmbeddingKernel  everything else, one or two units a thread
//
// Tested by tests/gpu/check_elementwise.py and
// tests/ops/test_rotary_embedding.py.

#include "xla_ops/cc/ops/rotary_embedding/rotary_embedding.h"

#include <algorithm>
#include <cstdint>

#include "xla_ops/cc/device/dtype.cuh"
#include "xla_ops/cc/device/fast_div.h"
#include "xla_ops/cc/device/launch.h"
#include "xla_ops/cc/device/occupancy.h"
#include "xla_ops/cc/device/rope.cuh"
#include "xla_ops/cc/device/vector.cuh"
#include "xla_ops/cc/ops/rotary_embedding/rotary_embedding_launch.h"

namespace xla_ops {
namespace {

constexpr int kThreads = 256;
// For each multiprocessor; five spill.
constexpr int kMinBlocks = MinBlocks(4, kThreads);
// Units that a thread loads before it rotates the first.
template <bool kNeox>
constexpr int kUnits = kNeox ? 2 : 1;
// From here on a GPU is full with kUnits of them a thread.
constexpr int64_t kManyTokens = 512;

// Of RotateHeadsKernel: threads, its blocks on a multiprocessor, and heads a
// thread loads before it rotates the first.
constexpr int kHeadThreads = 160;
// Products of bf16 in fp32, before 9.0, spill with six blocks.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
constexpr int kMinHeadBlocks = MinBlocks(6, kHeadThreads);
#else
constexpr int kMinHeadBlocks = MinBlocks(4, kHeadThreads);
#endif
constexpr int kHeads = 4;

template <typename T>
struct Shape {
  int64_t num_tokens;
  int64_t max_position;
  bool positions_are_32_bits;
  int64_t head_size;
  int64_t rotary_dim;
  // Units of a head: `rotating` ones, then copying ones.
  FastDiv head_units;
  int rotating;
  int first_unit;  // of this launch
  int query_heads;
  int key_heads;
  const T* query;
  const T* key;
  T* query_out;
  T* key_out;
};

// How many elements a copying unit moves.
template <int kPairs, bool kNeox>
constexpr int kCopySize = kPairs == 1 ? 1 : (kNeox ? kPairs : 2 * kPairs);

// Where a unit is.
template <typename T>
struct Place {
  const T* in;
  T* out;
  int pair;  // the first one, in the head; -1 where the unit only copies

  template <int kPairs, bool kNeox>
  __device__ static __forceinline__ Place Of(const Shape<T>& shape,
                                             int64_t token, int unit) {
    const int head_units = shape.head_units.value();
    int head = shape.head_units.Divide(unit);
    const int part = unit - head * head_units;
    const bool is_query = head < shape.query_heads;
    if (!is_query) head -= shape.query_heads;
    const int heads = is_query ? shape.query_heads : shape.key_heads;
    int64_t start = (token * heads + head) * shape.head_size;
    const int pair = part < shape.rotating ? part * kPairs : -1;
    if (pair >= 0) {
      start += kNeox ? pair : 2 * pair;
    } else {
      start +=
          shape.rotary_dim + (part - shape.rotating) * kCopySize<kPairs, kNeox>;
    }
    return {(is_query ? shape.query : shape.key) + start,
            (is_query ? shape.query_out : shape.key_out) + start, pair};
  }
};

// The pairs of one unit, in registers.
template <typename T, int kPairs, bool kNeox>
struct Pairs {
  Vector<T, kPairs> x;
  Vector<T, kPairs> y;

  __device__ __forceinline__ void Load(const T* in, int64_t pairs) {
    if constexpr (kNeox) {
      x = LoadVector<kPairs>(in);
      y = LoadVector<kPairs>(in + pairs);
    } else if constexpr (kPairs == 1) {
      // Pairs need not be aligned to their size.
      x[0] = in[0];
      y[0] = in[1];
    } else {
      const auto xy = LoadVector<2 * kPairs>(in);
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        x[i] = xy[2 * i];
        y[i] = xy[2 * i + 1];
      }
    }
  }

  __device__ __forceinline__ void Store(T* out, int64_t pairs) const {
    if constexpr (kNeox) {
      StoreGlobal(out, x);
      StoreGlobal(out + pairs, y);
    } else if constexpr (kPairs == 1) {
      out[0] = x[0];
      out[1] = y[0];
    } else {
      Vector<T, 2 * kPairs> xy;
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        xy[2 * i] = x[i];
        xy[2 * i + 1] = y[i];
      }
      StoreGlobal(out, xy);
    }
  }
};

// Threads: x and blockIdx.y run over the units of a token's heads, queries
// first, y and blockIdx.x over tokens. All vectors are aligned (checked by
// the launcher). `out` may be `in`: a thread reads its units before writing.
template <typename T, typename Table, int kPairs, bool kNeox>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    RotaryEmbeddingKernel(const void* __restrict__ positions,
                          const Table* __restrict__ cos_sin_cache,
                          const Shape<T> shape) {
  const int64_t token = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  if (token >= shape.num_tokens) return;
  const int64_t position =
      LoadPosition(positions, shape.positions_are_32_bits, token);
  const bool rotate = position >= 0 && position < shape.max_position;
  const int64_t pairs = shape.rotary_dim / 2;
  const Table* cos_row = cos_sin_cache + position * shape.rotary_dim;
  const int units =
      (shape.query_heads + shape.key_heads) * shape.head_units.value();
  const int first = shape.first_unit + blockIdx.y * blockDim.x + threadIdx.x;
  const int step = blockDim.x * gridDim.y;
  constexpr int kCopy = kCopySize<kPairs, kNeox>;

  // The units' own loads first: they do not wait for the position, which the
  // others do. Places are computed twice rather than kept in registers.
  Pairs<T, kPairs, kNeox> loaded[kUnits<kNeox>];
#pragma unroll
  for (int i = 0; i < kUnits<kNeox>; ++i) {
    const int unit = first + i * step;
    if (unit >= units) break;
    const auto place = Place<T>::template Of<kPairs, kNeox>(shape, token, unit);
    if (place.pair >= 0) loaded[i].Load(place.in, pairs);
  }
#pragma unroll
  for (int i = 0; i < kUnits<kNeox>; ++i) {
    int unit = first + i * step;
    if (unit >= units) break;
    if constexpr (kUnits<kNeox> > 1) asm volatile("" : "+r"(unit));
    const auto place = Place<T>::template Of<kPairs, kNeox>(shape, token, unit);
    const bool in_place = place.in == place.out;
    if (place.pair < 0) {
      if (!in_place) StoreGlobal(place.out, LoadVector<kCopy>(place.in));
      continue;
    }
    if (rotate) {
      const auto cos = LoadTable<kPairs, T>(cos_row + place.pair);
      const auto sin = LoadTable<kPairs, T>(cos_row + pairs + place.pair);
      RotateVector(cos, sin, &loaded[i].x, &loaded[i].y);
    } else if (in_place) {
      continue;
    }
    loaded[i].Store(place.out, pairs);
  }
}

// NeoX heads that rotate whole, of `parts` vectors of pairs. A block has one
// token and block_heads of its heads; a thread keeps its place in the head, so
// that its angles are loaded once, and walks over heads.
template <typename T, typename Table, int kPairs>
__global__ void __launch_bounds__(kHeadThreads, kMinHeadBlocks)
    RotateHeadsKernel(const void* __restrict__ positions,
                      const Table* __restrict__ cos_sin_cache,
                      const Shape<T> shape, const FastDiv parts,
                      int block_heads) {
  using V = Vector<T, kPairs>;
  const int64_t token = blockIdx.x;
  const int64_t position =
      LoadPosition(positions, shape.positions_are_32_bits, token);
  const int row = parts.Divide(threadIdx.x);
  const int pair = (threadIdx.x - row * parts.value()) * kPairs;
  const int step = parts.Divide(blockDim.x);
  const int pairs = parts.value() * kPairs;
  const int begin = blockIdx.y * block_heads;
  const int end = min(begin + block_heads, shape.query_heads + shape.key_heads);

  // The first element of a head's part, in query and query_out or in key and
  // key_out.
  const auto start = [&](int head) {
    const bool is_query = head < shape.query_heads;
    const int heads = is_query ? shape.query_heads : shape.key_heads;
    return (token * heads + head - (is_query ? 0 : shape.query_heads)) *
               shape.head_size +
           pair;
  };
  V x[kHeads];
  V y[kHeads];
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    const int head = begin + row + i * step;
    if (head >= end) break;
    const T* in =
        (head < shape.query_heads ? shape.query : shape.key) + start(head);
    x[i] = LoadVector<kPairs>(in);
    y[i] = LoadVector<kPairs>(in + pairs);
  }
  const bool rotate = position >= 0 && position < shape.max_position;
  V cos = {};
  V sin = {};
  if (rotate) {
    const Table* entries = cos_sin_cache + position * shape.rotary_dim + pair;
    cos = LoadTable<kPairs, T>(entries);
    sin = LoadTable<kPairs, T>(entries + pairs);
  }
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    const int head = begin + row + i * step;
    if (head >= end) break;
    T* out = (head < shape.query_heads ? shape.query_out : shape.key_out) +
             start(head);
    if (rotate) RotateVector(cos, sin, &x[i], &y[i]);
    StoreGlobal(out, x[i]);
    StoreGlobal(out + pairs, y[i]);
  }
}

template <typename T, typename Table, int kPairs>
cudaError_t LaunchHeads(cudaStream_t stream,
                        const RotaryEmbeddingParams& params) {
  const int64_t parts = params.rotary_dim / 2 / kPairs;
  const int64_t heads = params.query.num_heads + params.key.num_heads;
  // Heads a thread, as even as can be.
  const int64_t steps = CeilDivide(heads, kHeadThreads / parts);
  const int64_t rows = CeilDivide(heads, steps);
  const int64_t columns = CeilDivide(steps, kHeads);
  const int64_t block_heads = rows * CeilDivide(steps, columns);
  Shape<T> shape;
  shape.max_position = params.max_position;
  shape.positions_are_32_bits = params.positions_dtype == DType::kS32;
  shape.head_size = params.head_size;
  shape.rotary_dim = params.rotary_dim;
  shape.query_heads = static_cast<int>(params.query.num_heads);
  shape.key_heads = static_cast<int>(params.key.num_heads);
  return ForEachGrid(params.num_tokens, 1, [&](int64_t first, int64_t tokens) {
    const int64_t query_start =
        first * params.query.num_heads * params.head_size;
    const int64_t key_start = first * params.key.num_heads * params.head_size;
    shape.num_tokens = tokens;
    shape.query = static_cast<const T*>(params.query.in) + query_start;
    shape.query_out = static_cast<T*>(params.query.out) + query_start;
    shape.key = static_cast<const T*>(params.key.in) + key_start;
    shape.key_out = static_cast<T*>(params.key.out) + key_start;
    return LaunchKernel<RotateHeadsKernel<T, Table, kPairs>>(
        stream,
        dim3(static_cast<unsigned>(tokens), static_cast<unsigned>(columns)),
        dim3(static_cast<unsigned>(rows * parts)),
        static_cast<const char*>(params.positions) +
            first * SizeOf(params.positions_dtype),
        static_cast<const Table*>(params.cos_sin_cache), shape, FastDiv(parts),
        static_cast<int>(block_heads));
  });
}

template <typename T, typename Table, int kPairs, bool kNeox>
cudaError_t LaunchUnits(cudaStream_t stream,
                        const RotaryEmbeddingParams& params) {
  constexpr int kCopy = kCopySize<kPairs, kNeox>;
  const int64_t rotating = params.rotary_dim / 2 / kPairs;
  const int64_t head_units =
      rotating + (params.head_size - params.rotary_dim) / kCopy;
  const int64_t units =
      (params.query.num_heads + params.key.num_heads) * head_units;
  if (units == 0) return cudaSuccess;
  // Units are counted in int, with room for one more launch's.
  static_assert(kMaxCudaTokenElements <=
                INT32_MAX - 2 * kUnits<kNeox> * kThreads * kMaxGridY);
  Shape<T> shape;
  shape.max_position = params.max_position;
  shape.positions_are_32_bits = params.positions_dtype == DType::kS32;
  shape.head_size = params.head_size;
  shape.rotary_dim = params.rotary_dim;
  shape.head_units = FastDiv(head_units);
  shape.rotating = static_cast<int>(rotating);
  shape.query_heads = static_cast<int>(params.query.num_heads);
  shape.key_heads = static_cast<int>(params.key.num_heads);

  const int64_t needed = params.num_tokens < kManyTokens
                             ? units
                             : CeilDivide(units, kUnits<kNeox>);
  const int64_t columns = std::min(kMaxGridY, CeilDivide(needed, kThreads));
  const dim3 block = RowBlock(needed, kThreads, kThreads);
  // One launch has all units but for heads of many million elements.
  const int64_t launch_units = columns * block.x * kUnits<kNeox>;
  return ForEachGrid(
      params.num_tokens, block.y, [&](int64_t first, int64_t tokens) {
        shape.num_tokens = tokens;
        const int64_t query_start =
            first * params.query.num_heads * params.head_size;
        const int64_t key_start =
            first * params.key.num_heads * params.head_size;
        shape.query = static_cast<const T*>(params.query.in) + query_start;
        shape.query_out = static_cast<T*>(params.query.out) + query_start;
        shape.key = static_cast<const T*>(params.key.in) + key_start;
        shape.key_out = static_cast<T*>(params.key.out) + key_start;
        const dim3 grid(static_cast<unsigned>(CeilDivide(tokens, block.y)),
                        static_cast<unsigned>(columns));
        for (int64_t unit = 0; unit < units; unit += launch_units) {
          shape.first_unit = static_cast<int>(unit);
          const cudaError_t error =
              LaunchKernel<RotaryEmbeddingKernel<T, Table, kPairs, kNeox>>(
                  stream, grid, block,
                  static_cast<const char*>(params.positions) +
                      first * SizeOf(params.positions_dtype),
                  static_cast<const Table*>(params.cos_sin_cache), shape);
          if (error != cudaSuccess) return error;
        }
        return cudaSuccess;
      });
}

// 16-byte vectors where every unit of every head is aligned to one.
template <typename T, typename Table, bool kNeox>
cudaError_t Launch(cudaStream_t stream, const RotaryEmbeddingParams& params) {
  constexpr int kPairs = kNeox ? kWideSize<T> : kWideSize<T> / 2;
  const bool wide =
      params.rotary_dim % (2 * kPairs) == 0 &&
      params.head_size % kWideSize<T> == 0 && IsAligned(params.query.in, 16) &&
      IsAligned(params.query.out, 16) && IsAligned(params.key.in, 16) &&
      IsAligned(params.key.out, 16) && IsAligned(params.cos_sin_cache, 16);
  if constexpr (kNeox) {
    const int64_t parts = params.rotary_dim / 2 / kPairs;
    const int64_t heads = params.query.num_heads + params.key.num_heads;
    // Not for so few units that most of a block would be idle.
    if (wide && params.rotary_dim == params.head_size && parts > 0 &&
        parts <= kHeadThreads / 4 && heads * parts >= kHeadThreads / 2 &&
        heads <= kHeadThreads * kHeads) {
      return LaunchHeads<T, Table, kPairs>(stream, params);
    }
  }
  return wide ? LaunchUnits<T, Table, kPairs, kNeox>(stream, params)
              : LaunchUnits<T, Table, 1, kNeox>(stream, params);
}

}  // namespace

cudaError_t LaunchRotaryEmbedding(cudaStream_t stream,
                                  const RotaryEmbeddingParams& params) {
  return DispatchCudaFloat(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (params.cache_dtype == DType::kF32) {
      return params.is_neox ? Launch<T, float, true>(stream, params)
                            : Launch<T, float, false>(stream, params);
    }
    return params.is_neox ? Launch<T, T, true>(stream, params)
                          : Launch<T, T, false>(stream, params);
  });
}

}  // namespace xla_ops
