// Tensor-core and asynchronous-copy instructions of compute capability 8.0
// and later, on 16-bit operands in shared memory.
//
// A shared tile is [rows][kColumns] of 16-bit elements, kColumns 32 or a
// multiple of 64. Its 16-byte pieces ("chunks") are swizzled so that the eight
// rows that one ldmatrix phase reads lie in different banks; TileAddress is
// the only code that knows the order. A tile of bytes counts two a column.
//
// Fragments of mma.m16n8k16, for lane = 4 * g + t (PTX ISA, "Matrix
// Fragments for mma.m16n8k16"): an accumulator holds
//   c[0], c[1]: row g,     columns 2t, 2t + 1
//   c[2], c[3]: row g + 8, columns 2t, 2t + 1

#ifndef XLA_OPS_CC_DEVICE_MMA_CUH_
#define XLA_OPS_CC_DEVICE_MMA_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace xla_ops {

// Compiled for one architecture at a time: kernels test this and leave their
// body empty where it is false. The launcher asks the loaded kernel for the
// architecture that it was compiled for.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define XLA_OPS_HAS_MMA 1
#else
#define XLA_OPS_HAS_MMA 0
#endif

// Elements of a chunk.
constexpr int kChunk = 8;

// Shared-memory address of a chunk of the tile at `tile` (a shared-memory
// address, aligned to 128 bytes).
template <int kColumns>
__device__ __forceinline__ uint32_t TileAddress(uint32_t tile, int row,
                                                int chunk) {
  static_assert(kColumns == 32 || kColumns % 64 == 0);
  const int swizzle = kColumns == 32 ? row >> 1 & 3 : row & 7;
  return tile + (row * (kColumns / kChunk) + (chunk ^ swizzle)) * 16;
}

__device__ __forceinline__ uint32_t SharedAddress(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

#if XLA_OPS_HAS_MMA

// Copies 16 bytes to shared memory, or writes zeros there: `source` must be
// a valid, aligned address either way, and is read only when `valid`.
__device__ __forceinline__ void CopyAsync(uint32_t target, const void* source,
                                          bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile(
      "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(target),
      "l"(__cvta_generic_to_global(source)), "r"(bytes)
      : "memory");
}

// The same where it is valid.
__device__ __forceinline__ void CopyAsync(uint32_t target, const void* source) {
  asm volatile(
      "cp.async.cg.shared.global.L2::128B [%0], [%1], 16;\n" ::"r"(target),
      "l"(__cvta_generic_to_global(source))
      : "memory");
}

__device__ __forceinline__ void CommitCopies() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}

// Waits for this thread's own copies, but for the `kPending` last committed
// groups; other threads' copies need a barrier too.
template <int kPending = 0>
__device__ __forceinline__ void WaitForCopies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// Loads four 8x8 matrices; lanes 8 i .. 8 i + 7 give the rows' addresses of
// matrix i.
__device__ __forceinline__ void LoadMatrices(uint32_t address,
                                             uint32_t (&m)[4]) {
  asm volatile(
      "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
      : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
      : "r"(address)
      : "memory");
}

__device__ __forceinline__ void LoadMatricesTransposed(uint32_t address,
                                                       uint32_t (&m)[4]) {
  asm volatile(
      "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, "
      "[%4];\n"
      : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
      : "r"(address)
      : "memory");
}

// c += a b for a 16x16 by 16x8 product of T with fp32 accumulation.
template <typename T>
__device__ __forceinline__ void Mma(const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1, float (&c)[4]) {
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    static_assert(std::is_same_v<T, __nv_bfloat16>);
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

#endif  // XLA_OPS_HAS_MMA

// Two values rounded to T, the first in the low half.
template <typename T>
__device__ __forceinline__ uint32_t PackPair(float low, float high) {
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_DEVICE_MMA_CUH_
