// Writes keys and values into a cache of vLLM's first layout, on CUDA: bound by
// memory. Elements of one head and page that lie side by side in the cache are
// those of neighbouring slots, and neighbouring tokens nearly always have such
// slots. So a warp takes two units of 16 bytes of each of 16 tokens: it reads
// whole sectors of 32 bytes of every row, and of a value cache writes 16
// neighbours at a time, of a key cache 16 times x.
//
// Tested by tests/gpu/check_elementwise.py and
// tests/ops/test_reshape_and_cache.py.

#include "xla_ops/cc/ops/reshape_and_cache/reshape_and_cache.h"

#include <cstdint>
#include <cstdio>

#include "xla_ops/cc/device/dtype.cuh"
#include "xla_ops/cc/device/fast_div.h"
#include "xla_ops/cc/device/fp8.cuh"
#include "xla_ops/cc/device/launch.h"
#include "xla_ops/cc/device/quant.cuh"
#include "xla_ops/cc/device/vector.cuh"
#include "xla_ops/cc/ops/reshape_and_cache/reshape_and_cache_launch.h"

namespace xla_ops {
namespace {

constexpr int kThreads = 256;
// Of a block, and the units that it takes of each.
constexpr int kTokens = 16;
constexpr int kUnits = kThreads / kTokens;

// A plain copy: `Element` is an unsigned type of the elements' size.
template <typename Element>
struct Copy {
  using Source = Element;
  using Target = Element;

  template <int kSize>
  __device__ static Vector<Target, kSize> Convert(
      const Vector<Source, kSize>& source, const float*) {
    return source;
  }
};

// To fp8, by a scale.
template <typename T, __nv_fp8_interpretation_t kFormat>
struct Quantize {
  using Source = T;
  using Target = uint8_t;

