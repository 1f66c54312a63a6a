// Calls every CUDA handler on small operands, without XLA, JAX or Python, so
// that compute-sanitizer sees nothing but our kernels:
//
//   kernel_races [--eager] [--only=TEXT] PATH...
//   compute-sanitizer --tool racecheck --error-exitcode 86 kernel_races DIR
//
// PATH: libxla_ops_*_cuda.so, or a folder of them. --only: cases whose name
// contains TEXT.
//
// Each case is first captured into a CUDA graph, as XLA may call a handler
// before it was ever called otherwise, and replayed twice; the graph is updated
// to other buffers, as XLA does when they move, and replayed; then the case is
// called eagerly. All results must agree to the bit. --eager leaves the graphs
// out and calls twice. The first run's results are memory that nobody has
// written, so initcheck reports what a kernel leaves out; before each later
// run they are filled with 0xa5.
//
// Exit status 1 if a case fails, if a handler has no case or no initialize
// stage, which loads its kernels, or if none ran.

#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "tests/gpu/kernel_races_cases.h"
#include "xla_ops/cc/core/call_frame.h"
#include "xla_ops/cc/core/dtype.h"
#include "xla_ops/cc/core/ffi_dtype.h"
#include "xla_ops/cc/core/registry.h"
#include "xla_ops/cc/core/test_tensor.h"

