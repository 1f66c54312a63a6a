// linear's CPU kernel on AVX-512, see linear_tile_simd.h.

// GCC 12 takes the header's own undefined vectors for mistakes (its bug
// 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#include <immintrin.h>

#include <cstdint>

#include "xla_ops/cc/core/float.h"
#include "xla_ops/cc/ops/grouped_matmul/linear_tile.h"

#pragma GCC push_options
#pragma GCC target("avx512f")

#include "xla_ops/cc/ops/grouped_matmul/linear_tile_simd.h"

namespace xla_ops {
namespace {

struct Avx512 {
  using Vector = __m512;
  static constexpr int kLanes = 16;
  static constexpr int kMaxRows = 8;
  // 24 of 32 registers for sums.
  static constexpr int Columns(int rows) {
    return rows <= 2 ? 8 : rows <= 4 ? 6 : rows <= 6 ? 4 : 3;
  }

  static Vector Load(const float* from) { return _mm512_loadu_ps(from); }
  static Vector Load(const BFloat16* from) {
    const __m256i bits =
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static Vector Load(const Half* from) {
    return _mm512_cvtph_ps(
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  static Vector Zero() { return _mm512_setzero_ps(); }
  static Vector MultiplyAdd(Vector a, Vector b, Vector c) {
    return _mm512_fmadd_ps(a, b, c);
  }
  static float Sum(Vector v) { return _mm512_reduce_add_ps(v); }
};

}  // namespace

void MultiplyTileAvx512(const LinearTile& tile) { MultiplyTile<Avx512>(tile); }

}  // namespace xla_ops

#pragma GCC pop_options
