// Who holds the buffer of an XLA tensor: asked of torch_xla's lazy tensors.
//
// Several tensors may hold one buffer (`a.copy_(b)` gives a that of b), and a
// program that is given the buffer to overwrite would take it from all of them.
// torch_xla counts the holders, by std::shared_ptr, and tells nobody; so this
// reads the count, through functions that libtorch exports. What is known here
// of their classes holds for torch 2.9.0, which the wheel requires by version.
//
// Tested by tests/core/test_ownership.py.

#ifndef XLA_OPS_CC_RUNTIME_LAZY_TENSORS_H_
#define XLA_OPS_CC_RUNTIME_LAZY_TENSORS_H_

#include <cstdint>
#include <string>

namespace xla_ops {

// What holds the value of one tensor.
struct BufferHolders {
  // How many hold its device data: the tensor itself, the IR node `node` where
  // there is one, other tensors, graphs that wait to run. 0: it has no data.
  int data = 0;
  // How many hold its IR node: the tensor itself, and whatever reads it in
  // graphs that wait to run. 0: it has no node.
  int node = 0;
};

// The lazy tensors of the libtorch that is loaded.
class LazyTensors {
 public:
  // Finds the functions. `library` is the path of libtorch_cpu.so.
  // Returns why they cannot be used, or "".
  std::string Load(const std::string& library);

  // torch_xla's number of the tensor. `tensor_impl` is the address of a
  // c10::TensorImpl that torch_xla made.
  int64_t Id(uintptr_t tensor_impl) const;

  BufferHolders Holders(uintptr_t tensor_impl) const;

 private:
  void* id_ = nullptr;
  void* data_ = nullptr;
  void* value_ = nullptr;
};

}  // namespace xla_ops

#endif  // XLA_OPS_CC_RUNTIME_LAZY_TENSORS_H_
