// The machine code of users' kernels in this process.
//
// A program names its code by a digest and does not hold it: HLO carries an
// attribute for every call, and one kernel may be called a thousand times. Who
// lowers a call adds the code here first (AddCode). A program that comes from
// elsewhere, such as one kept by another process, finds it in the folder in
// which compiled kernels are kept, by the same digest.
//
// Each image is loaded once a process and never unloaded, since programs that
// XLA keeps, and CUDA graphs, hold its kernels.
//
// Tested by launch_test.cc.

#ifndef XLA_OPS_CC_LAUNCH_CODE_H_
#define XLA_OPS_CC_LAUNCH_CODE_H_

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <string_view>
#include <vector>

#include "xla_ops/cc/launch/driver.h"

namespace xla_ops {

// What one kernel may use on one device.
struct KernelLimits {
  int max_threads = 0;
  int max_shared_bytes = 0;  // dynamic
};

// A kernel of an image, for all devices. Safe from any thread.
class LoadedKernel {
 public:
  LoadedKernel(const CuDriver& driver, void* kernel);

  void* handle() const { return kernel_; }
  // In bytes, one a parameter. Unknown with drivers before CUDA 12.4.
  bool knows_parameters() const { return knows_parameters_; }
  const std::vector<size_t>& parameter_sizes() const { return sizes_; }

  // Loads the kernel on the current device, so that no launch has to, and lets
  // it take all the shared memory that there is. Returns an error text, empty
  // on success. Costs an atomic load after the first time.
  std::string Prepare(const CuDriver& driver, KernelLimits* limits);

 private:
  // More devices than any host has; beyond it a kernel is prepared every time.
  static constexpr int kMaxDevices = 64;

  void* const kernel_;
  bool knows_parameters_ = false;
  std::vector<size_t> sizes_;
  std::mutex mutex_;
  std::atomic<bool> ready_[kMaxDevices] = {};
  KernelLimits limits_[kMaxDevices];
};

class CodeTable {
 public:
  // That of the process.
  static CodeTable& Get();

  // Keeps a copy of an image, cubin or PTX, under a name that no other image
  // has: its digest. Does nothing if it is there.
  void Add(std::string_view name, std::string_view image);

  // Finds a kernel, loading its image if need be: one that was added, or else
  // the file `name`.cubin of the folder of kept kernels. That must have
  // `num_bytes`. Returns an error text, empty on success.
  std::string Find(const CuDriver& driver, std::string_view name,
                   int64_t num_bytes, std::string_view kernel,
                   LoadedKernel** found);

 private:
  struct Image {
    std::string bytes;  // what was loaded stays in use
    void* library = nullptr;
    std::map<std::string, std::unique_ptr<LoadedKernel>, std::less<>> kernels;
  };

  std::string Load(const CuDriver& driver, std::string_view name,
                   int64_t num_bytes, std::string_view kernel,
                   LoadedKernel** found);

  std::shared_mutex mutex_;  // guards all below
  std::map<std::string, Image, std::less<>> images_;
};

// Where compiled kernels are kept, by XLA_OPS_CACHE_DIR, XDG_CACHE_HOME or
// HOME; xla_ops/py/extend writes to it. "" if none is set.
std::string KernelFolder();

}  // namespace xla_ops

#endif  // XLA_OPS_CC_LAUNCH_CODE_H_
