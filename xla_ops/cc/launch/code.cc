// Loading of users' kernels; see code.h.

#include "xla_ops/cc/launch/code.h"

#include <cstdio>
#include <cstdlib>
#include <utility>

namespace xla_ops {
namespace {

std::string FromEnvironment(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

// By C's streams: those of C++ ask for symbols newer than glibc 2.28.
bool ReadFile(const std::string& path, std::string* bytes) {
  std::FILE* file = std::fopen(path.c_str(), "rb");
  if (file == nullptr) return false;
  bytes->clear();
  char part[1 << 16];
  size_t size;
  while ((size = std::fread(part, 1, sizeof(part), file)) > 0) {
    bytes->append(part, size);
  }
  const bool is_whole = std::ferror(file) == 0;
  std::fclose(file);
  return is_whole;
}

}  // namespace

std::string KernelFolder() {
  std::string folder = FromEnvironment("XLA_OPS_CACHE_DIR");
  if (folder.empty()) {
    folder = FromEnvironment("XDG_CACHE_HOME");
    if (folder.empty()) {
      folder = FromEnvironment("HOME");
      if (folder.empty()) return "";
      folder += "/.cache";
    }
    folder += "/xla_ops";
  }
  return folder + "/kernels";
}

LoadedKernel::LoadedKernel(const CuDriver& driver, void* kernel)
    : kernel_(kernel), knows_parameters_(driver.kernel_parameter != nullptr) {
  size_t offset = 0;
  size_t size = 0;
  while (knows_parameters_ &&
         driver.kernel_parameter(kernel, sizes_.size(), &offset, &size) == 0) {
    sizes_.push_back(size);
  }
}

std::string LoadedKernel::Prepare(const CuDriver& driver,
                                  KernelLimits* limits) {
  CuDevice device = 0;
  CuResult result = driver.current_device(&device);
  if (result != 0) return CuErrorText(driver, result);
  const bool is_kept = device >= 0 && device < kMaxDevices;
  if (is_kept && ready_[device].load(std::memory_order_acquire)) {
    *limits = limits_[device];
    return "";
  }
  std::lock_guard<std::mutex> lock(mutex_);
  void* function = nullptr;
  int static_bytes = 0;
  int most_bytes = 0;
  // The first loads the code on the device.
  result = driver.kernel_function(&function, kernel_);
  if (result == 0) {
    result = driver.kernel_attribute(&limits->max_threads, kCuKernelMaxThreads,
                                     kernel_, device);
  }
  if (result == 0) {
    result = driver.kernel_attribute(&static_bytes, kCuKernelStaticSharedBytes,
                                     kernel_, device);
  }
  if (result == 0) {
    result =
        driver.device_attribute(&most_bytes, kCuMaxSharedBytesPerBlock, device);
  }
  limits->max_shared_bytes = most_bytes - static_bytes;
  if (result == 0) {
    result =
        driver.set_kernel_attribute(kCuKernelMaxDynamicSharedBytes,
                                    limits->max_shared_bytes, kernel_, device);
  }
  if (result != 0) return CuErrorText(driver, result);
  if (is_kept) {
    limits_[device] = *limits;
    ready_[device].store(true, std::memory_order_release);
  }
  return "";
}

CodeTable& CodeTable::Get() {
  // Never freed: handlers may run while the process exits.
  static auto* const table = new CodeTable;
  return *table;
}

void CodeTable::Add(std::string_view name, std::string_view image) {
  std::unique_lock<std::shared_mutex> lock(mutex_);
  Image& added = images_[std::string(name)];
  if (added.bytes.empty()) added.bytes = image;
}

std::string CodeTable::Find(const CuDriver& driver, std::string_view name,
                            int64_t num_bytes, std::string_view kernel,
                            LoadedKernel** found) {
  {
    std::shared_lock<std::shared_mutex> lock(mutex_);
    const auto image = images_.find(name);
    if (image != images_.end()) {
      const auto loaded = image->second.kernels.find(kernel);
      if (loaded != image->second.kernels.end()) {
        *found = loaded->second.get();
        return "";
      }
    }
  }
  // One thread loads, and others that want a kernel for the first time wait.
  std::unique_lock<std::shared_mutex> lock(mutex_);
  return Load(driver, name, num_bytes, kernel, found);
}

std::string CodeTable::Load(const CuDriver& driver, std::string_view name,
                            int64_t num_bytes, std::string_view kernel,
                            LoadedKernel** found) {
  auto it = images_.find(name);
  if (it == images_.end() || it->second.bytes.empty()) {
    const std::string path =
        KernelFolder() + "/" + std::string(name) + ".cubin";
    std::string bytes;
    if (!ReadFile(path, &bytes)) {
      return "its code is neither in this process nor in " + path;
    }
    if (static_cast<int64_t>(bytes.size()) != num_bytes) {
      return path + " must have " + std::to_string(num_bytes) + " bytes, got " +
             std::to_string(bytes.size());
    }
    it = images_.try_emplace(std::string(name)).first;
    it->second.bytes = std::move(bytes);
  }
  Image& image = it->second;
  if (image.library == nullptr) {
    void* library = nullptr;
    const CuResult result =
        driver.load_library(&library, image.bytes.c_str(), nullptr, nullptr, 0,
                            nullptr, nullptr, 0);
    if (result != 0) {
      return "its code cannot be loaded: " + CuErrorText(driver, result);
    }
    image.library = library;
  }
  std::unique_ptr<LoadedKernel>& entry = image.kernels[std::string(kernel)];
  if (entry == nullptr) {
    void* handle = nullptr;
    const CuResult result =
        driver.get_kernel(&handle, image.library, std::string(kernel).c_str());
    if (result != 0) {
      image.kernels.erase(image.kernels.find(kernel));
      return "its code has no kernel " + std::string(kernel) + ": " +
             CuErrorText(driver, result);
    }
    entry = std::make_unique<LoadedKernel>(driver, handle);
  }
  *found = entry.get();
  return "";
}

}  // namespace xla_ops
