// Matrix products of a warpgroup (wgmma) of compute capability 9.0a, on
// 16-bit operands with fp32 accumulation.
//
// Operands in shared memory are made of atoms: 8 rows of 64 columns, 128 bytes
// a row, aligned to 1024 bytes and swizzled as TMA's 128-byte mode does: the
// 16-byte piece c of row r lies at piece c ^ (r % 8). A "panel" is 64 columns.
// PTX ISA, "Shared Memory Matrix Layout" and "Matrix Descriptor".
//
// Accumulator of m64nN: thread t of the warpgroup, lane l = t % 32, holds
//   d[4 j], d[4 j + 1]:     row 16 (t / 32) + l / 4,     columns
//   d[4 j + 2], d[4 j + 3]: row 16 (t / 32) + l / 4 + 8, 8 j + 2 (l % 4) + 0, 1
//
// A product is asynchronous: FenceRegisters, WgmmaFence, products, WgmmaCommit,
// then WgmmaWait<n> (all but the last n groups are done) before its
// registers and its shared memory are touched.

#ifndef XLA_OPS_CC_DEVICE_WGMMA_CUH_
#define XLA_OPS_CC_DEVICE_WGMMA_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace xla_ops {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define XLA_OPS_HAS_WGMMA 1
#else
#define XLA_OPS_HAS_WGMMA 0
#endif

// Kernels would be empty, and do nothing without a word.
#if defined(__CUDA_ARCH__) && !XLA_OPS_HAS_WGMMA
#error "wgmma.cuh is for compute capability 9.0a: see *_sm90.cu.cc in ops.bzl"
#endif

constexpr int kPanelRowBytes = 128;
constexpr int kPanelColumns = 64;
constexpr int kAtomRows = 8;
constexpr int kAtomBytes = kAtomRows * kPanelRowBytes;

#if XLA_OPS_HAS_WGMMA

// The part of a matrix descriptor that is the same for every address: the
// bytes from an atom to the next 8 rows' (PTX's stride dimension byte offset)
// and from a panel to the next (its leading dimension byte offset). The second
// matters only to an operand whose rows are the summed dimension (V in P V);
// the others (Q, K) are described a panel at a time.
__device__ __forceinline__ uint64_t DescriptorLayout(int atom_stride,
                                                     int panel_stride) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  return kSwizzle128 | (uint64_t(atom_stride >> 4) << 32) |
         (uint64_t(panel_stride >> 4) << 16);
}

__device__ __forceinline__ uint64_t DescriptorAt(uint64_t layout,
                                                 uint32_t address) {
  return layout | ((address & 0x3FFFF) >> 4);
}

// The descriptor of what lies `bytes` further, a multiple of 16. The address is
// in the lower half, and shared memory ends long before its field does.
__device__ __forceinline__ uint64_t Advance(uint64_t descriptor,
                                            uint32_t bytes) {
  const uint32_t lower = static_cast<uint32_t>(descriptor) + (bytes >> 4);
  return (descriptor & ~uint64_t{0xFFFFFFFF}) | lower;
}

__device__ __forceinline__ void WgmmaFence() {
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
}

__device__ __forceinline__ void WgmmaCommit() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}

template <int kPending>
__device__ __forceinline__ void WgmmaWait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending)
               : "memory");
}

// Keeps the compiler from moving uses of the registers across this point.
template <int kSize>
__device__ __forceinline__ void FenceRegisters(float (&registers)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    asm volatile("" : "+f"(registers[i])::"memory");
  }
}

// The same for the first operand of RS products: what packs it must not sink
// below WgmmaFence, which PTX leaves undefined.
template <int kCount>
__device__ __forceinline__ void FenceRegisters(
    uint32_t (&registers)[kCount][4]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      asm volatile("" : "+r"(registers[i][j])::"memory");
    }
  }
}

// Eight registers of an accumulator, as operands.
#define XLA_OPS_OUT8(i)                                                       \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), \
      "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])

// `multiply` with PTX's name of T: the text of asm comes from no template.
#define XLA_OPS_FOR_TYPE(T, multiply)                \
  if constexpr (std::is_same_v<T, __half>) {         \
    multiply("f16");                                 \
  } else {                                           \
    static_assert(std::is_same_v<T, __nv_bfloat16>); \
    multiply("bf16");                                \
  }

