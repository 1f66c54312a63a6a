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
#include <vector>

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
  // Finds the functions. `library` is the path of libtorch_cpu.so, `xlac_path`
  // that of the module _XLAC, `tensor_impl` the address of a c10::TensorImpl
  // that torch_xla made. Returns why they cannot be used, or "".
  std::string Load(const std::string& library, const std::string& xlac_path,
                   uintptr_t tensor_impl);

  // Whether the tensor is of the class of Load's, as all of torch_xla's are:
  // what has an XLA device may be a wrapper, such as one of torch.vmap. To be
  // asked before the three below, which read where only that class has what
  // they read. False before Load.
  bool Knows(uintptr_t tensor_impl) const;

  // torch_xla's number of the tensor.
  int64_t Id(uintptr_t tensor_impl) const;

  BufferHolders Holders(uintptr_t tensor_impl) const;

  // Whether another tensor has the tensor's IR node, as a clone has until it is
  // computed. `readers` are tensors of which operations that read the node may
  // be: where nobody else holds it, not all tensors that are alive are looked
  // at. Where torch_xla cannot list these, whoever holds it counts as a copy.
  bool IsCopied(uintptr_t tensor_impl,
                const std::vector<uintptr_t>& readers) const;

 private:
  // How many operands of the readers' graphs, near their ends, are `node`.
  int Reads(const void* node, const std::vector<uintptr_t>& readers) const;

  std::string xlac_path_;
  const void* tensor_class_ = nullptr;
  void* id_ = nullptr;
  void* data_ = nullptr;
  void* value_ = nullptr;
  void* operands_ = nullptr;
};

}  // namespace xla_ops

#endif  // XLA_OPS_CC_RUNTIME_LAZY_TENSORS_H_