  template <int kSize>
  __device__ static Vector<Target, kSize> Convert(
      const Vector<Source, kSize>& source, const float* scale) {
    const ScaleDiv<T> div(scale != nullptr ? *scale : 1.0f);
    float values[kSize];
    float scaled[kSize];
#pragma unroll
    for (int i = 0; i < kSize; ++i) values[i] = ToFloat(source[i]);
    div.Divide(values, scaled);
    Vector<Target, kSize> codes;
    if constexpr (kSize % 2 == 0) {
      auto* pairs = reinterpret_cast<uint16_t*>(codes.data);
#pragma unroll
      for (int i = 0; i < kSize / 2; ++i) {
        pairs[i] = ToFp8Pair<kFormat>(scaled[2 * i], scaled[2 * i + 1]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kSize; ++i) codes[i] = ToFp8<kFormat>(scaled[i]);
    }
    return codes;
  }
};

template <typename Map>
struct Side {
  const typename Map::Source* rows;
  typename Map::Target* cache;
  const float* scale;
  int64_t block_stride;
  FastDiv x;
};

template <typename Map>
struct Task {
  Side<Map> sides[2];
  const int64_t* slot_mapping;
  int64_t num_tokens;
  int64_t num_slots;  // num_blocks * page_size
  int64_t page_size;
  int row_units;
  int head_dim;
  FastDiv head_units;
};

// 64-bit division costs some 100 instructions; slots nearly always fit in
// 32 bits.
__device__ __forceinline__ int64_t DivideSlot(int64_t slot, int64_t page_size) {
  if (((slot | page_size) >> 32) == 0) {
    return static_cast<uint32_t>(slot) / static_cast<uint32_t>(page_size);
  }
  return slot / page_size;
}

// Threads: blockIdx.x runs over tokens, y over the units of a row, z over the
// caches; of a warp's lanes the lowest bit is the unit, the others the token. A
// unit is kSize elements of one head, aligned in the rows; in a cache whose x
// is not 1 it lies together, aligned (all checked by the launcher).
template <typename Map, int kSize>
__global__ void __launch_bounds__(kThreads)
    ReshapeAndCacheKernel(const Task<Map> task) {
  const Side<Map> side = blockIdx.z == 0 ? task.sides[0] : task.sides[1];
  const int64_t token =
      int64_t{blockIdx.x} * kTokens + (threadIdx.x / 2) % kTokens;
  const int unit =
      blockIdx.y * kUnits + threadIdx.x / (2 * kTokens) * 2 + threadIdx.x % 2;
  if (token >= task.num_tokens || unit >= task.row_units) return;
  // Padding's too, so as not to wait for the slot first.
  const auto source =
      LoadVector<kSize>(side.rows + (token * task.row_units + unit) * kSize);
  const int64_t slot = task.slot_mapping[token];
  if (slot < 0 || slot >= task.num_slots) return;
  const auto converted = Map::template Convert<kSize>(source, side.scale);

  const int64_t block = DivideSlot(slot, task.page_size);
  const int64_t offset = slot - block * task.page_size;
  const int head = task.head_units.Divide(unit);
  const int d = (unit - head * task.head_units.value()) * kSize;
  const int x = side.x.value();
  typename Map::Target* target = side.cache + block * side.block_stride +
                                 offset * x +
                                 int64_t{head} * task.head_dim * task.page_size;
  if (kSize > 1 && x == 1) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      target[(d + i) * task.page_size] = converted[i];
    }
  } else {
    const int chunk = side.x.Divide(d) * x;
    StoreGlobal(target + chunk * task.page_size + (d - chunk), converted);
  }
}

// Debug only: says which tokens the kernel above skips for their slot.
// Negative slots are padding and no error.
__global__ void ReportSlotsKernel(const int64_t* slot_mapping,
                                  int64_t num_tokens, int64_t num_slots) {
  const int64_t token = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (token >= num_tokens || slot_mapping[token] < num_slots) return;
  printf(
      "xla_ops: reshape_and_cache: slot_mapping[%lld] must be less than %lld, "
      "got %lld; skipped\n",
      static_cast<long long>(token), static_cast<long long>(num_slots),
      static_cast<long long>(slot_mapping[token]));
}

// Whether units of `size` elements are aligned in the rows and, where they are
// not taken apart, in the cache.
bool UnitsFit(const ReshapeAndCacheParams& params, int64_t size) {
  bool fit = params.head_dim % size == 0;
  for (int i = 0; i < params.num_sides; ++i) {
    const ReshapeAndCacheSide& side = params.sides[i];
    fit = fit && IsAligned(side.rows, size * SizeOf(params.dtype));
    if (side.x == 1) continue;
    fit = fit && side.x % size == 0 && side.block_stride % size == 0 &&
          IsAligned(side.cache, size * SizeOf(params.cache_dtype));
  }
  return fit;
}

template <typename Map, int kSize>
cudaError_t LaunchUnits(cudaStream_t stream,
                        const ReshapeAndCacheParams& params) {
  const int64_t row_units = params.num_kv_heads * params.head_dim / kSize;
  const int64_t columns = CeilDivide(row_units, kUnits);
  static_assert(kMaxCudaTokenElements / kUnits <= kMaxGridY);
  Task<Map> task = {};
  for (int i = 0; i < params.num_sides; ++i) {
    const ReshapeAndCacheSide& side = params.sides[i];
    task.sides[i].cache = static_cast<typename Map::Target*>(side.cache);
    task.sides[i].scale = side.scale;
    task.sides[i].block_stride = side.block_stride;
    task.sides[i].x = FastDiv(side.x);
  }
  task.num_slots = params.num_blocks * params.page_size;
  task.page_size = params.page_size;
  task.row_units = static_cast<int>(row_units);
  task.head_dim = static_cast<int>(params.head_dim);
  task.head_units = FastDiv(params.head_dim / kSize);
  return ForEachGrid(
      params.num_tokens, kTokens, [&](int64_t first, int64_t tokens) {
        for (int i = 0; i < params.num_sides; ++i) {
          task.sides[i].rows =
              static_cast<const typename Map::Source*>(params.sides[i].rows) +
              first * row_units * kSize;
        }
        task.slot_mapping = params.slot_mapping + first;
        task.num_tokens = tokens;
        const dim3 grid(static_cast<unsigned>(CeilDivide(tokens, kTokens)),
                        static_cast<unsigned>(columns),
                        static_cast<unsigned>(params.num_sides));
        return LaunchKernel<ReshapeAndCacheKernel<Map, kSize>>(stream, grid,
                                                               kThreads, task);
      });
}

template <typename Map>
cudaError_t Launch(cudaStream_t stream, const ReshapeAndCacheParams& params) {
  constexpr int kSize = kWideSize<typename Map::Source>;
  return UnitsFit(params, kSize) ? LaunchUnits<Map, kSize>(stream, params)
                                 : LaunchUnits<Map, 1>(stream, params);
}

template <__nv_fp8_interpretation_t kFormat>
cudaError_t LaunchQuantizing(cudaStream_t stream,
                             const ReshapeAndCacheParams& params) {
  return DispatchCudaFloat(params.dtype, [&](auto tag) {
    return Launch<Quantize<typename decltype(tag)::type, kFormat>>(stream,
                                                                   params);
  });
}

}  // namespace

cudaError_t LaunchReshapeAndCache(cudaStream_t stream,
                                  const ReshapeAndCacheParams& params) {
  if (params.num_tokens == 0) return cudaSuccess;
  if (params.debug) {
    const int64_t blocks = CeilDivide(params.num_tokens, kThreads);
    const cudaError_t error = LaunchKernel<ReportSlotsKernel>(
        stream, static_cast<unsigned>(blocks), kThreads, params.slot_mapping,
        params.num_tokens, params.num_blocks * params.page_size);
    if (error != cudaSuccess) return error;
  }
  if (IsEmpty(params)) return cudaSuccess;
  switch (params.cache_dtype) {
    case DType::kF8E4M3FN:
      return LaunchQuantizing<__NV_E4M3>(stream, params);
    case DType::kF8E5M2:
      return LaunchQuantizing<__NV_E5M2>(stream, params);
    case DType::kF32:
      return Launch<Copy<uint32_t>>(stream, params);
    default:
      return Launch<Copy<uint16_t>>(stream, params);
  }
}

}  // namespace xla_ops