// SS, both operands in shared memory: d (+)= A B^T for A 64 x 16 and B N x 16,
// N = 2 * size of d. kRowsA, kRowsB: that operand's rows are the summed
// dimension, so that A is 16 x 64, or B 16 x N.
template <typename T>
__device__ __forceinline__ void WgmmaSS(float (&d)[4], uint64_t a, uint64_t b,
                                        bool add) {
#define XLA_OPS_WGMMA(type)                                      \
  asm volatile(                                                  \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %6, 0;\n"                \
      "wgmma.mma_async.sync.aligned.m64n8k16.f32." type "." type \
      " {%0, %1, %2, %3}, "                                      \
      "%4, %5, p, 1, 1, 0, 0;\n}\n"                              \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])           \
      : "l"(a), "l"(b), "r"(static_cast<int>(add)))
  XLA_OPS_FOR_TYPE(T, XLA_OPS_WGMMA)
#undef XLA_OPS_WGMMA
}

template <typename T>
__device__ __forceinline__ void WgmmaSS(float (&d)[8], uint64_t a, uint64_t b,
                                        bool add) {
#define XLA_OPS_WGMMA(type)                                       \
  asm volatile(                                                   \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %10, 0;\n"                \
      "wgmma.mma_async.sync.aligned.m64n16k16.f32." type "." type \
      " {%0, %1, %2, %3, %4, %5, %6, %7}, "                       \
      "%8, %9, p, 1, 1, 0, 0;\n}\n"                               \
      : XLA_OPS_OUT8(0)                                           \
      : "l"(a), "l"(b), "r"(static_cast<int>(add)))
  XLA_OPS_FOR_TYPE(T, XLA_OPS_WGMMA)
#undef XLA_OPS_WGMMA
}

template <typename T>
__device__ __forceinline__ void WgmmaSS(float (&d)[16], uint64_t a, uint64_t b,
                                        bool add) {
#define XLA_OPS_WGMMA(type)                                       \
  asm volatile(                                                   \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n"                \
      "wgmma.mma_async.sync.aligned.m64n32k16.f32." type "." type \
      " {%0, %1, %2, %3, %4, %5, %6, %7, "                        \
      " %8, %9, %10, %11, %12, %13, %14, %15}, "                  \
      "%16, %17, p, 1, 1, 0, 0;\n}\n"                             \
      : XLA_OPS_OUT8(0), XLA_OPS_OUT8(8)                          \
      : "l"(a), "l"(b), "r"(static_cast<int>(add)))
  XLA_OPS_FOR_TYPE(T, XLA_OPS_WGMMA)
#undef XLA_OPS_WGMMA
}

template <typename T, bool kRowsA = false, bool kRowsB = false>
__device__ __forceinline__ void WgmmaSS(float (&d)[32], uint64_t a, uint64_t b,
                                        bool add) {
#define XLA_OPS_WGMMA(type)                                                  \
  asm volatile(                                                              \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"                           \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type            \
      " {%0, %1, %2, %3, %4, %5, %6, %7, "                                   \
      " %8, %9, %10, %11, %12, %13, %14, %15, "                              \
      " %16, %17, %18, %19, %20, %21, %22, %23, "                            \
      " %24, %25, %26, %27, %28, %29, %30, %31}, "                           \
      "%32, %33, p, 1, 1, %35, %36;\n}\n"                                    \
      : XLA_OPS_OUT8(0), XLA_OPS_OUT8(8), XLA_OPS_OUT8(16), XLA_OPS_OUT8(24) \
      : "l"(a), "l"(b), "r"(static_cast<int>(add)),                          \
        "n"(static_cast<int>(kRowsA)), "n"(static_cast<int>(kRowsB)))
  XLA_OPS_FOR_TYPE(T, XLA_OPS_WGMMA)
#undef XLA_OPS_WGMMA
}

