// Tensors for the C++ tests of ops: any element type behind one class,
// guard bytes around the data, and frames filled in one line.
//
//   TestTensor x(DType::kBF16, {4, 64});
//   x.FillRandom(&random);
//   TestTensor out(DType::kBF16, {4, 64});      // filled with NaN
//   CallFrame frame;
//   AddArgs(&frame, {&x, &weight});
//   AddResults(&frame, {&out});
//   ExpectOk(frame.Call(xla_ops_rms_norm_cpu));
//   out.ExpectGuardsIntact();
//
// Only for files that end in _test.cc.

#ifndef XLA_OPS_CC_CORE_TEST_TENSOR_H_
#define XLA_OPS_CC_CORE_TEST_TENSOR_H_

#include <cmath>
#include <condition_variable>  // NOLINT
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <mutex>  // NOLINT
#include <random>
#include <string>
#include <thread>  // NOLINT
#include <utility>
#include <vector>

#include "xla_ops/cc/core/call_frame.h"
#include "xla_ops/cc/core/dtype.h"
#include "xla_ops/cc/core/ffi_dtype.h"
#include "xla_ops/cc/core/float.h"
#include "xla_ops/cc/core/testing.h"

namespace xla_ops::testing {

class TestTensor {
 public:
  TestTensor(DType dtype, std::vector<int64_t> dims)
      : dtype_(dtype), dims_(std::move(dims)) {
    bytes_.assign(2 * kGuardBytes + size() * SizeOf(dtype_), kGuard);
    // What a kernel forgets to write, or must not read, shows as NaN (as
    // the type's largest number for integers).
    for (int64_t i = 0; i < size(); ++i) {
      Set(i, std::numeric_limits<double>::quiet_NaN());
    }
  }
  TestTensor(DType dtype, std::vector<int64_t> dims, std::vector<double> values)
      : TestTensor(dtype, std::move(dims)) {
    EXPECT_EQ(static_cast<int64_t>(values.size()), size());
    for (int64_t i = 0; i < size(); ++i) Set(i, values[i]);
  }

  DType dtype() const { return dtype_; }
  const std::vector<int64_t>& dims() const { return dims_; }
  int64_t size() const {
    int64_t size = 1;
    for (const int64_t dim : dims_) size *= dim;
    return size;
  }
  void* data() { return bytes_.data() + kGuardBytes; }
  const void* data() const { return bytes_.data() + kGuardBytes; }
  std::vector<unsigned char> bytes() const { return bytes_; }

  double Get(int64_t i) const {
    switch (dtype_) {
      case DType::kF32:
        return At<float>(i);
      case DType::kF16:
        return ToFloat(At<Half>(i));
      case DType::kBF16:
        return ToFloat(At<BFloat16>(i));
      case DType::kF8E4M3FN:
        return ToFloat(At<Float8E4M3FN>(i));
      case DType::kF8E5M2:
        return ToFloat(At<Float8E5M2>(i));
      case DType::kS8:
        return At<int8_t>(i);
      case DType::kU8:
        return At<uint8_t>(i);
      case DType::kS32:
        return At<int32_t>(i);
      case DType::kS64:
        return static_cast<double>(At<int64_t>(i));
      case DType::kBool:
        return At<uint8_t>(i);
    }
    return 0;
  }

  void Set(int64_t i, double value) {
    const float f = static_cast<float>(value);
    switch (dtype_) {
      case DType::kF32:
        return Put(i, f);
      case DType::kF16:
        return Put(i, FromFloat<Half>(f));
      case DType::kBF16:
        return Put(i, FromFloat<BFloat16>(f));
      case DType::kF8E4M3FN:
        return Put(i, FromFloat<Float8E4M3FN>(f));
      case DType::kF8E5M2:
        return Put(i, FromFloat<Float8E5M2>(f));
      case DType::kS8:
        return Put(i, Integer<int8_t>(value));
      case DType::kU8:
        return Put(i, Integer<uint8_t>(value));
      case DType::kS32:
        return Put(i, Integer<int32_t>(value));
      case DType::kS64:
        return Put(i, Integer<int64_t>(value));
      case DType::kBool:
        return Put(i, static_cast<uint8_t>(value != 0));
    }
  }

  void Fill(double value) {
    for (int64_t i = 0; i < size(); ++i) Set(i, value);
  }
  void FillRandom(std::mt19937* random, double scale = 1.0) {
    std::normal_distribution<double> normal(0.0, scale);
    for (int64_t i = 0; i < size(); ++i) Set(i, normal(*random));
  }

  // That nothing was written outside the tensor.
  void ExpectGuardsIntact() const {
    for (size_t i = 0; i < kGuardBytes; ++i) {
      EXPECT_TRUE(bytes_[i] == kGuard);
      EXPECT_TRUE(bytes_[bytes_.size() - 1 - i] == kGuard);
    }
  }

 private:
  static constexpr size_t kGuardBytes = 64;
  static constexpr unsigned char kGuard = 0xa5;

  template <typename T>
  static T Integer(double value) {
    return std::isnan(value) ? std::numeric_limits<T>::max()
                             : static_cast<T>(value);
  }
  template <typename T>
  T At(int64_t i) const {
    T value;
    std::memcpy(&value, bytes_.data() + kGuardBytes + i * sizeof(T), sizeof(T));
    return value;
  }
  template <typename T>
  void Put(int64_t i, T value) {
    std::memcpy(bytes_.data() + kGuardBytes + i * sizeof(T), &value, sizeof(T));
  }

  DType dtype_;
  std::vector<int64_t> dims_;
  std::vector<unsigned char> bytes_;
};

inline void AddArgs(CallFrame* frame,
                    std::initializer_list<const TestTensor*> tensors) {
  for (const TestTensor* t : tensors) {
    frame->AddArg(t->data(), static_cast<XLA_FFI_DataType>(ToFfi(t->dtype())),
                  t->dims());
  }
}

inline void AddResults(CallFrame* frame,
                       std::initializer_list<TestTensor*> tensors) {
  for (TestTensor* t : tensors) {
    frame->AddResult(
        t->data(), static_cast<XLA_FFI_DataType>(ToFfi(t->dtype())), t->dims());
  }
}

inline void ExpectOk(const CallStatus& status) {
  EXPECT_EQ(status.message, "");
  EXPECT_TRUE(status.ok());
}

inline void ExpectInvalid(const CallStatus& status,
                          const std::string& message) {
  EXPECT_EQ(status.code, XLA_FFI_Error_Code_INVALID_ARGUMENT);
  EXPECT_EQ(status.message, message);
}

// A new thread for each task; joined at the end of the test.
class TestThreads : public TaskRunner {
 public:
  explicit TestThreads(int64_t num_threads) : num_threads_(num_threads) {}
  ~TestThreads() override {
    for (std::thread& thread : threads_) thread.join();
  }
  int64_t num_threads() const override { return num_threads_; }
  void Schedule(XLA_FFI_Task* task, void* data) override {
    std::lock_guard<std::mutex> lock(mutex_);
    threads_.emplace_back(task, data);
  }

 private:
  const int64_t num_threads_;
  std::mutex mutex_;
  std::vector<std::thread> threads_;
};

}  // namespace xla_ops::testing

#endif  // XLA_OPS_CC_CORE_TEST_TENSOR_H_
