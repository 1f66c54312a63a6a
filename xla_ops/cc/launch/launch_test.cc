// Tests of the launcher, with a driver of fakes: what reaches the driver, and
// what is refused before.

#include "xla_ops/cc/launch/launch.h"

#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/core/call_frame.h"
#include "xla_ops/cc/core/handler.h"
#include "xla_ops/cc/core/testing.h"
#include "xla_ops/cc/launch/code.h"
#include "xla_ops/cc/launch/driver.h"

namespace xla_ops {
namespace {

constexpr CuResult kLaunchFailed = 719;
constexpr CuResult kNotFound = 500;
constexpr CuResult kNoBinary = 209;

// What the fake driver was asked, and how it answers.
struct Fake {
  std::mutex mutex;
  std::vector<std::string> loaded;  // images
  std::vector<std::string> kernels;
  std::vector<std::string> on_device;  // "kernel on device"
  std::vector<size_t> parameter_sizes = {8, 8, 4, 8};
  CuResult launch_result = 0;
  CuResult load_result = 0;
  int max_threads = 1024;
  int max_dynamic = -1;
  CuLaunchConfig config = {};
  unsigned cluster[3] = {};
  void* launched = nullptr;
  std::vector<std::string> given;  // the bytes of each parameter
  int capturing = 0;
  int synchronized = 0;
  // What the kernel does to the result that it is given.
  void (*kernel)(char* result) = nullptr;
};

Fake* fake = nullptr;
thread_local CuDevice current = 0;

std::string Hex(const void* bytes, size_t size) {
  std::string text;
  for (size_t i = 0; i < size; ++i) {
    char two[3];
    std::snprintf(two, sizeof(two), "%02x",
                  static_cast<const unsigned char*>(bytes)[i]);
    text += two;
  }
  return text;
}

CuDriver FakeDriver() {
  CuDriver driver = {};
  driver.init = [](unsigned) { return 0; };
  driver.get_error_name = [](CuResult result, const char** name) {
    *name = result == kLaunchFailed ? "CUDA_ERROR_LAUNCH_FAILED" : nullptr;
    return result == kLaunchFailed ? 0 : 1;
  };
  driver.get_error_string = [](CuResult, const char** text) {
    *text = "unspecified launch failure";
    return 0;
  };
  driver.current_device = [](CuDevice* device) {
    *device = current;
    return current < 0 ? kCuInvalidContext : 0;
  };
  driver.device_attribute = [](int* value, int attribute, CuDevice) {
    *value = 232448;
    return attribute == kCuMaxSharedBytesPerBlock ? 0 : 1;
  };
  driver.load_library = [](void** library, const void* image, int*, void**,
                           unsigned, int*, void**, unsigned) {
    std::lock_guard<std::mutex> lock(fake->mutex);
    if (fake->load_result != 0) return fake->load_result;
    fake->loaded.push_back(static_cast<const char*>(image));
    *library = reinterpret_cast<void*>(fake->loaded.size());
    return 0;
  };
  driver.get_kernel = [](void** kernel, void*, const char* name) {
    std::lock_guard<std::mutex> lock(fake->mutex);
    if (std::strcmp(name, "absent") == 0) return kNotFound;
    fake->kernels.push_back(name);
    *kernel = reinterpret_cast<void*>(100 + fake->kernels.size());
    return 0;
  };
  driver.kernel_function = [](void** function, void* kernel) {
    std::lock_guard<std::mutex> lock(fake->mutex);
    *function = kernel;
    fake->on_device.push_back(
        std::to_string(reinterpret_cast<uintptr_t>(kernel)) + " on " +
        std::to_string(current));
    return 0;
  };
  driver.kernel_attribute = [](int* value, int attribute, void*, CuDevice) {
    *value = attribute == kCuKernelMaxThreads ? fake->max_threads : 448;
    return 0;
  };
  driver.set_kernel_attribute = [](int attribute, int value, void*, CuDevice) {
    if (attribute != kCuKernelMaxDynamicSharedBytes) return 1;
    fake->max_dynamic = value;
    return 0;
  };
  driver.kernel_parameter = [](void*, size_t index, size_t* offset,
                               size_t* size) {
    if (index >= fake->parameter_sizes.size()) return 1;
    *offset = 8 * index;
    *size = fake->parameter_sizes[index];
    return 0;
  };
  driver.launch = [](const CuLaunchConfig* config, void* kernel,
                     void** parameters, void** extra) {
    std::lock_guard<std::mutex> lock(fake->mutex);
    if (fake->launch_result != 0) return fake->launch_result;
    fake->config = *config;
    fake->launched = kernel;
    fake->given.clear();
    for (size_t i = 0; i < fake->parameter_sizes.size(); ++i) {
      fake->given.push_back(Hex(parameters[i], fake->parameter_sizes[i]));
    }
    if (config->num_attributes == 1 &&
        config->attributes->id == kCuLaunchAttributeClusterDimension) {
      std::memcpy(fake->cluster, config->attributes->value, 12);
    }
    if (fake->kernel != nullptr) {
      fake->kernel(*static_cast<char**>(parameters[1]));
    }
    return extra == nullptr ? 0 : 1;
  };
  driver.fill = [](uint64_t to, unsigned char value, size_t size, void*) {
    std::memset(reinterpret_cast<void*>(to), value, size);
    return 0;
  };
  driver.copy = [](uint64_t to, uint64_t from, size_t size, void*) {
    std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from),
                size);
    return 0;
  };
  driver.copy_to_host = [](void* to, uint64_t from, size_t size) {
    std::memcpy(to, reinterpret_cast<void*>(from), size);
    return 0;
  };
  driver.synchronize = [](void*) {
    ++fake->synchronized;
    return 0;
  };
  driver.is_capturing = [](void*, int* status) {
    *status = fake->capturing;
    return 0;
  };
  return driver;
}

