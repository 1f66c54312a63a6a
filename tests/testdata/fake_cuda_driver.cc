// A libcuda.so.1 without a device, for tests of xla_ops.gpu.driver and of the
// plugin's checks on any machine. The environment says what it shows:
//   FAKE_CUDA_INIT      result of cuInit (0)
//   FAKE_CUDA_VERSION   such as 13000 (13000)
//   FAKE_CUDA_DEVICES   compute capabilities, such as "9.0,7.5" ("9.0")
// Built by tests/fakes.py.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

namespace {

std::string Variable(const char* name, const char* fallback) {
  const char* value = std::getenv(name);
  return value == nullptr ? fallback : value;
}

// "9.0,7.5" to the capability of device `ordinal` as 90 or 75; -1 past the end.
int Capability(int ordinal) {
  std::string text = Variable("FAKE_CUDA_DEVICES", "9.0");
  while (true) {
    if (text.empty()) return -1;
    const size_t comma = text.find(',');
    const std::string first = text.substr(0, comma);
    if (ordinal-- == 0) {
      int major = 0;
      int minor = 0;
      std::sscanf(first.c_str(), "%d.%d", &major, &minor);
      return major * 10 + minor;
    }
    text = comma == std::string::npos ? "" : text.substr(comma + 1);
  }
}

constexpr int kInvalidValue = 1;

}  // namespace

extern "C" {

int cuInit(unsigned) {
  return std::atoi(Variable("FAKE_CUDA_INIT", "0").c_str());
}

int cuGetErrorName(int error, const char** name) {
  *name = error == 100 ? "CUDA_ERROR_NO_DEVICE" : nullptr;
  return error == 100 ? 0 : kInvalidValue;
}

int cuDriverGetVersion(int* version) {
  *version = std::atoi(Variable("FAKE_CUDA_VERSION", "13000").c_str());
  return 0;
}

int cuDeviceGetCount(int* count) {
  *count = 0;
  while (Capability(*count) >= 0) ++*count;
  return 0;
}

int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal + 7;  // a handle, not the ordinal
  return Capability(ordinal) < 0 ? kInvalidValue : 0;
}

int cuDeviceGetName(char* name, int size, int device) {
  std::snprintf(name, size, "Fake GPU %d", device - 7);
  return 0;
}

int cuDeviceTotalMem_v2(size_t* bytes, int) {
  *bytes = size_t{80} << 30;
  return 0;
}

// Bytes that are all 1 for device 0, 2 for device 1, ...
int cuDeviceGetUuid_v2(unsigned char* uuid, int device) {
  std::memset(uuid, device - 6, 16);
  return Capability(device - 7) < 0 ? kInvalidValue : 0;
}

int cuDeviceGetAttribute(int* value, int attribute, int device) {
  const int capability = Capability(device - 7);
  if (capability < 0) return kInvalidValue;
  if (attribute == 75) *value = capability / 10;
  if (attribute == 76) *value = capability % 10;
  return attribute == 75 || attribute == 76 ? 0 : kInvalidValue;
}

}  // extern "C"
