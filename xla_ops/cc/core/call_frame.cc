// The XLA_FFI_Api that hand-built frames offer, and the frames themselves.

#include "xla_ops/cc/core/call_frame.h"

#include <algorithm>
#include <condition_variable>  // NOLINT
#include <memory>
#include <mutex>  // NOLINT
#include <type_traits>
#include <utility>

namespace xla_ops {
namespace {

// What lies behind XLA's opaque pointers. Types of our own and casts, not
// definitions of XLA_FFI_Error and friends: XLA defines those too, in the
// same process.
struct Error {
  XLA_FFI_Error_Code code;
  std::string message;
};

struct Context {
  bool has_stream;
  void* stream;
  int32_t device_ordinal;
  TaskRunner* runner;
  CallState* state;
};

// Shared by the waiting frame and the completing thread, so that neither
// frees it under the other.
struct FutureState {
  std::mutex mutex;
  std::condition_variable done_changed;
  bool done = false;
  CallStatus status;
};

struct Future {
  std::shared_ptr<FutureState> state = std::make_shared<FutureState>();
};

XLA_FFI_Error* MakeError(XLA_FFI_Error_Code code, std::string message) {
  return reinterpret_cast<XLA_FFI_Error*>(new Error{code, std::move(message)});
}

Context* FromC(XLA_FFI_ExecutionContext* ctx) {
  return reinterpret_cast<Context*>(ctx);
}

// A handler built against older headers passes shorter structs; the fields
// read here are all in version 0.1, the oldest.
template <typename Args>
XLA_FFI_Error* CheckSize(const Args* args, size_t expected, const char* name) {
  if (args->struct_size >= expected) return nullptr;
  return MakeError(XLA_FFI_Error_Code_INVALID_ARGUMENT,
                   std::string("Unexpected ") + name + " size: expected " +
                       std::to_string(expected) + ", got " +
                       std::to_string(args->struct_size));
}

#define XLA_OPS_CHECK_SIZE(args, type)                                     \
  if (XLA_FFI_Error* error = CheckSize(args, type##_STRUCT_SIZE, #type)) { \
    return error;                                                          \
  }

XLA_FFI_Error* ErrorCreate(XLA_FFI_Error_Create_Args* args) {
  return MakeError(args->errc, args->message ? args->message : "");
}

void ErrorGetMessage(XLA_FFI_Error_GetMessage_Args* args) {
  args->message = reinterpret_cast<Error*>(args->error)->message.c_str();
}

void ErrorDestroy(XLA_FFI_Error_Destroy_Args* args) {
  delete reinterpret_cast<Error*>(args->error);
}

XLA_FFI_Error* HandlerRegister(XLA_FFI_Handler_Register_Args*) {
  return MakeError(XLA_FFI_Error_Code_UNIMPLEMENTED,
                   "a hand-built call frame has no handler registry");
}

XLA_FFI_Error* StreamGet(XLA_FFI_Stream_Get_Args* args) {
  XLA_OPS_CHECK_SIZE(args, XLA_FFI_Stream_Get_Args);
  const Context* ctx = FromC(args->ctx);
  if (!ctx->has_stream) {
    return MakeError(XLA_FFI_Error_Code_FAILED_PRECONDITION,
                     "this call has no stream");
  }
  args->stream = ctx->stream;
  return nullptr;
}

// Ids are a hash of the name, so that no table is needed: the same name has
// the same id in every library and thread.
XLA_FFI_Error* TypeIdRegister(XLA_FFI_TypeId_Register_Args* args) {
  XLA_OPS_CHECK_SIZE(args, XLA_FFI_TypeId_Register_Args);
  if (args->type_id->type_id != 0) return nullptr;
  uint64_t hash = 0xcbf29ce484222325;  // FNV-1a
  for (size_t i = 0; i < args->name.len; ++i) {
    hash ^= static_cast<unsigned char>(args->name.ptr[i]);
    hash *= 0x100000001b3;
  }
  // XLA's ids are positive; so are these.
  args->type_id->type_id = static_cast<int64_t>(hash >> 1) | 1;
  return nullptr;
}

XLA_FFI_Error* ContextGet(XLA_FFI_ExecutionContext_Get_Args*) {
  return MakeError(XLA_FFI_Error_Code_UNIMPLEMENTED,
                   "a hand-built call frame has no user data");
}

XLA_FFI_Error* StateSet(XLA_FFI_State_Set_Args* args) {
  XLA_OPS_CHECK_SIZE(args, XLA_FFI_State_Set_Args);
  if (FromC(args->ctx)->state->Set(*args->type_id, args->state,
                                   args->deleter)) {
    return nullptr;
  }
  if (args->deleter) args->deleter(args->state);
  return MakeError(XLA_FFI_Error_Code_ALREADY_EXISTS,
                   "the call's state is set already");
}

XLA_FFI_Error* StateGet(XLA_FFI_State_Get_Args* args) {
  XLA_OPS_CHECK_SIZE(args, XLA_FFI_State_Get_Args);
  args->state = FromC(args->ctx)->state->Get(*args->type_id);
  if (args->state != nullptr) return nullptr;
  return MakeError(XLA_FFI_Error_Code_NOT_FOUND,
                   "the call has no state of this type");
}

XLA_FFI_Error* DeviceMemoryAllocate(XLA_FFI_DeviceMemory_Allocate_Args*) {
  return MakeError(XLA_FFI_Error_Code_UNIMPLEMENTED,
                   "a hand-built call frame allocates no device memory");
}

XLA_FFI_Error* DeviceMemoryFree(XLA_FFI_DeviceMemory_Free_Args*) {
  return MakeError(XLA_FFI_Error_Code_UNIMPLEMENTED,
                   "a hand-built call frame allocates no device memory");
}

XLA_FFI_Error* NoThreadPool() {
  return MakeError(XLA_FFI_Error_Code_UNAVAILABLE,
                   "this call has no thread pool");
}

XLA_FFI_Error* ThreadPoolSchedule(XLA_FFI_ThreadPool_Schedule_Args* args) {
  XLA_OPS_CHECK_SIZE(args, XLA_FFI_ThreadPool_Schedule_Args);
  TaskRunner* runner = FromC(args->ctx)->runner;
  if (runner == nullptr) return NoThreadPool();
  runner->Schedule(args->task, args->data);
  return nullptr;
}

XLA_FFI_Error* ThreadPoolNumThreads(XLA_FFI_ThreadPool_NumThreads_Args* args) {
  XLA_OPS_CHECK_SIZE(args, XLA_FFI_ThreadPool_NumThreads_Args);
  TaskRunner* runner = FromC(args->ctx)->runner;
  if (runner == nullptr) return NoThreadPool();
  *args->num_threads = runner->num_threads();
  return nullptr;
}

XLA_FFI_Error* FutureCreate(XLA_FFI_Future_Create_Args* args) {
  XLA_OPS_CHECK_SIZE(args, XLA_FFI_Future_Create_Args);
  args->future = reinterpret_cast<XLA_FFI_Future*>(new Future);
  return nullptr;
}

void Complete(XLA_FFI_Future* future, CallStatus status) {
  // A copy of the pointer: the waiter deletes `future` once it is done.
  std::shared_ptr<FutureState> state = reinterpret_cast<Future*>(future)->state;
  std::lock_guard<std::mutex> lock(state->mutex);
  state->status = std::move(status);
  state->done = true;
  state->done_changed.notify_all();
}

XLA_FFI_Error* FutureSetAvailable(XLA_FFI_Future_SetAvailable_Args* args) {
  XLA_OPS_CHECK_SIZE(args, XLA_FFI_Future_SetAvailable_Args);
  Complete(args->future, CallStatus{});
  return nullptr;
}

CallStatus TakeStatus(XLA_FFI_Error* error) {
  if (error == nullptr) return CallStatus{};
  std::unique_ptr<Error> owned(reinterpret_cast<Error*>(error));
  return CallStatus{owned->code, std::move(owned->message)};
}

XLA_FFI_Error* FutureSetError(XLA_FFI_Future_SetError_Args* args) {
  XLA_OPS_CHECK_SIZE(args, XLA_FFI_Future_SetError_Args);
  Complete(args->future, TakeStatus(args->error));
  return nullptr;
}

CallStatus Await(XLA_FFI_Future* future) {
  std::unique_ptr<Future> owned(reinterpret_cast<Future*>(future));
  std::shared_ptr<FutureState> state = owned->state;
  std::unique_lock<std::mutex> lock(state->mutex);
  state->done_changed.wait(lock, [&] { return state->done; });
  return state->status;
}

XLA_FFI_Error* RunIdGet(XLA_FFI_RunId_Get_Args*) {
  return MakeError(XLA_FFI_Error_Code_UNIMPLEMENTED,
                   "a hand-built call frame has no run id");
}

XLA_FFI_Error* DeviceOrdinalGet(XLA_FFI_DeviceOrdinal_Get_Args* args) {
  XLA_OPS_CHECK_SIZE(args, XLA_FFI_DeviceOrdinal_Get_Args);
  args->device_ordinal = FromC(args->ctx)->device_ordinal;
  return nullptr;
}

const XLA_FFI_Api kApi = {
    XLA_FFI_Api_STRUCT_SIZE,
    /*extension_start=*/nullptr,
    XLA_FFI_Api_Version{XLA_FFI_Api_Version_STRUCT_SIZE, nullptr,
                        XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR},
    /*internal_api=*/nullptr,
    ErrorCreate,
    ErrorGetMessage,
    ErrorDestroy,
    HandlerRegister,
    StreamGet,
    TypeIdRegister,
    ContextGet,
    StateSet,
    StateGet,
    DeviceMemoryAllocate,
    DeviceMemoryFree,
    ThreadPoolSchedule,
    ThreadPoolNumThreads,
    FutureCreate,
    FutureSetAvailable,
    FutureSetError,
    RunIdGet,
    DeviceOrdinalGet,
};

XLA_FFI_CallFrame EmptyFrame(XLA_FFI_ExecutionStage stage) {
  XLA_FFI_CallFrame frame{};
  frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
  frame.api = &kApi;
  frame.stage = stage;
  frame.args.struct_size = XLA_FFI_Args_STRUCT_SIZE;
  frame.rets.struct_size = XLA_FFI_Rets_STRUCT_SIZE;
  frame.attrs.struct_size = XLA_FFI_Attrs_STRUCT_SIZE;
  return frame;
}

template <typename T>
constexpr XLA_FFI_DataType CType() {
  if constexpr (std::is_same_v<T, bool>) return XLA_FFI_DataType_PRED;
  if constexpr (std::is_same_v<T, int32_t>) return XLA_FFI_DataType_S32;
  if constexpr (std::is_same_v<T, int64_t>) return XLA_FFI_DataType_S64;
  if constexpr (std::is_same_v<T, float>) return XLA_FFI_DataType_F32;
  if constexpr (std::is_same_v<T, double>) return XLA_FFI_DataType_F64;
}

// One attribute in the C form; only the member of its kind is used. The C
// structs hold pointers into the frame's own attributes.
struct CAttr {
  XLA_FFI_ByteSpan name;
  XLA_FFI_AttrType type;
  XLA_FFI_ByteSpan string;
  XLA_FFI_Scalar scalar;
  XLA_FFI_Array array;

  void* pointer() {
    if (type == XLA_FFI_AttrType_STRING) return &string;
    if (type == XLA_FFI_AttrType_ARRAY) return &array;
    return &scalar;
  }
};

struct CAttrBuilder {
  CAttr* out;

  void operator()(std::string& value) const {
    out->type = XLA_FFI_AttrType_STRING;
    out->string = {value.data(), value.size()};
  }
  template <typename T>
  void operator()(std::vector<T>& values) const {
    out->type = XLA_FFI_AttrType_ARRAY;
    out->array = {CType<T>(), values.size(), values.data()};
  }
  template <typename T>
  void operator()(T& value) const {
    out->type = XLA_FFI_AttrType_SCALAR;
    out->scalar = {CType<T>(), &value};
  }
};

template <typename Buffers>
std::vector<XLA_FFI_Buffer> CBuffers(Buffers& buffers) {
  std::vector<XLA_FFI_Buffer> out;
  out.reserve(buffers.size());
  for (auto& buffer : buffers) {
    out.push_back({XLA_FFI_Buffer_STRUCT_SIZE, nullptr, buffer.dtype,
                   buffer.data, static_cast<int64_t>(buffer.dims.size()),
                   buffer.dims.data()});
  }
  return out;
}

template <typename T>
std::vector<void*> Pointers(std::vector<T>& items) {
  std::vector<void*> out;
  out.reserve(items.size());
  for (T& item : items) out.push_back(&item);
  return out;
}

}  // namespace

CallState::~CallState() {
  if (deleter_ != nullptr) deleter_(state_);
}

bool CallState::Set(XLA_FFI_TypeId type, void* state, void (*deleter)(void*)) {
  if (state_ != nullptr) return false;
  type_ = type;
  state_ = state;
  deleter_ = deleter;
  return true;
}

void* CallState::Get(XLA_FFI_TypeId type) const {
  return type.type_id == type_.type_id ? state_ : nullptr;
}

CallFrame& CallFrame::AddArg(const void* data, XLA_FFI_DataType dtype,
                             Dims dims) {
  // XLA's buffers are not const either; handlers only read arguments, save
  // those that are aliased to a result.
  args_.push_back({const_cast<void*>(data), dtype, std::move(dims)});
  return *this;
}

CallFrame& CallFrame::AddResult(void* data, XLA_FFI_DataType dtype, Dims dims) {
  results_.push_back({data, dtype, std::move(dims)});
  return *this;
}

template <typename T>
CallFrame& CallFrame::PushAttr(std::string_view name, T value) {
  attrs_.push_back({std::string(name), std::move(value)});
  return *this;
}

CallFrame& CallFrame::AddAttr(std::string_view name, bool value) {
  return PushAttr(name, value);
}
CallFrame& CallFrame::AddAttr(std::string_view name, int32_t value) {
  return PushAttr(name, value);
}
CallFrame& CallFrame::AddAttr(std::string_view name, int64_t value) {
  return PushAttr(name, value);
}
CallFrame& CallFrame::AddAttr(std::string_view name, float value) {
  return PushAttr(name, value);
}
CallFrame& CallFrame::AddAttr(std::string_view name, double value) {
  return PushAttr(name, value);
}
CallFrame& CallFrame::AddAttr(std::string_view name, std::string_view value) {
  return PushAttr(name, std::string(value));
}
CallFrame& CallFrame::AddAttr(std::string_view name,
                              std::vector<int64_t> values) {
  return PushAttr(name, std::move(values));
}
CallFrame& CallFrame::AddAttr(std::string_view name,
                              std::vector<float> values) {
  return PushAttr(name, std::move(values));
}

CallFrame& CallFrame::SetStream(void* stream) {
  has_stream_ = true;
  stream_ = stream;
  return *this;
}

CallFrame& CallFrame::SetDeviceOrdinal(int32_t ordinal) {
  device_ordinal_ = ordinal;
  return *this;
}

CallFrame& CallFrame::SetTaskRunner(TaskRunner* runner) {
  runner_ = runner;
  return *this;
}

CallFrame& CallFrame::SetState(CallState* state) {
  state_ = state;
  return *this;
}

CallStatus CallFrame::Call(XLA_FFI_Handler* handler,
                           XLA_FFI_ExecutionStage stage) {
  // XLA hands attributes over sorted by name; handlers rely on it.
  std::sort(attrs_.begin(), attrs_.end(),
            [](const Attr& a, const Attr& b) { return a.name < b.name; });
  for (size_t i = 1; i < attrs_.size(); ++i) {
    if (attrs_[i].name == attrs_[i - 1].name) {
      return {XLA_FFI_Error_Code_INVALID_ARGUMENT,
              "attribute " + attrs_[i].name + " is given twice"};
    }
  }

  std::vector<XLA_FFI_Buffer> args;
  std::vector<XLA_FFI_Buffer> rets;
  // As in XLA, instantiation belongs to a call site, not to a call: it sees
  // attributes only.
  if (stage != XLA_FFI_ExecutionStage_INSTANTIATE) {
    args = CBuffers(args_);
    rets = CBuffers(results_);
  }
  std::vector<void*> arg_pointers = Pointers(args);
  std::vector<void*> ret_pointers = Pointers(rets);
  std::vector<XLA_FFI_ArgType> arg_types(args.size(), XLA_FFI_ArgType_BUFFER);
  std::vector<XLA_FFI_RetType> ret_types(rets.size(), XLA_FFI_RetType_BUFFER);

  std::vector<CAttr> attrs(attrs_.size());
  std::vector<XLA_FFI_AttrType> attr_types(attrs.size());
  std::vector<XLA_FFI_ByteSpan*> attr_names(attrs.size());
  std::vector<void*> attr_pointers(attrs.size());
  for (size_t i = 0; i < attrs.size(); ++i) {
    attrs[i].name = {attrs_[i].name.data(), attrs_[i].name.size()};
    std::visit(CAttrBuilder{&attrs[i]}, attrs_[i].value);
    attr_types[i] = attrs[i].type;
    attr_names[i] = &attrs[i].name;
    attr_pointers[i] = attrs[i].pointer();
  }

  Context ctx{has_stream_, stream_, device_ordinal_, runner_,
              state_ != nullptr ? state_ : &own_state_};
  XLA_FFI_CallFrame frame = EmptyFrame(stage);
  frame.ctx = reinterpret_cast<XLA_FFI_ExecutionContext*>(&ctx);
  frame.args.size = static_cast<int64_t>(args.size());
  frame.args.types = arg_types.data();
  frame.args.args = arg_pointers.data();
  frame.rets.size = static_cast<int64_t>(rets.size());
  frame.rets.types = ret_types.data();
  frame.rets.rets = ret_pointers.data();
  frame.attrs.size = static_cast<int64_t>(attrs.size());
  frame.attrs.types = attr_types.data();
  frame.attrs.names = attr_names.data();
  frame.attrs.attrs = attr_pointers.data();

  CallStatus status = TakeStatus(handler(&frame));
  if (frame.future != nullptr) {
    CallStatus later = Await(frame.future);
    if (status.ok()) status = std::move(later);
  }
  return status;
}

CallStatus QueryMetadata(XLA_FFI_Handler* handler, XLA_FFI_Metadata* metadata) {
  *metadata = XLA_FFI_Metadata{};
  metadata->struct_size = XLA_FFI_Metadata_STRUCT_SIZE;
  XLA_FFI_Metadata_Extension extension{};
  extension.extension_base.struct_size = XLA_FFI_Metadata_Extension_STRUCT_SIZE;
  extension.extension_base.type = XLA_FFI_Extension_Metadata;
  extension.metadata = metadata;
  XLA_FFI_CallFrame frame = EmptyFrame(XLA_FFI_ExecutionStage_EXECUTE);
  frame.extension_start = &extension.extension_base;
  return TakeStatus(handler(&frame));
}

}  // namespace xla_ops
