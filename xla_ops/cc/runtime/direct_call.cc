// Direct calls of handlers; see direct_call.h.

#include "xla_ops/cc/runtime/direct_call.h"

#include <cstddef>
#include <memory>
#include <mutex>
#include <utility>

#include "xla_ops/cc/runtime/thread_pool.h"

namespace xla_ops {
namespace {

// What the instantiate stage of one handler left for one set of attributes.
struct Instance {
  std::once_flag once;
  CallState state;
  CallStatus status;
};

void Append(const void* bytes, size_t size, std::string* key) {
  key->append(static_cast<const char*>(bytes), size);
}
void AppendValue(const std::string& value, std::string* key) {
  const size_t size = value.size();
  Append(&size, sizeof(size), key);
  key->append(value);
}
template <typename T>
void AppendValue(const std::vector<T>& values, std::string* key) {
  const size_t size = values.size();
  Append(&size, sizeof(size), key);
  Append(values.data(), size * sizeof(T), key);
}
template <typename T>
void AppendValue(const T& value, std::string* key) {
  Append(&value, sizeof(value), key);
}

// The attributes as bytes: equal for equal bits, NaN included, which values
// themselves as a key would not give.
std::string KeyOf(const DirectAttrs& attrs) {
  std::string key;
  for (const auto& [name, value] : attrs) {
    AppendValue(name, &key);
    AppendValue(value.index(), &key);
    std::visit([&key](const auto& v) { AppendValue(v, &key); }, value);
  }
  return key;
}

// The instances of the process, made on first use. Never freed: the number of
// sets of attributes that a program uses is small, and XLA keeps the state of
// a compiled call for as long, too.
Instance& InstanceOf(const LoadedHandler& handler, const DirectAttrs& attrs) {
  using Key = std::pair<const LoadedHandler*, std::string>;
  struct Instances {
    std::mutex mutex;
    std::map<Key, std::unique_ptr<Instance>> by_key;
  };
  static Instances* const instances = new Instances;
  std::lock_guard<std::mutex> lock(instances->mutex);
  std::unique_ptr<Instance>& instance =
      instances->by_key[{&handler, KeyOf(attrs)}];
  if (instance == nullptr) instance = std::make_unique<Instance>();
  return *instance;
}

void AddAttrs(const DirectAttrs& attrs, CallFrame* frame) {
  for (const auto& [name, value] : attrs) {
    std::visit(
        [frame, &name = name](const auto& v) { frame->AddAttr(name, v); },
        value);
  }
}

}  // namespace

CallStatus CallHandler(const LoadedHandler& handler, void* stream,
                       const std::vector<DirectBuffer>& args,
                       const std::vector<DirectBuffer>& results,
                       const DirectAttrs& attrs) {
  CallFrame frame;
  for (const DirectBuffer& arg : args) {
    frame.AddArg(arg.data, arg.dtype, arg.dims);
  }
  for (const DirectBuffer& result : results) {
    frame.AddResult(result.data, result.dtype, result.dims);
  }
  AddAttrs(attrs, &frame);
  if (handler.platform == kCudaPlatform) {
    frame.SetStream(stream);
  } else {
    frame.SetTaskRunner(SharedThreadPool());
  }
  const XlaOpsHandlerBundle& bundle = handler.bundle;
  if (bundle.instantiate != nullptr) {
    Instance& instance = InstanceOf(handler, attrs);
    std::call_once(instance.once, [&] {
      CallFrame instantiate;
      AddAttrs(attrs, &instantiate);
      instantiate.SetState(&instance.state);
      instance.status = instantiate.Call(bundle.instantiate,
                                         XLA_FFI_ExecutionStage_INSTANTIATE);
    });
    if (!instance.status.ok()) return instance.status;
    frame.SetState(&instance.state);
  }
  const std::pair<XLA_FFI_Handler*, XLA_FFI_ExecutionStage> stages[] = {
      {bundle.prepare, XLA_FFI_ExecutionStage_PREPARE},
      {bundle.initialize, XLA_FFI_ExecutionStage_INITIALIZE},
      {bundle.execute, XLA_FFI_ExecutionStage_EXECUTE},
  };
  for (const auto& [stage_handler, stage] : stages) {
    if (stage_handler == nullptr) continue;
    CallStatus status = frame.Call(stage_handler, stage);
    if (!status.ok()) return status;
  }
  return CallStatus{};
}

}  // namespace xla_ops
