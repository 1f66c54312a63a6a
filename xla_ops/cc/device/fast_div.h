// Division by a number that is known only when the kernel is launched, by
// one multiplication and one shift (Granlund and Montgomery, "Division by
// Invariant Integers using Multiplication", PLDI 1994, figure 4.1).
//
//   FastDiv page_size(params.page_size);      // on the host
//   int page = page_size.Divide(token);       // on the device
//
// Tested through the paged kernels by tests/gpu/check_kernels.py.

#ifndef XLA_OPS_CC_DEVICE_FAST_DIV_H_
#define XLA_OPS_CC_DEVICE_FAST_DIV_H_

#include <cstdint>

namespace xla_ops {

class FastDiv {
 public:
  FastDiv() = default;

  // divisor >= 1. A divisor above 2^31 - 1 is treated as 2^31 - 1, which
  // gives the same quotients for every numerator below that.
  explicit FastDiv(int64_t divisor) {
    if (divisor > INT32_MAX) divisor = INT32_MAX;
    divisor_ = static_cast<uint32_t>(divisor);
    while ((uint64_t{1} << shift_) < divisor_) ++shift_;
    const uint64_t gap = (uint64_t{1} << shift_) - divisor_;
    multiplier_ = static_cast<uint32_t>((gap << 32) / divisor_ + 1);
  }

#ifdef __CUDACC__
  // 0 <= numerator < 2^31, so that the sum below stays under 2^32.
  __device__ __forceinline__ int Divide(int numerator) const {
    const uint32_t n = static_cast<uint32_t>(numerator);
    return static_cast<int>((__umulhi(n, multiplier_) + n) >> shift_);
  }
#endif

  // The divisor.
#ifdef __CUDACC__
  __host__ __device__
#endif
      int value() const {
    return static_cast<int>(divisor_);
  }

 private:
  uint32_t divisor_ = 1;
  uint32_t multiplier_ = 1;
  uint32_t shift_ = 0;
};

}  // namespace xla_ops

#endif  // XLA_OPS_CC_DEVICE_FAST_DIV_H_