const CuDriver driver = FakeDriver();
CodeTable* table = nullptr;
void* const kStream = reinterpret_cast<void*>(0x57);

// The handler's own binding takes the real driver; this one the fake.
ffi::Error TestLaunch(ffi::RemainingArgs operands, ffi::RemainingRets results,
                      std::string_view kernel, int64_t code_bytes,
                      std::string_view grid, std::string_view block,
                      std::string_view cluster, int64_t shared_bytes,
                      int64_t alignment, std::string_view guarded,
                      std::string_view parameters) {
  return LaunchUserKernel(
      driver, *table,
      {"scale", kernel, "digest", code_bytes, grid, block, cluster,
       shared_bytes, alignment, guarded, parameters},
      kStream, operands, results);
}

XLA_FFI_DEFINE_HANDLER(test_handler, TestLaunch,
                       ffi::Ffi::Bind()
                           .RemainingArgs()
                           .RemainingRets()
                           .Attr<std::string_view>("kernel")
                           .Attr<int64_t>("code_bytes")
                           .Attr<std::string_view>("grid")
                           .Attr<std::string_view>("block")
                           .Attr<std::string_view>("cluster")
                           .Attr<int64_t>("shared_bytes")
                           .Attr<int64_t>("alignment")
                           .Attr<std::string_view>("guarded")
                           .Attr<std::string_view>("parameters"));

// A call that is right; tests spoil one part of it.
struct Call {
  const char* kernel = "scale";
  int64_t code_bytes = 4;
  const char* grid = "12 2 1";
  const char* block = "256 1 1";
  const char* cluster = "1 1 1";
  int64_t shared_bytes = 0;
  int64_t alignment = 1;
  const char* guarded = "";
  std::string scratch = "";  // a second result, if it has a byte
  std::string parameters = "a0 r0 v0000003f v0700000000000000";
  char* operand = reinterpret_cast<char*>(0x1000);
  char* result = reinterpret_cast<char*>(0x2010);

  std::string Run() const {
    CallFrame frame;
    frame.AddArg(operand, XLA_FFI_DataType_F32, {7});
    frame.AddResult(result, XLA_FFI_DataType_F32, {7});
    frame.AddAttr("kernel", kernel).AddAttr("code_bytes", code_bytes);
    frame.AddAttr("grid", grid).AddAttr("block", block);
    frame.AddAttr("cluster", cluster).AddAttr("shared_bytes", shared_bytes);
    frame.AddAttr("alignment", alignment).AddAttr("guarded", guarded);
    if (!scratch.empty()) {
      frame.AddResult(const_cast<char*>(scratch.data()), XLA_FFI_DataType_U8,
                      {static_cast<int64_t>(scratch.size())});
    }
    frame.AddAttr("parameters", parameters.c_str());
    return frame.Call(test_handler).message;
  }
};

// A process of its own for each test.
struct World {
  World() {
    fake = &answers;
    table = &code;
    current = 0;
    code.Add("digest", "code");
  }
  Fake answers;
  CodeTable code;
};

