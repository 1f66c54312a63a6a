// Op libraries for tests of xla_ops._runtime: handlers that show what reached
// them. Written against the C ABI of XLA's FFI (version 0.1) and of
// xla_ops/cc/core/registry.h, without their headers, so that tests need nothing
// but a compiler.
//
// Built by tests/fakes.py with these macros:
//   PREFIX      first part of the targets ("fake")
//   PLATFORM    of the handlers ("Host")
//   ARCHS       exports xla_ops_cuda_archs with this text
//   VERSION     exports xla_ops_cuda_version with this number
//   API         exports xla_ops_api_version with this number
//   NO_TABLE    exports no handler table
//   UNDEFINED   needs a symbol that no library has
//   INCOMPLETE  has an entry without an execute handler
//   TWICE       has an entry twice
//   ENDS        ends the process that loads it, as one of zeros does

#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>

#ifndef PREFIX
#define PREFIX "fake"
#endif
#ifndef PLATFORM
#define PLATFORM "Host"
#endif

namespace {

struct Extension {
  size_t struct_size;
  int type;
  Extension* next;
};

struct Version {
  size_t struct_size;
  void* extension_start;
  int major;
  int minor;
};

struct MetadataExtension {
  Extension base;
  struct {
    size_t struct_size;
    Version version;
    uint32_t traits;
  }* metadata;
};

struct Api {
  size_t struct_size;
  void* extension_start;
  Version version;
  void* internal_api;
  void* functions[18];
};
enum {
  kErrorCreate = 0,
  kStreamGet = 4,
  kTypeIdRegister = 5,
  kStateSet = 7,
  kStateGet = 8,
  kSchedule = 11,
  kNumThreads = 12,
};

struct Buffer {
  size_t struct_size;
  void* extension_start;
  int dtype;
  int64_t* data;
  int64_t rank;
  int64_t* dims;
};

struct Span {
  const char* data;
  size_t size;
};

struct Scalar {
  int dtype;
  void* value;
};

struct Array {
  int dtype;
  size_t size;
  void* data;
};

struct Buffers {
  size_t struct_size;
  void* extension_start;
  int64_t size;
  int* types;
  Buffer** items;
};

struct Attrs {
  size_t struct_size;
  void* extension_start;
  int64_t size;
  int* types;  // 1 array, 3 scalar, 4 string
  Span** names;
  void** values;
};

struct CallFrame {
  size_t struct_size;
  Extension* extension_start;
  const Api* api;
  void* context;
  int stage;
  Buffers args;
  Buffers results;
  Attrs attrs;
  void* future;
};

template <typename Args>
void* CallApi(CallFrame* frame, int function, Args* args) {
  return reinterpret_cast<void* (*)(Args*)>(frame->api->functions[function])(
      args);
}

void* MakeError(CallFrame* frame, int code, const char* text) {
  struct {
    size_t struct_size;
    void* extension_start;
    const char* message;
    int code;
  } args = {sizeof(args), nullptr, text, code};
  return CallApi(frame, kErrorCreate, &args);
}

// XLA asks each handler for its version and traits before it registers it.
bool AnswersMetadata(CallFrame* frame) {
  Extension* extension = frame->extension_start;
  if (extension == nullptr || extension->type != 1) return false;
  auto* metadata = reinterpret_cast<MetadataExtension*>(extension)->metadata;
  metadata->version.major = 0;
  metadata->version.minor = 1;
  metadata->traits = 1;  // command-buffer compatible
  return true;
}

int64_t IntAttr(CallFrame* frame, const char* name) {
  for (int64_t i = 0; i < frame->attrs.size; ++i) {
    const Span& span = *frame->attrs.names[i];
    if (std::string(span.data, span.size) != name) continue;
    const auto* scalar = static_cast<Scalar*>(frame->attrs.values[i]);
    return *static_cast<int64_t*>(scalar->value);
  }
  return -1;
}

// Writes {number of arguments, then of each: dtype, rank, dims...}.
void* Shapes(CallFrame* frame) {
  if (AnswersMetadata(frame)) return nullptr;
  int64_t* out = frame->results.items[0]->data;
  *out++ = frame->args.size;
  for (int64_t i = 0; i < frame->args.size; ++i) {
    const Buffer& arg = *frame->args.items[i];
    *out++ = arg.dtype;
    *out++ = arg.rank;
    for (int64_t j = 0; j < arg.rank; ++j) *out++ = arg.dims[j];
  }
  return nullptr;
}

// Writes the attributes as text into the bytes of the first result:
// "name:type:dtype:bytes in hex;" each.
void* ShowAttrs(CallFrame* frame) {
  if (AnswersMetadata(frame)) return nullptr;
  std::string text;
  const auto append = [&text](int dtype, const void* value, size_t size) {
    static constexpr char kDigits[] = "0123456789abcdef";
    text += std::to_string(dtype) + ":";
    for (size_t i = 0; i < size; ++i) {
      const unsigned char byte = static_cast<const unsigned char*>(value)[i];
      text += {kDigits[byte >> 4], kDigits[byte & 15]};
    }
  };
  const auto size_of = [](int dtype) -> size_t {
    return dtype == 1 ? 1 : dtype == 11 ? 4 : 8;  // PRED, F32, S64
  };
  for (int64_t i = 0; i < frame->attrs.size; ++i) {
    const Span& name = *frame->attrs.names[i];
    const int type = frame->attrs.types[i];
    void* value = frame->attrs.values[i];
    text += std::string(name.data, name.size) + ":";
    text += std::to_string(type) + ":";
    if (type == 4) {
      const auto* span = static_cast<Span*>(value);
      append(0, span->data, span->size);
    } else if (type == 3) {
      const auto* scalar = static_cast<Scalar*>(value);
      append(scalar->dtype, scalar->value, size_of(scalar->dtype));
    } else {
      const auto* array = static_cast<Array*>(value);
      append(array->dtype, array->data, array->size * size_of(array->dtype));
    }
    text += ";";
  }
  std::memcpy(frame->results.items[0]->data, text.c_str(), text.size() + 1);
  return nullptr;
}

// Fails with the code that the attribute gives.
void* Fail(CallFrame* frame) {
  if (AnswersMetadata(frame)) return nullptr;
  return MakeError(frame, static_cast<int>(IntAttr(frame, "code")),
                   "fake.fail: code must be 0, got another");
}

// The stages: instantiate leaves the attribute as state; each counts its calls.
std::atomic<int64_t> instantiate_calls;
std::atomic<int64_t> prepare_calls;
std::atomic<int64_t> initialize_calls;
int64_t state_type;

void RegisterStateType(CallFrame* frame) {
  struct {
    size_t struct_size;
    void* extension_start;
    Span name;
    int64_t* type_id;
  } args = {sizeof(args), nullptr, {"fake_state", 10}, &state_type};
  CallApi(frame, kTypeIdRegister, &args);
}

void DeleteState(void* state) { delete static_cast<int64_t*>(state); }

void* Instantiate(CallFrame* frame) {
  if (AnswersMetadata(frame)) return nullptr;
  const int64_t value = IntAttr(frame, "value");
  if (value < 0) {
    return MakeError(frame, 3, "fake.stages: value must be 0 or more");
  }
  ++instantiate_calls;
  RegisterStateType(frame);
  struct {
    size_t struct_size;
    void* extension_start;
    void* context;
    int64_t* type_id;
    void* state;
    void (*deleter)(void*);
  } args = {sizeof(args),       nullptr,     frame->context, &state_type,
            new int64_t(value), &DeleteState};
  return CallApi(frame, kStateSet, &args);
}

void* Prepare(CallFrame* frame) {
  if (AnswersMetadata(frame)) return nullptr;
  ++prepare_calls;
  return nullptr;
}

void* Initialize(CallFrame* frame) {
  if (AnswersMetadata(frame)) return nullptr;
  ++initialize_calls;
  return nullptr;
}

// Writes {state, calls of instantiate, of prepare, of initialize}.
void* ExecuteStages(CallFrame* frame) {
  if (AnswersMetadata(frame)) return nullptr;
  struct {
    size_t struct_size;
    void* extension_start;
    void* context;
    int64_t* type_id;
    void* state;
  } args = {sizeof(args), nullptr, frame->context, &state_type, nullptr};
  if (void* error = CallApi(frame, kStateGet, &args)) return error;
  int64_t* out = frame->results.items[0]->data;
  out[0] = *static_cast<int64_t*>(args.state);
  out[1] = instantiate_calls;
  out[2] = prepare_calls;
  out[3] = initialize_calls;
  return nullptr;
}

// Runs 100 tasks on the thread pool; writes {threads, sum of 0..99}.
struct Task {
  std::atomic<int64_t>* sum;
  std::atomic<int64_t>* left;
  int64_t value;
};

void RunTask(void* data) {
  auto* task = static_cast<Task*>(data);
  *task->sum += task->value;
  --*task->left;
}

void* Threads(CallFrame* frame) {
  if (AnswersMetadata(frame)) return nullptr;
  int64_t* out = frame->results.items[0]->data;
  out[0] = 0;
  struct {
    size_t struct_size;
    void* extension_start;
    void* context;
    int64_t* num_threads;
  } threads = {sizeof(threads), nullptr, frame->context, &out[0]};
  if (void* error = CallApi(frame, kNumThreads, &threads)) return error;
  constexpr int64_t kTasks = 100;
  std::atomic<int64_t> sum{0};
  std::atomic<int64_t> left{kTasks};
  Task tasks[kTasks];
  for (int64_t i = 0; i < kTasks; ++i) {
    tasks[i] = {&sum, &left, i};
    struct {
      size_t struct_size;
      void* extension_start;
      void* context;
      void (*task)(void*);
      void* data;
    } schedule = {sizeof(schedule), nullptr, frame->context, &RunTask,
                  &tasks[i]};
    if (void* error = CallApi(frame, kSchedule, &schedule)) return error;
  }
  while (left != 0) usleep(100);
  out[1] = sum;
  return nullptr;
}

// Writes the stream's address.
void* Stream(CallFrame* frame) {
  if (AnswersMetadata(frame)) return nullptr;
  struct {
    size_t struct_size;
    void* extension_start;
    void* context;
    void* stream;
  } args = {sizeof(args), nullptr, frame->context, nullptr};
  if (void* error = CallApi(frame, kStreamGet, &args)) return error;
  frame->results.items[0]->data[0] = reinterpret_cast<int64_t>(args.stream);
  return nullptr;
}

// Waits for the first argument to change to 1, for at most 10 seconds; another
// Python thread has to do that, so it must be free to run. Writes whether it
// did.
void* Wait(CallFrame* frame) {
  if (AnswersMetadata(frame)) return nullptr;
  const volatile int64_t* flag = frame->args.items[0]->data;
  for (int i = 0; i < 10000 && *flag == 0; ++i) usleep(1000);
  frame->results.items[0]->data[0] = *flag;
  return nullptr;
}

using Handler = void*(CallFrame*);

struct Entry {
  const char* target;
  const char* platform;
  Handler* stages[4];  // instantiate, prepare, initialize, execute
};

#ifndef NO_TABLE
const Entry kEntries[] = {
    {PREFIX ".shapes", PLATFORM, {nullptr, nullptr, nullptr, &Shapes}},
    {PREFIX ".attrs", PLATFORM, {nullptr, nullptr, nullptr, &ShowAttrs}},
    {PREFIX ".fail", PLATFORM, {nullptr, nullptr, nullptr, &Fail}},
    {PREFIX ".stages",
     PLATFORM,
     {&Instantiate, &Prepare, &Initialize, &ExecuteStages}},
    {PREFIX ".threads", PLATFORM, {nullptr, nullptr, nullptr, &Threads}},
    {PREFIX ".stream", PLATFORM, {nullptr, nullptr, nullptr, &Stream}},
    {PREFIX ".wait", PLATFORM, {nullptr, nullptr, nullptr, &Wait}},
#ifdef TWICE
    {PREFIX ".wait", PLATFORM, {nullptr, nullptr, nullptr, &Wait}},
#endif
#ifdef INCOMPLETE
    {PREFIX ".incomplete", PLATFORM, {&Instantiate, nullptr, nullptr, nullptr}},
#endif
};
#endif

}  // namespace

extern "C" {

#ifndef NO_TABLE
const Entry* xla_ops_handlers(size_t* count) {
  *count = sizeof(kEntries) / sizeof(kEntries[0]);
  return kEntries;
}
#endif

#ifdef API
int xla_ops_api_version() { return API; }
#endif

#ifdef ARCHS
const char* xla_ops_cuda_archs() { return ARCHS; }
#endif

#ifdef VERSION
int xla_ops_cuda_version() { return VERSION; }
#endif

// Sums the request into the plan; refuses a first field below 0.
const char* xla_ops_fake_plan(const int64_t* request, int64_t* plan) {
  if (request[1] < 0) return "the first field must be at least 0";
  plan[1] = request[0];
  plan[2] = plan[0];
  for (int64_t i = 1; i < request[0] / 8; ++i) plan[3] += request[i];
  return nullptr;
}

#ifdef UNDEFINED
void no_library_has_this_symbol();
void xla_ops_needs_a_symbol() { no_library_has_this_symbol(); }
#endif

}  // extern "C"

#ifdef ENDS
__attribute__((constructor)) static void End() {
  signal(SIGSEGV, SIG_DFL);
  raise(SIGSEGV);
}
#endif
