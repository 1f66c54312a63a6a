// The cases of kernel_races_test.cc: operands for every handler, chosen to
// reach every kernel template: the three dtypes, rows that are held in
// registers and rows that are not, whole vectors and single elements, blocks
// shared by several rows and rows shared by several warps.

#ifndef XLA_OPS_TESTS_GPU_KERNEL_RACES_CASES_H_
#define XLA_OPS_TESTS_GPU_KERNEL_RACES_CASES_H_

#include <cstdint>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "xla_ops/cc/core/call_frame.h"
#include "xla_ops/cc/core/dtype.h"
#include "xla_ops/cc/core/test_tensor.h"

namespace xla_ops {

using testing::TestTensor;
using Dims = std::vector<int64_t>;

struct Result {
  DType dtype;
  Dims dims;
  int alias = -1;        // the argument whose buffer it is
  bool scratch = false;  // not compared
};

struct Case {
  std::string name;
  std::string target;
  std::vector<TestTensor> args;
  std::vector<Result> results;
  std::function<void(CallFrame*)> add_attrs = [](CallFrame*) {};
};

class Cases {
 public:
  std::vector<Case> TakeAll();

 private:
  struct Batch;
  struct Variant;

  TestTensor Random(DType dtype, Dims dims, double scale = 1.0);
  static TestTensor Scalar(double value) {
    return TestTensor(DType::kF32, {1}, {value});
  }
  static TestTensor Absent(DType dtype) { return TestTensor(dtype, {0}); }

  void Add(
      const std::string& target, const std::string& detail,
      std::vector<TestTensor> args, std::vector<Result> results,
      std::function<void(CallFrame*)> add_attrs = [](CallFrame*) {});

  // kernel_races_cases.cc
  void AddRows(DType dtype);  // norms and quantisations
  void AddActivations(DType dtype);
  void AddRotary(DType dtype);
  void AddQkNormRope(DType dtype);
  void AddQkNormRopeAndCache(DType dtype);
  void AddMerges(DType dtype);
  void AddGroups(DType dtype);  // grouped_matmul, and its weight's gradient
  void AddLinears(DType dtype);
  void AddPenalties(DType dtype);          // apply_repetition_penalties
  void AddWrites(DType dtype);             // reshape_and_cache_flash
  void AddFirstLayoutWrites(DType dtype);  // reshape_and_cache
  void AddCopies();

  // kernel_races_attention.cc
  void AddAttention(DType dtype);
  void AddAttention(DType dtype, int64_t head_dim, const Batch& batch,
                    const Variant& v);

  std::mt19937 random_{1};
  std::vector<Case> cases_;
};

// "bf16", "3x7": parts of cases' names.
std::string NameOf(DType dtype);
std::string NameOf(const Dims& dims);

}  // namespace xla_ops

#endif  // XLA_OPS_TESTS_GPU_KERNEL_RACES_CASES_H_