template <typename T>
__device__ __forceinline__ void WgmmaSS(float (&d)[40], uint64_t a, uint64_t b,
                                        bool add) {
#define XLA_OPS_WGMMA(type)                                                   \
  asm volatile(                                                               \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %42, 0;\n"                            \
      "wgmma.mma_async.sync.aligned.m64n80k16.f32." type "." type             \
      " {%0, %1, %2, %3, %4, %5, %6, %7, "                                    \
      " %8, %9, %10, %11, %12, %13, %14, %15, "                               \
      " %16, %17, %18, %19, %20, %21, %22, %23, "                             \
      " %24, %25, %26, %27, %28, %29, %30, %31, "                             \
      " %32, %33, %34, %35, %36, %37, %38, %39}, "                            \
      "%40, %41, p, 1, 1, 0, 0;\n}\n"                                         \
      : XLA_OPS_OUT8(0), XLA_OPS_OUT8(8), XLA_OPS_OUT8(16), XLA_OPS_OUT8(24), \
        XLA_OPS_OUT8(32)                                                      \
      : "l"(a), "l"(b), "r"(static_cast<int>(add)))
  XLA_OPS_FOR_TYPE(T, XLA_OPS_WGMMA)
#undef XLA_OPS_WGMMA
}

template <typename T, bool kRowsA = false, bool kRowsB = false>
__device__ __forceinline__ void WgmmaSS(float (&d)[64], uint64_t a, uint64_t b,
                                        bool add) {
#define XLA_OPS_WGMMA(type)                                                    \
  asm volatile(                                                                \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"                             \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type             \
      " {%0, %1, %2, %3, %4, %5, %6, %7, "                                     \
      " %8, %9, %10, %11, %12, %13, %14, %15, "                                \
      " %16, %17, %18, %19, %20, %21, %22, %23, "                              \
      " %24, %25, %26, %27, %28, %29, %30, %31, "                              \
      " %32, %33, %34, %35, %36, %37, %38, %39, "                              \
      " %40, %41, %42, %43, %44, %45, %46, %47, "                              \
      " %48, %49, %50, %51, %52, %53, %54, %55, "                              \
      " %56, %57, %58, %59, %60, %61, %62, %63}, "                             \
      "%64, %65, p, 1, 1, %67, %68;\n}\n"                                      \
      : XLA_OPS_OUT8(0), XLA_OPS_OUT8(8), XLA_OPS_OUT8(16), XLA_OPS_OUT8(24),  \
        XLA_OPS_OUT8(32), XLA_OPS_OUT8(40), XLA_OPS_OUT8(48), XLA_OPS_OUT8(56) \
      : "l"(a), "l"(b), "r"(static_cast<int>(add)),                            \
        "n"(static_cast<int>(kRowsA)), "n"(static_cast<int>(kRowsB)))
  XLA_OPS_FOR_TYPE(T, XLA_OPS_WGMMA)
#undef XLA_OPS_WGMMA
}

// RS, the first operand in registers: d (+)= A B for A 64 x 16 (as mma.m16n8k16
// has it) and B 16 x N in shared memory, its rows the summed dimension.
template <typename T>
__device__ __forceinline__ void WgmmaRS(float (&d)[32], const uint32_t (&a)[4],
                                        uint64_t b, bool add) {
#define XLA_OPS_WGMMA(type)                                                  \
  asm volatile(                                                              \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"                           \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type            \
      " {%0, %1, %2, %3, %4, %5, %6, %7, "                                   \
      " %8, %9, %10, %11, %12, %13, %14, %15, "                              \
      " %16, %17, %18, %19, %20, %21, %22, %23, "                            \
      " %24, %25, %26, %27, %28, %29, %30, %31}, "                           \
      "{%32, %33, %34, %35}, %36, p, 1, 1, 1;\n}\n"                          \
      : XLA_OPS_OUT8(0), XLA_OPS_OUT8(8), XLA_OPS_OUT8(16), XLA_OPS_OUT8(24) \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),                  \
        "r"(static_cast<int>(add)))
  XLA_OPS_FOR_TYPE(T, XLA_OPS_WGMMA)
#undef XLA_OPS_WGMMA
}

