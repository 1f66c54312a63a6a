// A libnvidia-ml.so.1 without a device, for tests of xla_ops.gpu.visible on any
// machine. The environment says what it shows:
//   FAKE_NVML_INIT   result of nvmlInit_v2 (0)
//   FAKE_NVML_GPUS   UUIDs, such as "GPU-12,GPU-34"; "lost" is a GPU that gives
//                    no handle
//   FAKE_NVML_MIGS   UUIDs of the last GPU's MIG instances (none)
//   FAKE_NVML_FREE   bytes free of each (not supported)
// Every nvmlInit_v2 has to be undone, or fake_nvml_users() is not 0.
// Built by tests/fakes.py.

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

namespace {

int users = 0;

std::vector<std::string> List(const char* name) {
  const char* value = std::getenv(name);
  std::string text = value == nullptr ? "" : value;
  std::vector<std::string> items;
  while (!text.empty()) {
    const size_t comma = text.find(',');
    items.push_back(text.substr(0, comma));
    text = comma == std::string::npos ? "" : text.substr(comma + 1);
  }
  return items;
}

constexpr int kUninitialized = 1;
constexpr int kNotSupported = 3;
constexpr int kNotFound = 6;
constexpr int kInsufficientSize = 7;
constexpr int kGpuIsLost = 15;

// A handle is an index, of GPUs from 1 and of instances from 1000.
void* Handle(size_t number) { return reinterpret_cast<void*>(number); }
size_t Number(void* handle) { return reinterpret_cast<size_t>(handle); }

}  // namespace

extern "C" {

int fake_nvml_users() { return users; }

int nvmlInit_v2() {
  const char* value = std::getenv("FAKE_NVML_INIT");
  const int result = value == nullptr ? 0 : std::atoi(value);
  if (result == 0) ++users;
  return result;
}

int nvmlShutdown() { return users-- > 0 ? 0 : kUninitialized; }

int nvmlDeviceGetCount_v2(unsigned* count) {
  *count = List("FAKE_NVML_GPUS").size();
  return users > 0 ? 0 : kUninitialized;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void** device) {
  const std::vector<std::string> gpus = List("FAKE_NVML_GPUS");
  if (index >= gpus.size()) return kNotFound;
  if (gpus[index] == "lost") return kGpuIsLost;
  *device = Handle(index + 1);
  return 0;
}

int nvmlDeviceGetMaxMigDeviceCount(void* device, unsigned* count) {
  *count = 0;
  if (Number(device) != List("FAKE_NVML_GPUS").size()) return kNotSupported;
  *count = 7;
  return 0;
}

int nvmlDeviceGetMigDeviceHandleByIndex(void*, unsigned index, void** device) {
  if (index >= List("FAKE_NVML_MIGS").size()) return kNotFound;
  *device = Handle(1000 + index);
  return 0;
}

int nvmlDeviceGetUUID(void* device, char* uuid, unsigned length) {
  const size_t number = Number(device);
  const std::string text = number < 1000
                               ? List("FAKE_NVML_GPUS")[number - 1]
                               : List("FAKE_NVML_MIGS")[number - 1000];
  if (text.size() >= length) return kInsufficientSize;
  std::snprintf(uuid, length, "%s", text.c_str());
  return 0;
}

int nvmlDeviceGetHandleByUUID(const char* uuid, void** device) {
  const std::vector<std::string> gpus = List("FAKE_NVML_GPUS");
  const std::vector<std::string> migs = List("FAKE_NVML_MIGS");
  for (size_t i = 0; i < gpus.size(); ++i) {
    if (gpus[i] == uuid) *device = Handle(i + 1);
    if (gpus[i] == uuid) return 0;
  }
  for (size_t i = 0; i < migs.size(); ++i) {
    if (migs[i] == uuid) *device = Handle(1000 + i);
    if (migs[i] == uuid) return 0;
  }
  return kNotFound;
}

// Total, free and used.
int nvmlDeviceGetMemoryInfo(void*, unsigned long long* memory) {
  const char* free = std::getenv("FAKE_NVML_FREE");
  if (free == nullptr) return kNotSupported;
  memory[0] = 80ull << 30;
  memory[1] = std::strtoull(free, nullptr, 10);
  memory[2] = memory[0] - memory[1];
  return 0;
}

}  // extern "C"
