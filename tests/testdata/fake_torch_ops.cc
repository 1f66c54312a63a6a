// Operators of torch in the manner of vLLM's, for tests of torch_op: arguments
// that are written, lists and strings, results that are arguments.
//
// Built by tests/extend/torch_ops.py against the installed torch.

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <string>
#include <vector>

namespace {

// result = input * factor, if the other arguments are what the test passes.
at::Tensor Scale(const at::Tensor& input, double factor,
                 const std::vector<std::string>& names, at::IntArrayRef sizes,
                 bool flag, std::optional<std::string> tag) {
  TORCH_CHECK(names == std::vector<std::string>({"a", "b \"c\" |\n"}), names);
  TORCH_CHECK(sizes == at::IntArrayRef({3, -4}), sizes);
  TORCH_CHECK(flag && !tag.has_value());
  return input.mul(factor);
}

// Two caches, both updated.
void Accumulate(at::Tensor& total, at::Tensor& twice, const at::Tensor& input) {
  total.add_(input);
  twice.add_(input, 2);
}

// As flash attention: [result, a tensor of its own].
std::vector<at::Tensor> Two(at::Tensor& result, const at::Tensor& input) {
  result.copy_(input).add_(1);
  return {result, input.sum()};
}

at::Tensor First(const at::Tensor& input) { return input.slice(0, 0, 1); }

std::vector<at::Tensor> Three(const at::Tensor& input) {
  return {input, input, input};
}

at::Tensor AddOne(const at::Tensor& input) { return input.add(1); }

void Nothing(const at::Tensor&) {}

// Changes what the tensor is, and no tag in the schema says so.
void Shrink(at::Tensor& t) { t.resize_({1}); }

void Turn(at::TensorList tensors) {
  for (at::Tensor t : tensors) t.t_();
}

}  // namespace

TORCH_LIBRARY(fake_torch_ops, m) {
  m.def(
      "scale(Tensor input, float factor, str[] names, int[] sizes, bool flag,"
      " str? tag) -> Tensor");
  m.def("accumulate(Tensor! total, Tensor! twice, Tensor input) -> ()");
  m.def("two(Tensor! result, Tensor input) -> Tensor[]");
  m.def("first(Tensor input) -> Tensor");
  m.def("three(Tensor input) -> Tensor[]");
  m.def("add_one(Tensor input) -> Tensor");
  m.def("nothing(Tensor input) -> ()");
  m.def("shrink(Tensor! t) -> ()");
  m.def("turn(Tensor(a!)[] tensors) -> ()");
  m.def("elsewhere(Tensor input) -> Tensor");
}

TORCH_LIBRARY_IMPL(fake_torch_ops, CPU, m) {
  m.impl("scale", Scale);
  m.impl("accumulate", Accumulate);
  m.impl("two", Two);
  m.impl("first", First);
  m.impl("three", Three);
  m.impl("add_one", AddOne);
  m.impl("nothing", Nothing);
  m.impl("shrink", Shrink);
  m.impl("turn", Turn);
}
