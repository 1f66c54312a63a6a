// Finding the driver; see driver.h.

#include "xla_ops/cc/launch/driver.h"

#include <dlfcn.h>

namespace xla_ops {
namespace {

struct Found {
  CuDriver driver = {};
  std::string error;
};

template <typename Function>
void Look(void* handle, const char* name, Function** function, Found* found) {
  *function = reinterpret_cast<Function*>(dlsym(handle, name));
  if (*function == nullptr && found->error.empty()) {
    found->error = std::string("the NVIDIA driver has no ") + name +
                   ": it must be of CUDA 12.0 or newer";
  }
}

Found* Find() {
  auto* found = new Found;
  void* handle = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    const char* text = dlerror();
    found->error = std::string("there is no NVIDIA driver: ") +
                   (text == nullptr ? "libcuda.so.1" : text);
    return found;
  }
  CuDriver& driver = found->driver;
  Look(handle, "cuInit", &driver.init, found);
  Look(handle, "cuGetErrorName", &driver.get_error_name, found);
  Look(handle, "cuGetErrorString", &driver.get_error_string, found);
  Look(handle, "cuCtxGetDevice", &driver.current_device, found);
  Look(handle, "cuDeviceGetAttribute", &driver.device_attribute, found);
  Look(handle, "cuLibraryLoadData", &driver.load_library, found);
  Look(handle, "cuLibraryGetKernel", &driver.get_kernel, found);
  Look(handle, "cuKernelGetFunction", &driver.kernel_function, found);
  Look(handle, "cuKernelGetAttribute", &driver.kernel_attribute, found);
  Look(handle, "cuKernelSetAttribute", &driver.set_kernel_attribute, found);
  Look(handle, "cuLaunchKernelEx", &driver.launch, found);
  Look(handle, "cuMemsetD8Async", &driver.fill, found);
  Look(handle, "cuMemcpyDtoDAsync_v2", &driver.copy, found);
  Look(handle, "cuMemcpyDtoH_v2", &driver.copy_to_host, found);
  Look(handle, "cuStreamSynchronize", &driver.synchronize, found);
  Look(handle, "cuStreamIsCapturing", &driver.is_capturing, found);
  driver.kernel_parameter = reinterpret_cast<decltype(driver.kernel_parameter)>(
      dlsym(handle, "cuKernelGetParamInfo"));
  if (!found->error.empty()) return found;
  // XLA or torch has called it; a second call does nothing.
  const CuResult result = driver.init(0);
  if (result != 0) {
    found->error = "the NVIDIA driver cannot be used: cuInit: " +
                   CuErrorText(driver, result);
  }
  return found;
}

}  // namespace

const CuDriver* FindCuDriver(std::string* error) {
  // Never freed: handlers may run while the process exits.
  static const Found* const found = Find();
  *error = found->error;
  return found->error.empty() ? &found->driver : nullptr;
}

std::string CuErrorText(const CuDriver& driver, CuResult result) {
  const char* name = nullptr;
  const char* text = nullptr;
  if (driver.get_error_name(result, &name) != 0 || name == nullptr) {
    return "CUDA error " + std::to_string(result);
  }
  if (driver.get_error_string(result, &text) != 0 || text == nullptr) {
    return name;
  }
  return std::string(name) + ": " + text;
}

}  // namespace xla_ops