XLA_OPS_TEST(GivesTheKernelWhatTheCallSays) {
  World world;
  Call call;
  EXPECT_EQ(call.Run(), "");
  EXPECT_EQ(fake->config.grid[0], 12u);
  EXPECT_EQ(fake->config.grid[1], 2u);
  EXPECT_EQ(fake->config.grid[2], 1u);
  EXPECT_EQ(fake->config.block[0], 256u);
  EXPECT_EQ(fake->config.stream, kStream);
  EXPECT_EQ(fake->config.num_attributes, 0u);
  EXPECT_EQ(fake->given.size(), size_t{4});
  EXPECT_EQ(fake->given[0], "0010000000000000");
  EXPECT_EQ(fake->given[1], "1020000000000000");
  EXPECT_EQ(fake->given[2], "0000003f");
  EXPECT_EQ(fake->given[3], "0700000000000000");
}

XLA_OPS_TEST(PacksValuesOfEverySize) {
  World world;
  fake->parameter_sizes = {1, 2, 4, 8, 8};
  Call call;
  call.parameters = "vff v0a0b v01020304 vf0e0d0c0b0a09080 null";
  EXPECT_EQ(call.Run(), "");
  EXPECT_EQ(fake->given[0], "ff");
  EXPECT_EQ(fake->given[1], "0a0b");
  EXPECT_EQ(fake->given[2], "01020304");
  EXPECT_EQ(fake->given[3], "f0e0d0c0b0a09080");
  EXPECT_EQ(fake->given[4], "0000000000000000");
}

XLA_OPS_TEST(LaunchesClustersAndSharedMemory) {
  World world;
  Call call;
  call.cluster = "4 1 1";
  call.shared_bytes = 100000;
  EXPECT_EQ(call.Run(), "");
  EXPECT_EQ(fake->config.shared_bytes, 100000u);
  EXPECT_EQ(fake->cluster[0], 4u);
  EXPECT_EQ(fake->cluster[2], 1u);
  EXPECT_EQ(fake->max_dynamic, 232448 - 448);
}

XLA_OPS_TEST(RefusesWhatTheCallMustNotSay) {
  World world;
  const auto expect = [](const Call& call, const char* text) {
    EXPECT_EQ(call.Run(), text);
  };
  Call call;
  call.grid = "12 65536 1";
  expect(call,
         "scale: grid must be 3 sizes from 1 to [2147483647, 65535, 65535], "
         "got [12 65536 1]");
  call.grid = "0 1 1";
  expect(call,
         "scale: grid must be 3 sizes from 1 to [2147483647, 65535, 65535], "
         "got [0 1 1]");
  call.grid = "1 1 1 1";
  expect(call, "scale: grid must be 3 sizes, got [1 1 1 1]");
  call = Call();
  call.block = "512 4 1";
  expect(call,
         "scale: block must have at most 1024 threads of this kernel, got "
         "2048");
  call = Call();
  call.shared_bytes = 232001;
  expect(call,
         "scale: shared_bytes must be from 0 to 232000 on this device, got "
         "232001");
  call = Call();
  call.parameters = "a0 r1 v0000003f v0700000000000000";
  expect(call,
         "scale: parameters must name one of 1 operands and 1 results, or a "
         "value, got r1");
  for (const char* word : {"a", "a-1", "x", "v", "v0", "v000000", "vzz"}) {
    call.parameters = word;
    EXPECT_EQ(call.Run(),
              "scale: parameters must name one of 1 operands and 1 results, "
              "or a value, got " +
                  std::string(word));
  }
  call.parameters = "a0  r0";
  expect(call,
         "scale: parameters must have one space between words, got 'a0  r0'");
  call.parameters.clear();
  for (int i = 0; i < 257; ++i) call.parameters += "null ";
  expect(call, "scale: parameters must be at most 256, got more");
  EXPECT_TRUE(fake->launched == nullptr);
}

XLA_OPS_TEST(ChecksTheKernelsOwnParameters) {
  World world;
  Call call;
  call.parameters = "a0 r0 v0000003f";
  EXPECT_EQ(call.Run(),
            "scale: parameters must have the kernel's sizes [8, 8, 4, 8], got "
            "[8, 8, 4]");
  call.parameters = "a0 r0 v0000003f v07000000";
  EXPECT_EQ(call.Run(),
            "scale: parameters must have the kernel's sizes [8, 8, 4, 8], got "
            "[8, 8, 4, 4]");
}

XLA_OPS_TEST(ChecksAlignmentThatCodeReliesOn) {
  World world;
  Call call;
  call.alignment = 16;
  EXPECT_EQ(call.Run(), "");
  call.result += 4;
  EXPECT_EQ(call.Run(),
            "scale: result 0 must be aligned to 16 bytes, got an address that "
            "is 4 off");
  call.alignment = 1;
  EXPECT_EQ(call.Run(), "");
}

