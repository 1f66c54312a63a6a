// Several elements moved by one memory instruction.
//
//   Vector<__half, 8> x = LoadVector<8>(row + 8 * i);  // one 16-byte load
//   StoreGlobal(out + 8 * i, x);                       // one 16-byte store
//
// The pointer must be aligned to the vector's size; launchers check that
// with IsAligned() and pick a narrower kernel where it does not hold.

#ifndef XLA_OPS_CC_DEVICE_VECTOR_CUH_
#define XLA_OPS_CC_DEVICE_VECTOR_CUH_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstring>

namespace xla_ops {

template <typename T, int kSize>
struct alignas(sizeof(T) * kSize > 16 ? 16 : sizeof(T) * kSize) Vector {
  T data[kSize];

  __device__ __forceinline__ T& operator[](int i) { return data[i]; }
  __device__ __forceinline__ const T& operator[](int i) const {
    return data[i];
  }
};

// How many elements of T fill 16 bytes.
template <typename T>
constexpr int kWideSize = 16 / static_cast<int>(sizeof(T));

template <int kSize, typename T>
__device__ __forceinline__ Vector<T, kSize> LoadVector(const T* source) {
  return *reinterpret_cast<const Vector<T, kSize>*>(source);
}

// The same, at once: the compiler may put off other loads until their result
// is needed, to save registers. Not for memory that this thread has written.
template <int kSize, typename T>
__device__ __forceinline__ Vector<T, kSize> LoadEagerly(const T* source) {
  Vector<T, kSize> value;
  if constexpr (sizeof(value) == 16) {
    uint32_t words[4];
    asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]),
                   "=r"(words[3])
                 : "l"(__cvta_generic_to_global(source)));
    memcpy(&value, words, sizeof(value));
  } else {
    value = LoadVector<kSize>(source);
  }
  return value;
}

template <typename T, int kSize>
__device__ __forceinline__ void StoreVector(T* target,
                                            const Vector<T, kSize>& value) {
  *reinterpret_cast<Vector<T, kSize>*>(target) = value;
}

// Stores to global memory by one instruction, written out because nvcc 13 cuts
// the copy of a struct into stores of 4 bytes wherever the target may alias
// something.
template <typename T, int kSize>
__device__ __forceinline__ void StoreGlobal(T* target,
                                            const Vector<T, kSize>& value) {
  constexpr int kBytes = sizeof(value);
  static_assert(kBytes <= 16);
  if constexpr (kBytes < 8) {
    StoreVector(target, value);
  } else {
    const size_t address = __cvta_generic_to_global(target);
    uint32_t words[kBytes / 4];
    memcpy(words, &value, kBytes);
    if constexpr (kBytes == 8) {
      asm volatile("st.global.v2.b32 [%0], {%1, %2};\n" ::"l"(address),
                   "r"(words[0]), "r"(words[1])
                   : "memory");
    } else {
      asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"l"(address),
                   "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
                   : "memory");
    }
  }
}

// Has the compiler forget what it computed from `value`. A row that waits for
// its reduction so stays packed: without it the compiler keeps the elements as
// floats, twice the registers, to save their conversion after it.
template <typename T, int kSize>
__device__ __forceinline__ void KeepPacked(Vector<T, kSize>& value) {
  if constexpr (sizeof(T) < 4 && sizeof(value) == 16) {
    uint32_t words[4];
    memcpy(words, &value, 16);
    asm volatile(""
                 : "+r"(words[0]), "+r"(words[1]), "+r"(words[2]),
                   "+r"(words[3]));
    memcpy(&value, words, 16);
  }
}

inline bool IsAligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_DEVICE_VECTOR_CUH_
