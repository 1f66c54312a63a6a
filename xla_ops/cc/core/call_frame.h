// Calls a typed-FFI handler without XLA: a call frame built by hand.
//
// The same handler that XLA runs from a compiled graph runs here on plain
// CPU tensors, on CUDA tensors (with a stream), and in C++ tests:
//
//   CallFrame frame;
//   frame.AddArg(x, XLA_FFI_DataType_F32, {4, 64})
//       .AddArg(w, XLA_FFI_DataType_F32, {64})
//       .AddResult(out, XLA_FFI_DataType_F32, {4, 64})
//       .AddAttr("eps", 1e-6f);
//   CallStatus status = frame.Call(xla_ops_rms_norm_cpu);
//   if (!status.ok()) Report(status.message);
//
// A handler sees an XLA_FFI_Api that offers errors, the stream, the device
// ordinal, state between the stages, futures (Call waits for them) and,
// where the caller lends one, a thread pool. It refuses the rest (device
// memory, user data, run id) with Unimplemented, as handlers here need none
// of it.
//
// A frame belongs to one thread at a time and keeps no pointer past Call;
// different frames are independent. There is no global mutable state.
// Data pointers are borrowed; dimensions, names and attributes are copied.
//
// Tested by call_frame_test.cc.

#ifndef XLA_OPS_CC_CORE_CALL_FRAME_H_
#define XLA_OPS_CC_CORE_CALL_FRAME_H_

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "xla/ffi/api/c_api.h"

namespace xla_ops {

// What a handler answered. `code` follows absl::StatusCode, as XLA does.
struct CallStatus {
  XLA_FFI_Error_Code code = XLA_FFI_Error_Code_OK;
  std::string message;

  bool ok() const { return code == XLA_FFI_Error_Code_OK; }
};

// Threads that a caller lends to handlers. Implementations must be safe to
// call from several threads; a task may run at once in the calling thread.
class TaskRunner {
 public:
  virtual ~TaskRunner() = default;
  virtual int64_t num_threads() const = 0;
  virtual void Schedule(XLA_FFI_Task* task, void* data) = 0;
};

// State that the instantiate stage leaves for the stages after it. It may be
// shared by many frames and is freed with this object.
class CallState {
 public:
  CallState() = default;
  ~CallState();
  CallState(const CallState&) = delete;
  CallState& operator=(const CallState&) = delete;

  // Fails if a state is set already; on failure `state` is not owned.
  bool Set(XLA_FFI_TypeId type, void* state, void (*deleter)(void*));
  // Null if there is no state of that type.
  void* Get(XLA_FFI_TypeId type) const;

 private:
  XLA_FFI_TypeId type_{0};
  void* state_ = nullptr;
  void (*deleter_)(void*) = nullptr;
};

class CallFrame {
 public:
  using Dims = std::vector<int64_t>;

  CallFrame() = default;
  CallFrame(const CallFrame&) = delete;
  CallFrame& operator=(const CallFrame&) = delete;

  CallFrame& AddArg(const void* data, XLA_FFI_DataType dtype, Dims dims);
  CallFrame& AddResult(void* data, XLA_FFI_DataType dtype, Dims dims);

  // Attributes may come in any order; a name given twice fails in Call.
  CallFrame& AddAttr(std::string_view name, bool value);
  CallFrame& AddAttr(std::string_view name, int32_t value);
  CallFrame& AddAttr(std::string_view name, int64_t value);
  CallFrame& AddAttr(std::string_view name, float value);
  CallFrame& AddAttr(std::string_view name, double value);
  CallFrame& AddAttr(std::string_view name, std::string_view value);
  // Without this overload a string literal would convert to bool.
  CallFrame& AddAttr(std::string_view name, const char* value) {
    return AddAttr(name, std::string_view(value));
  }
  CallFrame& AddAttr(std::string_view name, std::vector<int64_t> values);
  CallFrame& AddAttr(std::string_view name, std::vector<float> values);

  // The platform's stream (a cudaStream_t). Null is CUDA's default stream,
  // so a frame without SetStream differs from one with a null stream: there
  // a handler that asks for a stream fails.
  CallFrame& SetStream(void* stream);
  CallFrame& SetDeviceOrdinal(int32_t ordinal);
  // Borrowed; must outlive Call. Without it handlers run in one thread.
  CallFrame& SetTaskRunner(TaskRunner* runner);
  // Borrowed; must outlive Call. Where the instantiate stage leaves state
  // and none is set, the frame keeps it itself.
  CallFrame& SetState(CallState* state);

  // Runs `handler` and waits for its future, if it returns one. The frame
  // can be called again, for other stages or the same.
  CallStatus Call(XLA_FFI_Handler* handler, XLA_FFI_ExecutionStage stage =
                                                XLA_FFI_ExecutionStage_EXECUTE);

 private:
  struct Buffer {
    void* data;
    XLA_FFI_DataType dtype;
    Dims dims;
  };
  struct Attr {
    std::string name;
    std::variant<bool, int32_t, int64_t, float, double, std::string,
                 std::vector<int64_t>, std::vector<float>>
        value;
  };
  // Moved into place by the public overloads.
  template <typename T>
  CallFrame& PushAttr(std::string_view name, T value);

  std::vector<Buffer> args_;
  std::vector<Buffer> results_;
  std::vector<Attr> attrs_;
  bool has_stream_ = false;
  void* stream_ = nullptr;
  int32_t device_ordinal_ = 0;
  TaskRunner* runner_ = nullptr;
  CallState* state_ = nullptr;
  CallState own_state_;
};

// Asks a handler for the API version it was built with and its traits, as
// XLA does at registration.
CallStatus QueryMetadata(XLA_FFI_Handler* handler, XLA_FFI_Metadata* metadata);

}  // namespace xla_ops

#endif  // XLA_OPS_CC_CORE_CALL_FRAME_H_