// A call whose one result, of 28 bytes, is computed between guards.
struct GuardedCall : Call {
  GuardedCall() {
    result = memory;
    scratch.assign(28 + 2 * kGuardBytes, 0);
    guarded = "0:1";
  }
  char memory[28] = {};
};

XLA_OPS_TEST(GuardedResultIsComputedElsewhereAndCopied) {
  World world;
  fake->kernel = [](char* result) { std::memset(result, 'x', 28); };
  GuardedCall call;
  EXPECT_EQ(call.Run(), "");
  EXPECT_EQ(std::string(call.memory, 28), std::string(28, 'x'));
  EXPECT_EQ(fake->synchronized, 1);
  fake->kernel = nullptr;
  EXPECT_EQ(Call().Run(), "");
  EXPECT_EQ(fake->synchronized, 1);
}

XLA_OPS_TEST(GuardsTellOfWritesOutside) {
  World world;
  fake->kernel = [](char* result) { std::memset(result, 0, 28 + 4); };
  EXPECT_EQ(GuardedCall().Run(),
            "scale: kernel must write inside result 0, got 4 bytes changed "
            "behind its end, the first at 0");
  fake->kernel = [](char* result) { result[-8] = result[28 + 255] = 0; };
  EXPECT_EQ(GuardedCall().Run(),
            "scale: kernel must write inside result 0, got 1 bytes changed "
            "before its start, the first at -8");
  fake->kernel = [](char* result) { result[28 + 255] = 0; };
  EXPECT_EQ(GuardedCall().Run(),
            "scale: kernel must write inside result 0, got 1 bytes changed "
            "behind its end, the first at 255");
}

XLA_OPS_TEST(GuardsDoNotWaitInACapture) {
  World world;
  fake->capturing = 1;
  fake->kernel = [](char* result) { std::memset(result, 'x', 28 + 4); };
  GuardedCall call;
  EXPECT_EQ(call.Run(), "");
  EXPECT_EQ(std::string(call.memory, 28), std::string(28, 'x'));
  EXPECT_EQ(fake->synchronized, 0);
}

XLA_OPS_TEST(RefusesGuardsThatDoNotFit) {
  World world;
  for (const char* word : {"0:0", "0:2", "1", "x:1", ":", "0:"}) {
    GuardedCall call;
    call.guarded = word;
    EXPECT_EQ(call.Run(),
              "scale: guarded must name a result and a scratch that is larger "
              "by two guards, got " +
                  std::string(word));
  }
  EXPECT_TRUE(fake->launched == nullptr);
}

XLA_OPS_TEST(TakesAsManyThreadsAsTheKernelHasRegistersFor) {
  World world;
  fake->max_threads = 128;
  EXPECT_EQ(Call().Run(),
            "scale: block must have at most 128 threads of this kernel, got "
            "256");
}

XLA_OPS_TEST(SaysWhatTheDriverSays) {
  World world;
  fake->launch_result = kLaunchFailed;
  EXPECT_EQ(Call().Run(),
            "scale: kernel scale: CUDA launch failed: CUDA_ERROR_LAUNCH_FAILED:"
            " unspecified launch failure");
  Call call;
  call.kernel = "absent";
  EXPECT_EQ(call.Run(),
            "scale: kernel absent: its code has no kernel absent: CUDA error "
            "500");
  EXPECT_EQ(call.Run(),
            "scale: kernel absent: its code has no kernel absent: CUDA error "
            "500");
  World other;
  fake->load_result = kNoBinary;
  EXPECT_EQ(Call().Run(),
            "scale: kernel scale: its code cannot be loaded: CUDA error 209");
}

XLA_OPS_TEST(LoadsOnceAProcessAndPreparesOnceADevice) {
  World world;
  for (const CuDevice device : {0, 1, 0, 1}) {
    current = device;
    EXPECT_EQ(Call().Run(), "");
  }
  Call other;
  other.kernel = "other";
  EXPECT_EQ(other.Run(), "");
  EXPECT_EQ(fake->loaded.size(), size_t{1});
  EXPECT_EQ(fake->kernels.size(), size_t{2});
  EXPECT_EQ(fake->on_device.size(), size_t{3});
  EXPECT_EQ(fake->on_device[0], "101 on 0");
  EXPECT_EQ(fake->on_device[1], "101 on 1");
  EXPECT_EQ(fake->on_device[2], "102 on 1");
}

