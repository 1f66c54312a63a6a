// linear's CPU kernel on AVX2, see linear_tile_simd.h.

#include <immintrin.h>

#include <cstdint>

#include "xla_ops/cc/core/float.h"
#include "xla_ops/cc/ops/grouped_matmul/linear_tile.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

#include "xla_ops/cc/ops/grouped_matmul/linear_tile_simd.h"

namespace xla_ops {
namespace {

struct Avx2 {
  using Vector = __m256;
  static constexpr int kLanes = 8;
  static constexpr int kMaxRows = 4;
  // 12 of 16 registers for sums.
  static constexpr int Columns(int rows) {
    return rows == 1 ? 8 : rows == 2 ? 4 : 3;
  }

  static Vector Load(const float* from) { return _mm256_loadu_ps(from); }
  static Vector Load(const BFloat16* from) {
    const __m128i bits =
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static Vector Load(const Half* from) {
    return _mm256_cvtph_ps(
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  static Vector Zero() { return _mm256_setzero_ps(); }
  static Vector MultiplyAdd(Vector a, Vector b, Vector c) {
    return _mm256_fmadd_ps(a, b, c);
  }
  static float Sum(Vector v) {
    __m128 half =
        _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
};

}  // namespace

void MultiplyTileAvx2(const LinearTile& tile) { MultiplyTile<Avx2>(tile); }

}  // namespace xla_ops

#pragma GCC pop_options
