// Reads the lazy tensors of libtorch; see lazy_tensors.h.

#include "xla_ops/cc/runtime/lazy_tensors.h"

#include <dlfcn.h>

#include <atomic>
#include <cstddef>
#include <cstring>

namespace xla_ops {
namespace {

// sizeof(c10::TensorImpl). torch_xla's XLATensorImpl has its lazy tensor, a
// pointer, right behind it.
constexpr size_t kTensorImplBytes = 184;

// The part of a std::shared_ptr that counts, as libstdc++, with which libtorch
// is built, lays it out: this extension may be linked with another library. No
// C++ class with virtual functions, which a sanitizer would want to be
// libtorch's.
struct ControlBlock {
  using Function = void (*)(ControlBlock*);

  void Dispose() { functions[2](this); }  // the object; 0 and 1: destructors
  void Destroy() { functions[3](this); }  // this block

  const Function* functions;
  std::atomic<int> uses;
  std::atomic<int> weak_uses;
};
static_assert(sizeof(ControlBlock) == 16);

// A std::shared_ptr that a function of libtorch returns. Its destructor makes
// it a class that is returned in memory, as a std::shared_ptr is.
class SharedPointer {
 public:
  SharedPointer() = default;
  SharedPointer(const SharedPointer&) = delete;
  SharedPointer& operator=(const SharedPointer&) = delete;

  ~SharedPointer() {
    if (control_ == nullptr) return;
    if (control_->uses.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
    control_->Dispose();
    if (control_->weak_uses.fetch_sub(1, std::memory_order_acq_rel) == 1) {
      control_->Destroy();
    }
  }

  // How many others hold the object.
  int Others() const {
    if (object_ == nullptr || control_ == nullptr) return 0;
    return control_->uses.load(std::memory_order_acquire) - 1;
  }

 private:
  void* object_ = nullptr;
  ControlBlock* control_ = nullptr;
};

// torch::lazy::Value: a node, and which of its results.
struct Value {
  SharedPointer node;
  size_t index = 0;
};

const void* PointerAt(uintptr_t address) {
  const void* pointer;
  std::memcpy(&pointer, reinterpret_cast<const void*>(address),
              sizeof(pointer));
  return pointer;
}

// Of an object with virtual functions: the table that only its class has.
const void* ClassOf(uintptr_t object) { return PointerAt(object); }

const void* LazyTensor(uintptr_t tensor_impl) {
  return PointerAt(tensor_impl + kTensorImplBytes);
}

}  // namespace

std::string LazyTensors::Load(const std::string& library,
                              uintptr_t tensor_impl) {
  tensor_class_ = nullptr;
  void* torch = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD);
  if (torch == nullptr) return library + " is not loaded";
  id_ = dlsym(torch, "_ZNK5torch4lazy10LazyTensor11GetUniqueIdEv");
  data_ = dlsym(torch, "_ZNK5torch4lazy10LazyTensor17CurrentDataHandleEv");
  value_ = dlsym(torch, "_ZNK5torch4lazy10LazyTensor14CurrentIrValueEv");
  if (id_ == nullptr || data_ == nullptr || value_ == nullptr) {
    return library + " does not export torch::lazy::LazyTensor";
  }
  tensor_class_ = ClassOf(tensor_impl);
  return "";
}

bool LazyTensors::Knows(uintptr_t tensor_impl) const {
  return tensor_class_ != nullptr && ClassOf(tensor_impl) == tensor_class_;
}

int64_t LazyTensors::Id(uintptr_t tensor_impl) const {
  auto* get_id = reinterpret_cast<int64_t (*)(const void*)>(id_);
  return get_id(LazyTensor(tensor_impl));
}

BufferHolders LazyTensors::Holders(uintptr_t tensor_impl) const {
  auto* get_data = reinterpret_cast<SharedPointer (*)(const void*)>(data_);
  auto* get_value = reinterpret_cast<Value (*)(const void*)>(value_);
  const void* tensor = LazyTensor(tensor_impl);
  BufferHolders holders;
  holders.node = get_value(tensor).node.Others();
  holders.data = get_data(tensor).Others();
  return holders;
}

}  // namespace xla_ops