XLA_OPS_TEST(PreparesWithoutALaunch) {
  World world;
  LaunchAttributes call;
  call.op = "scale";
  call.kernel = "scale";
  call.code = "digest";
  current = -1;
  EXPECT_TRUE(PrepareKernel(driver, *table, call).success());
  EXPECT_EQ(fake->loaded.size(), size_t{0});
  current = 3;
  EXPECT_TRUE(PrepareKernel(driver, *table, call).success());
  EXPECT_EQ(fake->on_device.size(), size_t{1});
  EXPECT_TRUE(fake->launched == nullptr);
}

XLA_OPS_TEST(ManyThreadsShareOneImage) {
  World world;
  std::vector<std::thread> threads;
  std::vector<int> failures(16, 0);
  for (int n = 0; n < 16; ++n) {
    threads.emplace_back([n, &failures] {
      current = n % 4;
      for (int i = 0; i < 200; ++i) {
        const std::string name = "image" + std::to_string(i % 5);
        table->Add(name, name);
        LoadedKernel* kernel = nullptr;
        KernelLimits limits;
        const std::string kernel_name = i % 2 == 0 ? "even" : "odd";
        std::string error = table->Find(driver, name, 6, kernel_name, &kernel);
        if (error.empty()) error = kernel->Prepare(driver, &limits);
        failures[n] += !error.empty() || limits.max_threads != 1024;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const int failed : failures) EXPECT_EQ(failed, 0);
  EXPECT_EQ(fake->loaded.size(), size_t{5});
  EXPECT_EQ(fake->kernels.size(), size_t{10});
  EXPECT_EQ(fake->on_device.size(), size_t{40});
}

XLA_OPS_TEST(FindsTheCodeOfAProgramFromElsewhere) {
  World world;
  const std::filesystem::path folder =
      std::filesystem::temp_directory_path() /
      ("xla_ops_launch_test_" + std::to_string(getpid()));
  std::filesystem::create_directories(folder / "kernels");
  setenv("XLA_OPS_CACHE_DIR", folder.c_str(), 1);
  const std::string path = (folder / "kernels" / "kept.cubin").string();
  LoadedKernel* kernel = nullptr;
  EXPECT_EQ(table->Find(driver, "kept", 4, "k", &kernel),
            "its code is neither in this process nor in " + path);
  std::ofstream(path, std::ios::binary) << "cod";
  EXPECT_EQ(table->Find(driver, "kept", 4, "k", &kernel),
            path + " must have 4 bytes, got 3");
  std::ofstream(path, std::ios::binary) << "kept";
  EXPECT_EQ(table->Find(driver, "kept", 4, "k", &kernel), "");
  EXPECT_EQ(fake->loaded.size(), size_t{1});
  EXPECT_EQ(fake->loaded[0], "kept");
  std::filesystem::remove_all(folder);
  // It is in the process now.
  EXPECT_EQ(table->Find(driver, "kept", 4, "k2", &kernel), "");
  unsetenv("XLA_OPS_CACHE_DIR");
}

XLA_OPS_TEST(FolderFollowsTheEnvironment) {
  unsetenv("XLA_OPS_CACHE_DIR");
  unsetenv("XDG_CACHE_HOME");
  setenv("HOME", "/h", 1);
  EXPECT_EQ(KernelFolder(), "/h/.cache/xla_ops/kernels");
  setenv("XDG_CACHE_HOME", "/c", 1);
  EXPECT_EQ(KernelFolder(), "/c/xla_ops/kernels");
  setenv("XLA_OPS_CACHE_DIR", "/x", 1);
  EXPECT_EQ(KernelFolder(), "/x/kernels");
  unsetenv("XLA_OPS_CACHE_DIR");
  unsetenv("XDG_CACHE_HOME");
}

XLA_OPS_TEST(HandlerIsListedAndMayBeCaptured) {
  size_t count = 0;
  const XlaOpsHandler* handlers = xla_ops_handlers(&count);
  EXPECT_EQ(count, size_t{1});
  EXPECT_EQ(std::string(handlers[0].target), "xla_ops.launch_kernel");
  EXPECT_EQ(std::string(handlers[0].platform), "CUDA");
  EXPECT_TRUE(handlers[0].bundle.initialize != nullptr);
  XLA_FFI_Metadata metadata = {};
  metadata.struct_size = XLA_FFI_Metadata_STRUCT_SIZE;
  EXPECT_TRUE(QueryMetadata(handlers[0].bundle.execute, &metadata).ok());
  EXPECT_TRUE((metadata.traits &
               XLA_FFI_HANDLER_TRAITS_COMMAND_BUFFER_COMPATIBLE) != 0);
}

}  // namespace
}  // namespace xla_ops

XLA_OPS_TEST_MAIN()
