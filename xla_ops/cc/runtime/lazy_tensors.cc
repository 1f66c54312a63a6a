// Reads the lazy tensors of libtorch; see lazy_tensors.h.

#include "xla_ops/cc/runtime/lazy_tensors.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstring>
#include <map>
#include <vector>

#include "xla_ops/cc/runtime/torch_xla_symbols.h"

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

  const void* object() const { return object_; }

  // How many others hold the object.
  int Others() const {
    if (object_ == nullptr || control_ == nullptr) return 0;
    return control_->uses.load(std::memory_order_acquire) - 1;
  }

 private:
  void* object_ = nullptr;
  ControlBlock* control_ = nullptr;
};

// torch::lazy::Output, and a std::vector of them.
struct Operand {
  const void* node;
  size_t index;
};
struct OperandList {
  const Operand* begin;
  const Operand* end;
  const Operand* capacity;
};

// A view is a node or two away from its cache.
constexpr size_t kMostNodes = 16;

// std::vector<XLATensorPtr>, which only torch_xla can fill and free.
struct TensorList {
  const void* const* begin;
  const void* const* end;
  const void* const* capacity;
};

// XLAGraphExecutor::GetLiveTensors(const BackendDevice*), a member that looks
// at none, of all devices where it gets no device; and its result's destructor.
struct ListFunctions {
  void (*get)(TensorList* result, void* executor, const void* device) = nullptr;
  void (*free)(TensorList*) = nullptr;
};
constexpr char kGetLiveTensors[] =
    "_ZN9torch_xla16XLAGraphExecutor14GetLiveTensorsEPKN5torch4lazy13"
    "BackendDeviceE";
constexpr char kFreeTensors[] =
    "_ZNSt6vectorIN3c1013intrusive_ptrIN9torch_xla9XLATensorENS0_6detail34"
    "intrusive_target_default_null_typeIS3_EEEESaIS7_EED1Ev";

// None in a torch_xla that was stripped of its symbols.
ListFunctions FindListFunctions(const std::string& xlac_path) {
  std::map<std::string, uintptr_t> found;
  ListFunctions functions;
  if (FindTorchXlaSymbols(xlac_path, {kGetLiveTensors, kFreeTensors}, &found)
          .empty()) {
    functions.get =
        reinterpret_cast<decltype(functions.get)>(found[kGetLiveTensors]);
    functions.free =
        reinterpret_cast<decltype(functions.free)>(found[kFreeTensors]);
  }
  return functions;
}

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
                              const std::string& xlac_path,
                              uintptr_t tensor_impl) {
  tensor_class_ = nullptr;
  void* torch = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD);
  if (torch == nullptr) return library + " is not loaded";
  id_ = dlsym(torch, "_ZNK5torch4lazy10LazyTensor11GetUniqueIdEv");
  data_ = dlsym(torch, "_ZNK5torch4lazy10LazyTensor17CurrentDataHandleEv");
  value_ = dlsym(torch, "_ZNK5torch4lazy10LazyTensor14CurrentIrValueEv");
  operands_ = dlsym(torch, "_ZNK5torch4lazy4Node8operandsEv");
  if (id_ == nullptr || data_ == nullptr || value_ == nullptr ||
      operands_ == nullptr) {
    return library + " does not export torch::lazy::LazyTensor";
  }
  xlac_path_ = xlac_path;
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

bool LazyTensors::IsCopied(uintptr_t tensor_impl,
                           const std::vector<uintptr_t>& readers) const {
  auto* get_value = reinterpret_cast<Value (*)(const void*)>(value_);
  const Value value = get_value(LazyTensor(tensor_impl));
  const void* node = value.node.object();
  if (node == nullptr) return false;
  if (value.node.Others() == 1 + Reads(node, readers)) return false;
  // Reads a file of 300 MB, once, where it is needed.
  static const ListFunctions* const functions =
      new ListFunctions(FindListFunctions(xlac_path_));
  if (functions->get == nullptr) return true;
  TensorList tensors;
  functions->get(&tensors, /*this=*/nullptr, /*device=*/nullptr);
  const auto num_tensors =
      std::count_if(tensors.begin, tensors.end, [=](const void* tensor) {
        return get_value(tensor).node.object() == node;
      });
  functions->free(&tensors);
  return num_tensors > 1;
}

int LazyTensors::Reads(const void* node,
                       const std::vector<uintptr_t>& readers) const {
  auto* get_value = reinterpret_cast<Value (*)(const void*)>(value_);
  auto* get_operands =
      reinterpret_cast<const OperandList& (*)(const void*)>(operands_);
  std::vector<const void*> nodes;
  auto add = [&nodes, node](const void* other) {
    const bool is_new =
        other != nullptr && other != node &&
        std::find(nodes.begin(), nodes.end(), other) == nodes.end();
    if (is_new && nodes.size() < kMostNodes) nodes.push_back(other);
  };
  for (const uintptr_t reader : readers) {
    add(get_value(LazyTensor(reader)).node.object());  // which `reader` keeps
  }
  int reads = 0;
  for (size_t i = 0; i < nodes.size(); ++i) {
    const OperandList& operands = get_operands(nodes[i]);
    for (const Operand* operand = operands.begin; operand != operands.end;
         ++operand) {
      reads += operand->node == node;
      add(operand->node);
    }
  }
  return reads;
}

}  // namespace xla_ops
