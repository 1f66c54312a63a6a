// What kernels share that write rows of keys and values into a paged cache.
//
// Tested through reshape_and_cache_flash and fused_qk_norm_rope_and_cache by
// tests/gpu/check_kernels.py.

#ifndef XLA_OPS_CC_DEVICE_CACHE_WRITE_CUH_
#define XLA_OPS_CC_DEVICE_CACHE_WRITE_CUH_

#include <cstdint>

#include "xla_ops/cc/device/dtype.cuh"
#include "xla_ops/cc/device/fp8.cuh"
#include "xla_ops/cc/device/vector.cuh"

namespace xla_ops {

// Elements as an fp8 cache stores them: saturating, of float(x) / scale.
template <__nv_fp8_interpretation_t kFormat, typename T, int kSize>
__device__ __forceinline__ Vector<uint8_t, kSize> ToFp8Vector(
    const Vector<T, kSize>& source, float scale) {
  Vector<uint8_t, kSize> target;
  if constexpr (kSize % 2 == 0) {
    auto* pairs = reinterpret_cast<uint16_t*>(target.data);
#pragma unroll
    for (int i = 0; i < kSize / 2; ++i) {
      pairs[i] = ToFp8Pair<kFormat>(ToFloat(source[2 * i]) / scale,
                                    ToFloat(source[2 * i + 1]) / scale);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      target[i] = ToFp8<kFormat>(ToFloat(source[i]) / scale);
    }
  }
  return target;
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_DEVICE_CACHE_WRITE_CUH_
