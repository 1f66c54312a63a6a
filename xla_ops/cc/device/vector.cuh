// Several elements moved by one memory instruction.
//
//   Vector<__half, 8> x = LoadVector<8>(row + 8 * i);  // one 16-byte load
//
// The pointer must be aligned to the vector's size; launchers check that
// with IsAligned() and pick a narrower kernel where it does not hold.

#ifndef XLA_OPS_CC_DEVICE_VECTOR_CUH_
#define XLA_OPS_CC_DEVICE_VECTOR_CUH_

#include <cstdint>

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

template <typename T, int kSize>
__device__ __forceinline__ void StoreVector(T* target,
                                            const Vector<T, kSize>& value) {
  *reinterpret_cast<Vector<T, kSize>*>(target) = value;
}

inline bool IsAligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_DEVICE_VECTOR_CUH_
