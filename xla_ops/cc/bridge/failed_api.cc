// The table of failing functions; see failed_api.h.

#include "xla_ops/cc/bridge/failed_api.h"

#include <cstdlib>
#include <cstring>

namespace xla_ops {
namespace {

// More than any framework that asks for kPjrtMinMinor knows (115).
constexpr size_t kFunctions = 256;

constexpr int kFailedPrecondition = 9;  // absl::StatusCode

// Never freed: errors point to it, and may outlive static destructors.
const std::string* failure_text = nullptr;

// The one error there is. Its address tells it from success; nothing reads it.
char error_object;

PjrtError* Fail(void*) { return reinterpret_cast<PjrtError*>(&error_object); }

void Destroy(void*) {}

void Message(void* args) {
  auto* message_args = static_cast<PjrtErrorMessageArgs*>(args);
  message_args->message = failure_text->data();
  message_args->message_size = failure_text->size();
}

PjrtError* GetCode(void* args) {
  static_cast<PjrtErrorGetCodeArgs*>(args)->code = kFailedPrecondition;
  return nullptr;
}

const PjrtApi* MakeTable(const std::string& text) {
  failure_text = new std::string(text);
  const size_t size = offsetof(PjrtApi, functions) + kFunctions * sizeof(void*);
  auto* api = static_cast<PjrtApi*>(std::calloc(1, size));
  api->struct_size = size;
  api->version.struct_size = sizeof(PjrtApiVersion);
  api->version.major_version = kPjrtMajor;
  api->version.minor_version = kPjrtMinMinor;
  for (size_t i = 0; i < kFunctions; ++i) {
    api->functions[i] = reinterpret_cast<void*>(&Fail);
  }
  api->functions[kErrorDestroy] = reinterpret_cast<void*>(&Destroy);
  api->functions[kErrorMessage] = reinterpret_cast<void*>(&Message);
  api->functions[kErrorGetCode] = reinterpret_cast<void*>(&GetCode);
  return api;
}

}  // namespace

const PjrtApi* FailedApi(const std::string& text) {
  static const PjrtApi* const api = MakeTable(text);
  return api;
}

}  // namespace xla_ops