namespace xla_ops {
namespace {

using Bytes = std::vector<unsigned char>;

void CheckCuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  // The context is lost with most errors, so nothing can follow.
  std::printf("FAIL %s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}
#define CHECK_CUDA(expression) CheckCuda((expression), #expression)

// Device memory of exactly `size` bytes: memcheck knows its end.
class DeviceBuffer {
 public:
  explicit DeviceBuffer(size_t size) : size_(size) {
    if (size_ > 0) CHECK_CUDA(cudaMalloc(&data_, size_));
  }
  DeviceBuffer(DeviceBuffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(other.size_) {}
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;
  ~DeviceBuffer() { cudaFree(data_); }

  void* data() const { return data_; }
  void Write(const void* source) {
    if (size_ == 0) return;
    CHECK_CUDA(cudaMemcpy(data_, source, size_, cudaMemcpyHostToDevice));
  }
  void Poison() {
    if (size_ > 0) CHECK_CUDA(cudaMemset(data_, 0xa5, size_));
  }
  Bytes Read() const {
    Bytes bytes(size_);
    if (size_ > 0) {
      CHECK_CUDA(
          cudaMemcpy(bytes.data(), data_, size_, cudaMemcpyDeviceToHost));
    }
    return bytes;
  }

 private:
  void* data_ = nullptr;
  size_t size_;
};

// One case on the device, to be run several times.
class Run {
 public:
  Run(const Case& c, const XlaOpsHandlerBundle& handlers, cudaStream_t stream)
      : case_(c), handlers_(handlers), stream_(stream) {
    for (const TestTensor& arg : c.args) {
      args_.emplace_back(arg.size() * SizeOf(arg.dtype()));
      args_.back().Write(arg.data());
      frame_.AddArg(args_.back().data(),
                    static_cast<XLA_FFI_DataType>(ToFfi(arg.dtype())),
                    arg.dims());
    }
    for (const Result& result : c.results) {
      int64_t bytes = result.alias >= 0 ? 0 : SizeOf(result.dtype);
      for (const int64_t dim : result.dims) bytes *= dim;
      results_.emplace_back(bytes);
      frame_.AddResult(BufferOf(results_.size() - 1).data(),
                       static_cast<XLA_FFI_DataType>(ToFfi(result.dtype)),
                       result.dims);
    }
    c.add_attrs(&frame_);
    frame_.SetStream(stream_);
    WaitForWrites();
  }

  CallStatus Initialize() {
    if (handlers_.initialize == nullptr) return {};  // Main() reports it
    return frame_.Call(handlers_.initialize, XLA_FFI_ExecutionStage_INITIALIZE);
  }
  CallStatus Execute() { return frame_.Call(handlers_.execute); }

  // Arguments as they were, results that nobody computed.
  void Restore() {
    for (size_t i = 0; i < args_.size(); ++i) {
      args_[i].Write(case_.args[i].data());
    }
    for (DeviceBuffer& result : results_) result.Poison();
    WaitForWrites();
  }

  std::vector<Bytes> Results() {
    CHECK_CUDA(cudaStreamSynchronize(stream_));
    std::vector<Bytes> bytes;
    for (size_t i = 0; i < results_.size(); ++i) {
      if (!case_.results[i].scratch) bytes.push_back(BufferOf(i).Read());
    }
    return bytes;
  }

 private:
  // Memory is written on the default stream, which the other one does not wait
  // for, and may still be when the call returns.
  static void WaitForWrites() { CHECK_CUDA(cudaDeviceSynchronize()); }

  const DeviceBuffer& BufferOf(size_t result) const {
    const int alias = case_.results[result].alias;
    return alias < 0 ? results_[result] : args_[alias];
  }

  const Case& case_;
  const XlaOpsHandlerBundle& handlers_;
  cudaStream_t stream_;
  std::vector<DeviceBuffer> args_;
  std::vector<DeviceBuffer> results_;
  CallFrame frame_;
};

// What one call queues. Returns what went wrong, or nothing.
std::string Capture(Run* run, cudaStream_t stream, cudaGraph_t* graph) {
  // As XLA captures: other threads may do as they like meanwhile.
  CHECK_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  const CallStatus status = run->Execute();
  const cudaError_t error = cudaStreamEndCapture(stream, graph);
  if (!status.ok()) return "while captured: " + status.message;
  if (error != cudaSuccess) {
    return std::string("capture failed: ") + cudaGetErrorString(error);
  }
  return "";
}

// Replays a graph of `run`, then updates it to the buffers of `moved`, the same
// case, and replays that.
std::string RunCaptured(Run* run, Run* moved, cudaStream_t stream,
                        std::vector<Bytes>* first) {
  cudaGraph_t graph = nullptr;
  std::string failure = Capture(run, stream, &graph);
  if (!failure.empty()) return failure;
  cudaGraphExec_t replay = nullptr;
  CHECK_CUDA(cudaGraphInstantiate(&replay, graph, 0));
  CHECK_CUDA(cudaGraphDestroy(graph));
  CHECK_CUDA(cudaGraphLaunch(replay, stream));
  *first = run->Results();
  run->Restore();
  CHECK_CUDA(cudaGraphLaunch(replay, stream));
  if (run->Results() != *first) return "two replays differ";

  failure = Capture(moved, stream, &graph);
  if (!failure.empty()) return failure;
  cudaGraphExecUpdateResultInfo info = {};
  const cudaError_t error = cudaGraphExecUpdate(replay, graph, &info);
  if (error != cudaSuccess) {
    return std::string("its graph cannot be updated: ") +
           cudaGetErrorString(error) + ", result " +
           std::to_string(info.result);
  }
  CHECK_CUDA(cudaGraphDestroy(graph));
  run->Restore();
  const std::vector<Bytes> before = run->Results();
  CHECK_CUDA(cudaGraphLaunch(replay, stream));
  if (moved->Results() != *first) return "replay with other buffers differs";
  if (run->Results() != before) return "updated graph writes old buffers";
  CHECK_CUDA(cudaGraphExecDestroy(replay));
  return "";
}

std::string RunCase(const Case& c, const XlaOpsHandlerBundle& handlers,
                    cudaStream_t stream, bool eager) {
  Run run(c, handlers, stream);
  const CallStatus initialized = run.Initialize();
  if (!initialized.ok()) return "initialize: " + initialized.message;
  std::vector<Bytes> first;
  if (eager) {
    const CallStatus status = run.Execute();
    if (!status.ok()) return status.message;
    first = run.Results();
  } else {
    Run moved(c, handlers, stream);
    const std::string failure = RunCaptured(&run, &moved, stream, &first);
    if (!failure.empty()) return failure;
  }
  run.Restore();
  const CallStatus status = run.Execute();
  if (!status.ok()) return status.message;
  if (run.Results() != first) {
    return eager ? "two calls differ" : "call and replay differ";
  }
  return "";
}

bool IsLibrary(const std::filesystem::path& path) {
  const std::string name = path.filename();
  constexpr std::string_view kEnd = "_cuda.so";
  return name.rfind("libxla_ops_", 0) == 0 && name.size() > kEnd.size() &&
         name.compare(name.size() - kEnd.size(), kEnd.size(), kEnd) == 0;
}

// The handlers of the libraries, by target; they stay loaded.
std::map<std::string, XlaOpsHandlerBundle> Load(
    const std::vector<std::string>& paths) {
  std::vector<std::filesystem::path> libraries;
  for (const std::string& path : paths) {
    if (!std::filesystem::is_directory(path)) {
      libraries.push_back(path);
      continue;
    }
    for (const auto& entry : std::filesystem::directory_iterator(path)) {
      if (IsLibrary(entry.path())) libraries.push_back(entry.path());
    }
  }
  std::map<std::string, XlaOpsHandlerBundle> handlers;
  for (const std::filesystem::path& path : libraries) {
    void* library =
        dlopen(std::filesystem::absolute(path).c_str(), RTLD_NOW | RTLD_LOCAL);
    auto* table = library == nullptr ? nullptr
                                     : reinterpret_cast<XlaOpsHandlersFn*>(
                                           dlsym(library, "xla_ops_handlers"));
    if (table == nullptr) {
      std::printf("FAIL %s: %s\n", path.c_str(), dlerror());
      std::exit(1);
    }
    size_t count = 0;
    const XlaOpsHandler* entries = table(&count);
    for (size_t i = 0; i < count; ++i) {
      handlers[entries[i].target] = entries[i].bundle;
    }
  }
  return handlers;
}

int Main(int argc, char** argv) {
  bool eager = false;
  std::string only;
  std::vector<std::string> paths;
  for (int i = 1; i < argc; ++i) {
    const std::string_view argument = argv[i];
    if (argument == "--eager") {
      eager = true;
    } else if (argument.rfind("--only=", 0) == 0) {
      only = argument.substr(7);
    } else {
      paths.emplace_back(argument);
    }
  }
  const auto handlers = Load(paths);
  std::set<std::string> without_case;
  int failed = 0;
  for (const auto& [target, bundle] : handlers) {
    // What it runs is a user's: see check_user_kernels.py.
    if (target != "xla_ops.launch_kernel") without_case.insert(target);
    if (bundle.initialize != nullptr) continue;
    ++failed;
    std::printf("FAIL %s: has no initialize stage\n", target.c_str());
  }

  cudaStream_t stream;
  CHECK_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  int run = 0;
  for (const Case& c : Cases().TakeAll()) {
    const auto handler = handlers.find(c.target);
    if (handler == handlers.end()) continue;  // its library was not given
    without_case.erase(c.target);
    if (c.name.find(only) == std::string::npos) continue;
    const std::string failure = RunCase(c, handler->second, stream, eager);
    ++run;
    if (failure.empty()) continue;
    ++failed;
    std::printf("FAIL %s: %s\n", c.name.c_str(), failure.c_str());
  }
  CHECK_CUDA(cudaStreamDestroy(stream));
  for (const std::string& target : without_case) {
    ++failed;
    std::printf("FAIL %s: has no case\n", target.c_str());
  }
  std::printf("%d cases of %zu handlers, %d failures\n", run, handlers.size(),
              failed);
  // So that compute-sanitizer sees what leaks.
  CHECK_CUDA(cudaDeviceReset());
  return failed > 0 || run == 0 ? 1 : 0;
}

}  // namespace
}  // namespace xla_ops

int main(int argc, char** argv) { return xla_ops::Main(argc, argv); }