template <typename T>
__device__ __forceinline__ void WgmmaRS(float (&d)[64], const uint32_t (&a)[4],
                                        uint64_t b, bool add) {
#define XLA_OPS_WGMMA(type)                                                    \
  asm volatile(                                                                \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"                             \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type             \
      " {%0, %1, %2, %3, %4, %5, %6, %7, "                                     \
      " %8, %9, %10, %11, %12, %13, %14, %15, "                                \
      " %16, %17, %18, %19, %20, %21, %22, %23, "                              \
      " %24, %25, %26, %27, %28, %29, %30, %31, "                              \
      " %32, %33, %34, %35, %36, %37, %38, %39, "                              \
      " %40, %41, %42, %43, %44, %45, %46, %47, "                              \
      " %48, %49, %50, %51, %52, %53, %54, %55, "                              \
      " %56, %57, %58, %59, %60, %61, %62, %63}, "                             \
      "{%64, %65, %66, %67}, %68, p, 1, 1, 1;\n}\n"                            \
      : XLA_OPS_OUT8(0), XLA_OPS_OUT8(8), XLA_OPS_OUT8(16), XLA_OPS_OUT8(24),  \
        XLA_OPS_OUT8(32), XLA_OPS_OUT8(40), XLA_OPS_OUT8(48), XLA_OPS_OUT8(56) \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),                    \
        "r"(static_cast<int>(add)))
  XLA_OPS_FOR_TYPE(T, XLA_OPS_WGMMA)
#undef XLA_OPS_WGMMA
}

template <typename T>
__device__ __forceinline__ void WgmmaRS(float (&d)[128], const uint32_t (&a)[4],
                                        uint64_t b, bool add) {
#define XLA_OPS_WGMMA(type)                                                   \
  asm volatile(                                                               \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %133, 0;\n"                           \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type            \
      " {%0, %1, %2, %3, %4, %5, %6, %7, "                                    \
      " %8, %9, %10, %11, %12, %13, %14, %15, "                               \
      " %16, %17, %18, %19, %20, %21, %22, %23, "                             \
      " %24, %25, %26, %27, %28, %29, %30, %31, "                             \
      " %32, %33, %34, %35, %36, %37, %38, %39, "                             \
      " %40, %41, %42, %43, %44, %45, %46, %47, "                             \
      " %48, %49, %50, %51, %52, %53, %54, %55, "                             \
      " %56, %57, %58, %59, %60, %61, %62, %63, "                             \
      " %64, %65, %66, %67, %68, %69, %70, %71, "                             \
      " %72, %73, %74, %75, %76, %77, %78, %79, "                             \
      " %80, %81, %82, %83, %84, %85, %86, %87, "                             \
      " %88, %89, %90, %91, %92, %93, %94, %95, "                             \
      " %96, %97, %98, %99, %100, %101, %102, %103, "                         \
      " %104, %105, %106, %107, %108, %109, %110, %111, "                     \
      " %112, %113, %114, %115, %116, %117, %118, %119, "                     \
      " %120, %121, %122, %123, %124, %125, %126, %127}, "                    \
      "{%128, %129, %130, %131}, %132, p, 1, 1, 1;\n}\n"                      \
      : XLA_OPS_OUT8(0), XLA_OPS_OUT8(8), XLA_OPS_OUT8(16), XLA_OPS_OUT8(24), \
        XLA_OPS_OUT8(32), XLA_OPS_OUT8(40), XLA_OPS_OUT8(48),                 \
        XLA_OPS_OUT8(56), XLA_OPS_OUT8(64), XLA_OPS_OUT8(72),                 \
        XLA_OPS_OUT8(80), XLA_OPS_OUT8(88), XLA_OPS_OUT8(96),                 \
        XLA_OPS_OUT8(104), XLA_OPS_OUT8(112), XLA_OPS_OUT8(120)               \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),                   \
        "r"(static_cast<int>(add)))
  XLA_OPS_FOR_TYPE(T, XLA_OPS_WGMMA)
#undef XLA_OPS_WGMMA
}

#undef XLA_OPS_FOR_TYPE
#undef XLA_OPS_OUT8

#endif  // XLA_OPS_HAS_WGMMA

}  // namespace xla_ops

#endif  // XLA_OPS_CC_DEVICE_WGMMA_CUH_
