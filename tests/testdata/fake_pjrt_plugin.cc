// A PJRT plugin without a device, for tests of the bridge on any machine.
//
// It stands for a plugin that is newer than its caller: every argument struct
// has grown, and shorter ones are refused in the words that XLA uses. Newer
// fields must arrive as zero. It knows nothing of the bridge's own headers, so
// that a wrong layout there cannot be hidden by the same mistake here. So do
// the extensions that torch_xla calls, but for the profiler: it takes what
// torch_xla 2.9.0 passes, and nothing else.
//
// Built by tests/fakes.py with these macros:
//   MAJOR, MINOR    the PJRT version it claims (0, 115)
//   FUNCTIONS       entries of its table (190)
//   EXTENSION       0: no custom-call extension; 2: one without traits; 3: one
//                   with (3)
//   NULL_API        GetPjrtApi returns null

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>

#ifndef MAJOR
#define MAJOR 0
#endif
#ifndef MINOR
#define MINOR 115
#endif
#ifndef FUNCTIONS
#define FUNCTIONS 190
#endif
#ifndef EXTENSION
#define EXTENSION 3
#endif

namespace {

using Word = uint64_t;

struct Error {
  std::string text;
  int code;
};

Error* Invalid(const std::string& text) { return new Error{text, 3}; }

// The struct that a call passes, as words: 0 is its size, 1 its extensions.
Word* Words(void* args) { return static_cast<Word*>(args); }

// Refuses a struct shorter than this plugin's, and one whose newer words, from
// `known` on, are not zero.
Error* CheckStruct(const char* name, void* args, size_t known, size_t words) {
  const Word size = Words(args)[0];
  if (size < words * sizeof(Word)) {
    return Invalid("Unexpected " + std::string(name) + " size: expected " +
                   std::to_string(words * sizeof(Word)) + ", got " +
                   std::to_string(size));
  }
  for (size_t i = known; i < words; ++i) {
    if (Words(args)[i] != 0) {
      return Invalid(std::string(name) + ": word " + std::to_string(i) +
                     " must be 0, got " + std::to_string(Words(args)[i]));
    }
  }
  return nullptr;
}

// {size, ext, error}, grown by one word.
void ErrorDestroy(void* args) {
  if (CheckStruct("PJRT_Error_Destroy_Args", args, 3, 4) != nullptr) {
    std::abort();  // a void function cannot report it
  }
  delete reinterpret_cast<Error*>(Words(args)[2]);
}

// {size, ext, error, message, message_size}, grown by one word.
void ErrorMessage(void* args) {
  if (CheckStruct("PJRT_Error_Message_Args", args, 5, 6) != nullptr) {
    std::abort();
  }
  const auto* error = reinterpret_cast<Error*>(Words(args)[2]);
  Words(args)[3] = reinterpret_cast<Word>(error->text.data());
  Words(args)[4] = error->text.size();
}

// {size, ext, error, code}, grown by one word.
Error* ErrorGetCode(void* args) {
  if (Error* e = CheckStruct("PJRT_Error_GetCode_Args", args, 4, 5)) return e;
  const auto* error = reinterpret_cast<Error*>(Words(args)[2]);
  std::memcpy(&Words(args)[3], &error->code, sizeof(int));
  return nullptr;
}

// {size, ext}, grown by one word.
Error* PluginInitialize(void* args) {
  return CheckStruct("PJRT_Plugin_Initialize_Args", args, 2, 3);
}

// One PJRT_NamedValue, which has not grown in any version.
struct NamedValue {
  size_t struct_size;
  void* extension_start;
  const char* name;
  size_t name_size;
  int type;  // 0 string, 1 int64, 2 int64 list, 3 float, 4 bool
  union {
    const char* string_value;
    int64_t int64_value;
    const int64_t* list_value;
    float float_value;
    bool bool_value;
  };
  size_t value_size;
};

std::string Show(const NamedValue& value) {
  std::string text = std::string(value.name, value.name_size) + "=";
  switch (value.type) {
    case 0:
      return text + std::string(value.string_value, value.value_size);
    case 1:
      return text + std::to_string(value.int64_value);
    case 2:
      for (size_t i = 0; i < value.value_size; ++i) {
        text += (i == 0 ? "[" : ",") + std::to_string(value.list_value[i]);
      }
      return text + "]";
    case 3:
      return text + std::to_string(value.float_value);
    default:
      return text + (value.bool_value ? "true" : "false");
  }
}

// {size, ext, options, num_options, ..., client, ...}: fails, and shows in its
// error what options came.
Error* ClientCreate(void* args) {
  if (Error* e = CheckStruct("PJRT_Client_Create_Args", args, 12, 13)) return e;
  const auto* options = reinterpret_cast<NamedValue*>(Words(args)[2]);
  std::string text = "fake plugin: no devices; options:";
  for (Word i = 0; i < Words(args)[3]; ++i) text += " " + Show(options[i]);
  return new Error{text + ";", 9};
}

// {size, ext, client, name, name_size}
Error* ClientPlatformName(void* args) {
  if (Error* e = CheckStruct("PJRT_Client_PlatformName_Args", args, 5, 6)) {
    return e;
  }
  Words(args)[3] = reinterpret_cast<Word>("cuda");
  Words(args)[4] = 4;
  return nullptr;
}

// PJRT_Program {size, ext, code, code_size, format, format_size}, grown by two.
Error* CheckProgram(void* program) {
  return CheckStruct("PJRT_Program", program, 6, 8);
}

// {size, ext, client, program, options, options_size, executable}, grown by
// one. Answers the program's size in place of an executable; fails where there
// are options, and shows them in its error.
Error* ClientCompile(void* args) {
  if (Error* e = CheckStruct("PJRT_Client_Compile_Args", args, 7, 8)) return e;
  void* program = reinterpret_cast<void*>(Words(args)[3]);
  if (Error* e = CheckProgram(program)) return e;
  if (Words(args)[5] > 0) {
    return new Error{"fake plugin: compile options " +
                         std::string(reinterpret_cast<char*>(Words(args)[4]),
                                     Words(args)[5]) +
                         ";",
                     3};
  }
  Words(args)[6] = Words(program)[3];
  return nullptr;
}

// {size, ext, topology, program, options, options_size, client, executable}
Error* Compile(void* args) {
  if (Error* e = CheckStruct("PJRT_Compile_Args", args, 8, 9)) return e;
  void* program = reinterpret_cast<void*>(Words(args)[3]);
  if (Error* e = CheckProgram(program)) return e;
  Words(args)[7] = Words(program)[3];
  return nullptr;
}

// {size, ext, executable, program}: writes the program's size.
Error* OptimizedProgram(void* args) {
  if (Error* e =
          CheckStruct("PJRT_Executable_OptimizedProgram_Args", args, 4, 5)) {
    return e;
  }
  void* program = reinterpret_cast<void*>(Words(args)[3]);
  if (Error* e = CheckProgram(program)) return e;
  Words(program)[3] = 1234;
  return nullptr;
}

// {size, ext, executable, options, arguments, num_devices, num_args, outputs,
// events, device}; options has 10 words at version 0.75, the newer ones are
// call_location and on. Answers the launch id in place of a device.
Error* Execute(void* args) {
  if (Error* e =
          CheckStruct("PJRT_LoadedExecutable_Execute_Args", args, 10, 12)) {
    return e;
  }
  void* options = reinterpret_cast<void*>(Words(args)[3]);
  if (Error* e = CheckStruct("PJRT_ExecuteOptions", options, 10, 15)) return e;
  Words(args)[9] = Words(options)[6];
  return nullptr;
}

// Any other function: {size, ext, in, out}, grown by two words. Answers its own
// place in the table plus the value that came in, and the size it saw.
template <int index>
Error* Other(void* args) {
  const Word size = Words(args)[0];
  if (size < 6 * sizeof(Word)) {
    return Invalid("Unexpected size: expected 48, got " + std::to_string(size));
  }
  Words(args)[3] = index * 1000 + Words(args)[2];
  if (size >= 8 * sizeof(Word)) Words(args)[6] = size;
  return nullptr;
}

struct Extension {
  size_t struct_size;
  int type;
  Extension* next;
};

struct RegisterArgs {
  size_t struct_size;
  const char* name;
  size_t name_size;
  int api_version;
  void* stages[4];
  uint32_t traits;
};

constexpr int kMaxRegistrations = 64;

// What was registered, read by the tests.
struct Registration {
  char name[64];
  int api_version;
  void* stages[4];
  int64_t traits;  // -1: none were passed
};
Registration registrations[kMaxRegistrations];
int num_registrations = 0;

Error* RegisterCustomCall(RegisterArgs* args) {
  const size_t without_traits = offsetof(RegisterArgs, traits);
  if (args->struct_size < without_traits) {
    return Invalid("Unexpected PJRT_Gpu_Register_Custom_Call_Args size");
  }
  const std::string name(args->name, args->name_size);
  if (name == "fake.refused" || num_registrations == kMaxRegistrations) {
    return new Error{"fake plugin: refused", 6};
  }
  Registration& entry = registrations[num_registrations++];
  std::strncpy(entry.name, name.c_str(), sizeof(entry.name) - 1);
  entry.api_version = args->api_version;
  std::memcpy(entry.stages, args->stages, sizeof(entry.stages));
  entry.traits = args->struct_size > without_traits
                     ? static_cast<int64_t>(args->traits)
                     : -1;
  return nullptr;
}

// The functions of extensions, all but one: {size, in, in2, out...}, `known`
// words for torch_xla, grown by two. Answers the extension's type, the
// function's place and what came in.
template <int type, int index, int known>
Error* ExtensionFunction(void* args) {
  const std::string name =
      "extension " + std::to_string(type) + "." + std::to_string(index);
  if (Error* e = CheckStruct(name.c_str(), args, known, known + 2)) return e;
  Words(args)[known - 1] =
      type * 1000 + index * 100 + Words(args)[1] * 10 + Words(args)[2];
  return nullptr;
}

// {size, device, stream}, {size, stream, buffer}: no extension_start.
struct {
  Extension base;
  void* functions[2] = {
      reinterpret_cast<void*>(&ExtensionFunction<3, 0, 3>),
      reinterpret_cast<void*>(&ExtensionFunction<3, 1, 3>),
  };
} stream_extension = {{sizeof(stream_extension), 3, nullptr}};

// The lengths of version 0.75: destroy, serialize, default layout of a client,
// layout of a buffer, default layout of a topology. The last two are newer
// than torch_xla; the one before is missing.
struct {
  Extension base;
  void* functions[8] = {
      reinterpret_cast<void*>(&ExtensionFunction<4, 0, 3>),
      reinterpret_cast<void*>(&ExtensionFunction<4, 1, 7>),
      reinterpret_cast<void*>(&ExtensionFunction<4, 2, 7>),
      reinterpret_cast<void*>(&ExtensionFunction<4, 3, 4>),
      nullptr,
      reinterpret_cast<void*>(&ExtensionFunction<4, 5, 5>),
      reinterpret_cast<void*>(uintptr_t{1}),  // something else
  };
} layouts_extension = {{sizeof(layouts_extension), 4, &stream_extension.base}};

// {size, ext, description, kind, kind_size, int kind_id}: XLA gives its size
// as 44. Grown by an int, for which there was room, and a pointer.
Error* MemoryKind(void* args) {
  struct Args {
    size_t size;
    void* extension_start;
    void* description;
    const char* kind;
    size_t kind_size;
    int kind_id;
    int new_int;
    void* new_pointer;
  };
  auto* kind_args = static_cast<Args*>(args);
  if (Error* e = CheckStruct("PJRT_MemoryDescription_Kind_Args", args, 6, 7)) {
    return e;
  }
  if (kind_args->new_int != 0) return Invalid("new_int must be 0");
  kind_args->kind = "device";
  kind_args->kind_size = 6;
  kind_args->kind_id = 5;
  kind_args->new_int = 1;
  return nullptr;
}

// {size, ext, device, descriptions, number, default}
struct {
  Extension base;
  void* functions[2] = {
      reinterpret_cast<void*>(&ExtensionFunction<6, 0, 6>),
      reinterpret_cast<void*>(&MemoryKind),
  };
} memory_extension = {{sizeof(memory_extension), 6, &layouts_extension.base}};

// The profiler has a table of its own. torch_xla leaves the size of the
// arguments, their first word, unset.
constexpr Word kUnset = 0x5555555555555555;

// {unset, options, options_size, profiler}
Error* ProfilerCreate(void* args) {
  if (Words(args)[0] != kUnset) return Invalid("the profiler was padded");
  Words(args)[3] = 77;
  return nullptr;
}

// As long as that of JAX 0.11.2; torch_xla 2.9.0 knows 80 bytes.
struct {
  size_t struct_size;
  void* priv;
  void* errors[3];
  void* create;
  void* others[7];
} profiler_api = {sizeof(profiler_api),
                  nullptr,
                  {},
                  reinterpret_cast<void*>(&ProfilerCreate),
                  {}};
static_assert(sizeof(profiler_api) == 104);

struct {
  Extension base;
  void* api;
  int64_t traceme_context_id;
} profiler_extension = {
    {sizeof(profiler_extension), 1, &memory_extension.base}, &profiler_api, 0};

struct CustomCallExtension {
  Extension base;
  Error* (*custom_call)(RegisterArgs*);
  bool handles_traits;
};
CustomCallExtension custom_call_extension = {
    {EXTENSION == 3 ? sizeof(CustomCallExtension)
                    : offsetof(CustomCallExtension, handles_traits),
     0, &profiler_extension.base},
    &RegisterCustomCall,
    EXTENSION == 3};

// A feature that the bridge does not know, before those that it does.
Extension unknown_extension = {
    sizeof(Extension), 4242,
    EXTENSION == 0 ? &profiler_extension.base : &custom_call_extension.base};

struct Api {
  size_t struct_size;
  Extension* extension_start;
  struct {
    size_t struct_size;
    void* extension_start;
    int major;
    int minor;
  } version;
  void* functions[FUNCTIONS];
};
Api api;

template <int... indices>
void FillOthers(std::integer_sequence<int, indices...>) {
  ((api.functions[indices] = reinterpret_cast<void*>(&Other<indices>)), ...);
}

template <typename Function>
void Set(int index, Function* function) {
  if (index < FUNCTIONS) {
    api.functions[index] = reinterpret_cast<void*>(function);
  }
}

}  // namespace

extern "C" const Registration* fake_registrations(int* count) {
  *count = num_registrations;
  return registrations;
}

extern "C" const void* GetPjrtApi() {
#ifdef NULL_API
  return nullptr;
#endif
  api.struct_size = sizeof(api);
  api.extension_start = &unknown_extension;
  api.version = {24, nullptr, MAJOR, MINOR};
  FillOthers(std::make_integer_sequence<int, FUNCTIONS>());
  Set(0, &ErrorDestroy);
  Set(1, &ErrorMessage);
  Set(2, &ErrorGetCode);
  Set(3, &PluginInitialize);
  Set(10, &ClientCreate);
  Set(12, &ClientPlatformName);
  Set(20, &ClientCompile);
  Set(48, &OptimizedProgram);
  Set(55, &Execute);
  if (70 < FUNCTIONS) api.functions[70] = nullptr;
  Set(89, &Compile);
  return &api;
}
