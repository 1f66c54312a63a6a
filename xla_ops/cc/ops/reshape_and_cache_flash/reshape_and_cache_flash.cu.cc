// Scatters keys and values into a paged KV cache on CUDA.
//
// Bound by memory. A token's row [num_kv_heads, head_dim] is cut into units,
// the widest piece that source and cache both allow: up to 16 bytes for a
// plain copy, eight elements for a conversion to fp8. One launch moves keys
// and values, so that each thread has two independent loads in flight.
//
// Tested by tests/gpu/check_kernels.py and
// tests/ops/test_reshape_and_cache_flash.py.

#include "xla_ops/cc/ops/reshape_and_cache_flash/reshape_and_cache_flash.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>

#include "xla_ops/cc/device/cache_write.cuh"
#include "xla_ops/cc/device/dtype.cuh"
#include "xla_ops/cc/device/launch.h"
#include "xla_ops/cc/device/vector.cuh"
#include "xla_ops/cc/ops/reshape_and_cache_flash/reshape_and_cache_flash_launch.h"

namespace xla_ops {
namespace {

constexpr int kThreads = 256;

// A unit of a plain copy: `Unit` is an unsigned type or vector of the unit's
// size, whatever the elements are.
template <typename Unit>
struct CopyUnit {
  using Source = Unit;
  using Target = Unit;
  static constexpr bool kScaled = false;
  __device__ static Target Convert(const Source& source, float) {
    return source;
  }
};

// A unit of kSize elements of T that become fp8.
template <typename T, int kSize, __nv_fp8_interpretation_t kFormat>
struct Fp8Unit {
  using Source = Vector<T, kSize>;
  using Target = Vector<uint8_t, kSize>;
  static constexpr bool kScaled = true;
  __device__ static Target Convert(const Source& source, float scale) {
    return ToFp8Vector<kFormat>(source, scale);
  }
};

// Sizes and strides in units, so that the kernel need not know elements.
struct Geometry {
  int64_t num_tokens;
  int64_t num_slots;  // num_blocks * page_size
  int64_t page_size;
  int64_t row_units;
  // Units of a row that lie together in the cache: a head's, or all of the
  // row where one head follows the other.
  int64_t run_units;
  int64_t block_stride;
  int64_t page_stride;
  int64_t run_stride;
};

// 64-bit division costs some 100 instructions; slots nearly always fit in
// 32 bits.
__device__ __forceinline__ int64_t DivideSlot(int64_t slot, int64_t page_size) {
  if (((slot | page_size) >> 32) == 0) {
    return static_cast<uint32_t>(slot) / static_cast<uint32_t>(page_size);
  }
  return slot / page_size;
}

// Threads: x runs over the units of a row, y over tokens. Units are aligned
// to their own size in sources and caches (checked by the launcher).
// `value` and `value_cache` may be null. The slot mapping is read by every
// thread of a token, one broadcast.
template <typename Unit>
__global__ void __launch_bounds__(kThreads)
    ReshapeAndCacheFlashKernel(const typename Unit::Source* __restrict__ key,
                               const typename Unit::Source* __restrict__ value,
                               typename Unit::Target* __restrict__ key_cache,
                               typename Unit::Target* __restrict__ value_cache,
                               const int64_t* __restrict__ slot_mapping,
                               const float* __restrict__ k_scale,
                               const float* __restrict__ v_scale,
                               const Geometry geometry) {
  const int64_t token = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  if (token >= geometry.num_tokens) return;
  const int64_t slot = slot_mapping[token];
  const int64_t source_row = token * geometry.row_units;
  const int row_units = static_cast<int>(geometry.row_units);
  int unit = threadIdx.x;
  typename Unit::Source k;
  typename Unit::Source v;
  const auto load = [&] {
    if (unit >= row_units) return;
    k = key[source_row + unit];
    if (value != nullptr) v = value[source_row + unit];
  };
  // Padding's too, so as not to wait for the slot first.
  load();
  if (slot < 0 || slot >= geometry.num_slots) return;
  const int64_t block = DivideSlot(slot, geometry.page_size);
  const int64_t offset = slot - block * geometry.page_size;
  const int64_t target_row =
      block * geometry.block_stride + offset * geometry.page_stride;
  float key_scale = 1.0f;
  float value_scale = 1.0f;
  if constexpr (Unit::kScaled) {
    if (k_scale != nullptr) key_scale = *k_scale;
    if (v_scale != nullptr) value_scale = *v_scale;
  }

  const int run_units = static_cast<int>(geometry.run_units);
  while (unit < row_units) {
    const int run = unit / run_units;
    const int64_t target =
        target_row + run * geometry.run_stride + (unit - run * run_units);
    key_cache[target] = Unit::Convert(k, key_scale);
    if (value != nullptr) value_cache[target] = Unit::Convert(v, value_scale);
    unit += blockDim.x;
    load();
  }
}

// Debug only: says which tokens the kernel above skips for their slot.
// Negative slots are padding and no error.
__global__ void ReportSlotsKernel(const int64_t* slot_mapping,
                                  int64_t num_tokens, int64_t num_slots) {
  const int64_t token = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (token >= num_tokens || slot_mapping[token] < num_slots) return;
  printf(
      "xla_ops: reshape_and_cache_flash: slot_mapping[%lld] must be less than "
      "%lld, got %lld; skipped\n",
      static_cast<long long>(token), static_cast<long long>(num_slots),
      static_cast<long long>(slot_mapping[token]));
}

// Heads that follow one another in the cache as they do in the source make
// one run.
bool OneRun(const ReshapeAndCacheFlashParams& params) {
  return params.num_kv_heads == 1 || params.head_stride == params.head_dim;
}

// Whether every unit of `size` elements lies inside one run and is aligned
// to its own size on both sides.
bool UnitsFit(const ReshapeAndCacheFlashParams& params, int64_t size) {
  const int64_t run =
      params.head_dim * (OneRun(params) ? params.num_kv_heads : 1);
  const int64_t source_bytes =
      std::min<int64_t>(16, size * SizeOf(params.dtype));
  const int64_t target_bytes = size * SizeOf(params.cache_dtype);
  return run % size == 0 && params.block_stride % size == 0 &&
         params.page_stride % size == 0 &&
         (OneRun(params) || params.head_stride % size == 0) &&
         IsAligned(params.key, source_bytes) &&
         IsAligned(params.value, source_bytes) &&
         IsAligned(params.key_cache, target_bytes) &&
         IsAligned(params.value_cache, target_bytes);
}

// Launches the kernel with units of `size` elements.
template <typename Unit>
cudaError_t LaunchUnits(cudaStream_t stream,
                        const ReshapeAndCacheFlashParams& params,
                        int64_t size) {
  Geometry geometry;
  geometry.num_slots = params.num_blocks * params.page_size;
  geometry.page_size = params.page_size;
  geometry.row_units = params.num_kv_heads * params.head_dim / size;
  geometry.run_units =
      OneRun(params) ? geometry.row_units : params.head_dim / size;
  geometry.block_stride = params.block_stride / size;
  geometry.page_stride = params.page_stride / size;
  geometry.run_stride = OneRun(params) ? 0 : params.head_stride / size;
  // Units of a row are counted in int, with room for one more step.
  static_assert(kMaxCudaTokenElements <= INT32_MAX - kThreads);

  const dim3 block = RowBlock(geometry.row_units, kThreads, kThreads);
  const auto* key = static_cast<const typename Unit::Source*>(params.key);
  const auto* value = static_cast<const typename Unit::Source*>(params.value);
  return ForEachGrid(
      params.num_tokens, block.y, [&](int64_t first, int64_t tokens) {
        geometry.num_tokens = tokens;
        const int64_t start = first * geometry.row_units;
        return LaunchKernel<ReshapeAndCacheFlashKernel<Unit>>(
            stream, static_cast<unsigned>(CeilDivide(tokens, block.y)), block,
            key + start, value == nullptr ? nullptr : value + start,
            static_cast<typename Unit::Target*>(params.key_cache),
            static_cast<typename Unit::Target*>(params.value_cache),
            params.slot_mapping + first, params.k_scale, params.v_scale,
            geometry);
      });
}

cudaError_t LaunchCopy(cudaStream_t stream,
                       const ReshapeAndCacheFlashParams& params) {
  const int64_t bytes = SizeOf(params.dtype);
  return DispatchUnit<2>(
      [&](int64_t size) { return UnitsFit(params, size / bytes); },
      [&](auto unit) {
        const int64_t size = sizeof(unit) / bytes;
        if (size == 0) return cudaErrorInvalidValue;  // fp32 not aligned to 4
        return LaunchUnits<CopyUnit<decltype(unit)>>(stream, params, size);
      });
}

template <__nv_fp8_interpretation_t kFormat>
cudaError_t LaunchConvert(cudaStream_t stream,
                          const ReshapeAndCacheFlashParams& params) {
  return DispatchCudaFloat(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (UnitsFit(params, 8)) {
      return LaunchUnits<Fp8Unit<T, 8, kFormat>>(stream, params, 8);
    }
    return LaunchUnits<Fp8Unit<T, 1, kFormat>>(stream, params, 1);
  });
}

}  // namespace

cudaError_t LaunchReshapeAndCacheFlash(
    cudaStream_t stream, const ReshapeAndCacheFlashParams& params) {
  if (params.num_tokens == 0) return cudaSuccess;
  const int64_t num_slots = params.num_blocks * params.page_size;
  if (params.debug) {
    const int64_t blocks = CeilDivide(params.num_tokens, kThreads);
    const cudaError_t error = LaunchKernel<ReportSlotsKernel>(
        stream, static_cast<unsigned>(blocks), kThreads, params.slot_mapping,
        params.num_tokens, num_slots);

    if (error != cudaSuccess) return error;
  }
  if (num_slots == 0 || params.num_kv_heads == 0 || params.head_dim == 0) {
    return cudaSuccess;
  }
  switch (params.cache_dtype) {
    case DType::kF8E4M3FN:
      return LaunchConvert<__NV_E4M3>(stream, params);
    case DType::kF8E5M2:
      return LaunchConvert<__NV_E5M2>(stream, params);
    default:
      return params.cache_dtype == params.dtype ? LaunchCopy(stream, params)
                                                : cudaErrorInvalidValue;
  }
}

}  // namespace xla_ops
