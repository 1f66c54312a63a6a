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
// before it was ever called otherwise, and replayed twice; then it is called
// eagerly. All results must agree to the bit. --eager leaves the capture out
// and calls twice. The first run's results are memory that nobody has
// written, so initcheck reports what a kernel leaves out; before each later
// run they are filled with 0xa5.
//
// The cases reach every kernel template: the three dtypes, rows that are held
// in registers and rows that are not, whole vectors and single elements,
// blocks shared by several rows and rows shared by several warps. Exit
// status 1 if a case fails, if a handler has no case or no initialize stage,
// which loads its kernels, or if none ran.

#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <map>
#include <random>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "xla_ops/cc/core/call_frame.h"
#include "xla_ops/cc/core/dtype.h"
#include "xla_ops/cc/core/ffi_dtype.h"
#include "xla_ops/cc/core/registry.h"
#include "xla_ops/cc/core/test_tensor.h"
#include "xla_ops/cc/ops/attention/attention.h"

namespace xla_ops {
namespace {

using testing::TestTensor;
using Dims = std::vector<int64_t>;
using Bytes = std::vector<unsigned char>;

constexpr DType kF32 = DType::kF32;
constexpr DType kF16 = DType::kF16;
constexpr DType kBF16 = DType::kBF16;
constexpr DType kE4M3 = DType::kF8E4M3FN;
constexpr DType kS8 = DType::kS8;
constexpr DType kU8 = DType::kU8;
constexpr DType kS32 = DType::kS32;
constexpr DType kS64 = DType::kS64;
constexpr DType kFloats[] = {kF32, kF16, kBF16};

struct Result {
  DType dtype;
  Dims dims;
  int alias = -1;        // the argument whose buffer it is
  bool scratch = false;  // not compared
};

struct Case {
  std::string name;
  std::string target;
  std::vector<TestTensor> args;
  std::vector<Result> results;
  std::function<void(CallFrame*)> add_attrs = [](CallFrame*) {};
};

void CheckCuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  // The context is lost with most errors, so nothing can follow.
  std::printf("FAIL %s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}
#define CHECK_CUDA(expression) CheckCuda((expression), #expression)

std::string NameOf(DType dtype) {
  return dtype == kF32 ? "f32" : dtype == kF16 ? "f16" : "bf16";
}

std::string NameOf(const Dims& dims) {
  std::string name;
  for (const int64_t dim : dims) {
    name += (name.empty() ? "" : "x") + std::to_string(dim);
  }
  return name;
}

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

// Returns what went wrong, or nothing.
std::string RunCaptured(Run* run, cudaStream_t stream,
                        std::vector<Bytes>* first) {
  // As XLA captures: other threads may do as they like meanwhile.
  CHECK_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  const CallStatus status = run->Execute();
  cudaGraph_t graph = nullptr;
  const cudaError_t error = cudaStreamEndCapture(stream, &graph);
  if (!status.ok()) return "while captured: " + status.message;
  if (error != cudaSuccess) {
    return std::string("capture failed: ") + cudaGetErrorString(error);
  }
  cudaGraphExec_t replay = nullptr;
  CHECK_CUDA(cudaGraphInstantiate(&replay, graph, 0));
  CHECK_CUDA(cudaGraphLaunch(replay, stream));
  *first = run->Results();
  run->Restore();
  CHECK_CUDA(cudaGraphLaunch(replay, stream));
  const bool same = run->Results() == *first;
  CHECK_CUDA(cudaGraphExecDestroy(replay));
  CHECK_CUDA(cudaGraphDestroy(graph));
  return same ? "" : "two replays differ";
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
    const std::string failure = RunCaptured(&run, stream, &first);
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

class Cases {
 public:
  std::vector<Case> TakeAll() {
    for (const DType dtype : kFloats) {
      AddRows(dtype);
      AddActivations(dtype);
      AddRotary(dtype);
      AddMerges(dtype);
      AddWrites(dtype);
      AddAttention(dtype);
    }
    AddCopies();
    return std::move(cases_);
  }

 private:
  TestTensor Random(DType dtype, Dims dims, double scale = 1.0) {
    TestTensor tensor(dtype, std::move(dims));
    if (dtype == kU8) {
      // Stands for fp8; below 64 are finite numbers of either type.
      for (int64_t i = 0; i < tensor.size(); ++i) tensor.Set(i, random_() % 64);
    } else {
      tensor.FillRandom(&random_, scale);
    }
    return tensor;
  }
  static TestTensor Scalar(double value) {
    return TestTensor(kF32, {1}, {value});
  }
  static TestTensor Absent(DType dtype) { return TestTensor(dtype, {0}); }

  void Add(
      const std::string& target, const std::string& detail,
      std::vector<TestTensor> args, std::vector<Result> results,
      std::function<void(CallFrame*)> add_attrs = [](CallFrame*) {}) {
    cases_.push_back({target + " " + detail, "xla_ops." + target,
                      std::move(args), std::move(results),
                      std::move(add_attrs)});
  }

  // Norms and quantisations.
  void AddRows(DType dtype) {
    const auto eps = [](CallFrame* frame) { frame->AddAttr("eps", 1e-5f); };
    const Dims shapes[] = {
        {3, 7},       // single elements, in one warp
        {2, 1031},    // in several
        {9, 64},      // several rows a block
        {2, 4096},    // few rows: a vector a thread
        {1, 16384},   // four
        {300, 512},   // many rows: a warp or less for each
        {258, 2048},  // several warps
        {1, 40000},   // too long to be held
    };
    for (const Dims& shape : shapes) {
      const std::string detail = NameOf(dtype) + " " + NameOf(shape);
      const int64_t rows = shape[0];
      const auto x = [&] { return Random(dtype, shape); };
      const auto weight = [&] { return Random(dtype, {shape[1]}); };
      const Result like_x = {dtype, shape};
      const Result fp8 = {kE4M3, shape};
      const Result int8 = {kS8, shape};
      const Result scales = {kF32, {rows, 1}};
      const TestTensor scale = Scalar(0.02);

      Add("rms_norm", detail, {x(), weight()}, {like_x}, eps);
      Add("fused_add_rms_norm", detail, {x(), x(), weight()}, {like_x, like_x},
          eps);
      Add("fused_add_rms_norm", detail + " in place", {x(), x(), weight()},
          {{dtype, shape, 0}, {dtype, shape, 1}}, eps);
      Add("rms_norm_static_fp8_quant", detail, {x(), weight(), scale}, {fp8},
          eps);
      Add("fused_add_rms_norm_static_fp8_quant", detail,
          {x(), x(), weight(), scale}, {fp8, {dtype, shape, 1}}, eps);
      for (const Result& codes : {fp8, int8}) {
        const std::string kind = codes.dtype == kS8 ? " int8" : " fp8";
        Add("rms_norm_dynamic_per_token_quant", detail + kind, {x(), weight()},
            {codes, scales}, eps);
        Add("fused_add_rms_norm_dynamic_per_token_quant", detail + kind,
            {x(), x(), weight()}, {codes, scales, {dtype, shape, 1}}, eps);
      }
      Add("rms_norm_dynamic_per_token_quant", detail + " bound",
          {x(), weight(), scale}, {fp8, scales}, eps);
      Add("static_scaled_fp8_quant", detail, {x(), scale}, {fp8});
      Add("dynamic_scaled_fp8_quant", detail, {x()}, {fp8, {kF32, {1}}});
      Add("dynamic_per_token_scaled_fp8_quant", detail, {x()}, {fp8, scales});
      Add("dynamic_per_token_scaled_fp8_quant", detail + " bound", {x(), scale},
          {fp8, scales});
      Add("static_scaled_int8_quant", detail, {x(), scale}, {int8});
      Add("static_scaled_int8_quant", detail + " azp",
          {x(), scale, TestTensor(kS32, {1}, {-17})}, {int8});
      Add("dynamic_scaled_int8_quant", detail, {x()}, {int8, scales});
      Add("dynamic_scaled_int8_azp_quant", detail, {x()},
          {int8, scales, {kS32, {rows, 1}}});
    }
  }

  void AddActivations(DType dtype) {
    for (const Dims& shape : {Dims{3, 7}, Dims{33, 40}, Dims{2, 11008}}) {
      const std::string detail = NameOf(dtype) + " " + NameOf(shape);
      const auto x = [&] {
        return Random(dtype, {shape[0], 2 * shape[1]}, 3.0);
      };
      for (const char* target : {"silu_and_mul", "mul_and_silu", "gelu_and_mul",
                                 "gelu_tanh_and_mul"}) {
        Add(target, detail, {x()}, {{dtype, shape}});
      }
      Add("silu_and_mul_quant", detail, {x(), Scalar(0.02)}, {{kE4M3, shape}});
    }
  }

  void AddRotary(DType dtype) {
    struct Shape {
      int64_t tokens, heads, kv_heads, head_size, rotary_dim;
    };
    // Single elements; whole heads in vectors; a part of each head.
    for (const Shape& s : {Shape{3, 2, 1, 7, 6}, Shape{37, 8, 2, 128, 128},
                           Shape{5, 4, 4, 80, 32}}) {
      for (const bool is_neox : {false, true}) {
        const auto attrs = [s, is_neox](CallFrame* frame) {
          frame->AddAttr("head_size", s.head_size).AddAttr("is_neox", is_neox);
        };
        const std::string detail = NameOf(dtype) + " " +
                                   NameOf({s.tokens, s.heads, s.head_size}) +
                                   (is_neox ? " neox" : " gptj");
        TestTensor positions(kS64, {s.tokens});
        for (int64_t i = 0; i < s.tokens; ++i) positions.Set(i, i % 13 - 1);
        const Dims query = {s.tokens, s.heads, s.head_size};
        const Dims key = {s.tokens, s.kv_heads, s.head_size};
        const TestTensor cache = Random(dtype, {11, s.rotary_dim});
        for (const bool in_place : {false, true}) {
          const std::string name = detail + (in_place ? " in place" : "");
          Add("rotary_embedding", name,
              {positions, Random(dtype, query), Random(dtype, key), cache},
              {{dtype, query, in_place ? 1 : -1},
               {dtype, key, in_place ? 2 : -1}},
              attrs);
          Add("rotary_embedding_one", name,
              {positions, Random(dtype, query), cache},
              {{dtype, query, in_place ? 1 : -1}}, attrs);
        }
      }
    }
  }

  void AddMerges(DType dtype) {
    for (const Dims& shape :
         {Dims{2, 3, 7}, Dims{37, 4, 128}, Dims{3, 1, 4096}}) {
      const Dims lse = {shape[1], shape[0]};
      Add("merge_attn_states", NameOf(dtype) + " " + NameOf(shape),
          {Random(dtype, shape), Random(kF32, lse, 4.0), Random(dtype, shape),
           Random(kF32, lse, 4.0)},
          {{dtype, shape}, {kF32, lse}});
    }
  }

  // reshape_and_cache_flash.
  void AddWrites(DType dtype) {
    constexpr int64_t kTokens = 21, kBlocks = 5, kPage = 8;
    for (const char* kv_cache_dtype : {"auto", "fp8_e4m3", "fp8_e5m2"}) {
      const bool is_auto = kv_cache_dtype == std::string_view("auto");
      const DType cache_dtype = is_auto ? dtype : kU8;
      for (const Dims& head : {Dims{2, 64}, Dims{3, 7}}) {
        const int64_t row = head[0] * head[1];
        const Dims rows = {kTokens, head[0], head[1]};
        const Dims cache = {kBlocks, kPage, head[0], head[1]};
        const Dims stacked = {2, kBlocks, kPage, head[0], head[1]};
        // Distinct slots, padding and one that does not exist.
        TestTensor slots(kS64, {kTokens});
        for (int64_t i = 0; i < kTokens; ++i) {
          slots.Set(i, i * 17 % (kBlocks * kPage));
        }
        slots.Set(3, -1);
        slots.Set(4, kBlocks * kPage);
        const TestTensor scale = Scalar(0.05);
        for (const bool hnd : {false, true}) {
          const auto attrs = [=](CallFrame* frame, int64_t value_offset) {
            if (value_offset >= 0) frame->AddAttr("value_offset", value_offset);
            frame->AddAttr("kv_cache_dtype", kv_cache_dtype)
                .AddAttr("num_blocks", kBlocks)
                .AddAttr("page_size", kPage)
                .AddAttr("block_stride", kPage * row)
                .AddAttr("page_stride", hnd ? head[1] : row)
                .AddAttr("head_stride", hnd ? kPage * head[1] : head[1])
                .AddAttr("key_offset", int64_t{0})
                .AddAttr("debug", false);
          };
          const std::string detail = NameOf(dtype) + " " + kv_cache_dtype +
                                     " " + NameOf(rows) +
                                     (hnd ? " HND" : " NHD");
          const auto keys = [&] { return Random(dtype, rows); };
          Add("reshape_and_cache_flash", detail,
              {keys(), keys(), Random(cache_dtype, cache),
               Random(cache_dtype, cache), slots, scale, scale},
              {{cache_dtype, cache, 2}, {cache_dtype, cache, 3}},
              [=](CallFrame* frame) { attrs(frame, 0); });
          Add("reshape_and_cache_flash_stacked", detail,
              {keys(), keys(), Random(cache_dtype, stacked), slots, scale,
               scale},
              {{cache_dtype, stacked, 2}},
              [=](CallFrame* frame) { attrs(frame, kBlocks * kPage * row); });
          // Not aliased, so that the handler copies the cache first. One
          // cache has no value_offset.
          Add("reshape_and_cache_flash_one", detail,
              {keys(), Random(cache_dtype, cache), slots, scale},
              {{cache_dtype, cache}},
              [=](CallFrame* frame) { attrs(frame, -1); });
        }
      }
    }
  }

  // The kernel finds pairs that share a block and copies those in order.
  void AddCopies() {
    struct Mapping {
      const char* name;
      std::vector<double> pairs;
    };
    std::vector<Mapping> mappings = {
        {"apart", {0, 10, 1, 11, 2, 12, -1, 3, 4, 99, 5, 5}},
        {"a chain", {0, 1, 1, 2, 2, 3, 3, 4, 4, 0, 5, 6}},
        {"one target", {0, 9, 1, 9, 2, 9, 9, 3, 7, 8}},
        {"a swap", {0, 1, 1, 0, 0, 1, 8, 9, 9, 8}},
        {"many", {}},
    };
    // More pairs than a thread block has threads, most of them in conflict.
    for (int i = 0; i < 600; ++i) {
      mappings.back().pairs.push_back(i * 7 % 13);
      mappings.back().pairs.push_back(i * 5 % 13);
    }
    constexpr int64_t kBlocks = 13;
    for (const Mapping& mapping : mappings) {
      const auto num_pairs = static_cast<int64_t>(mapping.pairs.size() / 2);
      const TestTensor pairs(kS64, {num_pairs, 2}, mapping.pairs);
      // Bytes; 16-byte units; enough of them for several thread blocks.
      for (const int64_t size : {7, 512, 20000}) {
        for (const bool in_place : {false, true}) {
          const int64_t gap = size == 7 ? 1 : 0;
          const Dims cache = {kBlocks * (size + gap)};
          Add("copy_blocks",
              std::string(mapping.name) + " " + std::to_string(size) +
                  (in_place ? " in place" : ""),
              {Random(kU8, cache), pairs}, {{kU8, cache, in_place ? 0 : -1}},
              [=](CallFrame* frame) {
                frame->AddAttr("num_blocks", kBlocks)
                    .AddAttr("page_size", int64_t{1})
                    .AddAttr("num_kv_heads", int64_t{1})
                    .AddAttr("head_dim", size)
                    .AddAttr("block_stride", size + gap)
                    .AddAttr("page_stride", int64_t{0})
                    .AddAttr("head_stride", int64_t{0})
                    .AddAttr("offset", int64_t{0})
                    .AddAttr("debug", false);
              });
        }
      }
    }
  }

  struct Batch {
    const char* name;
    std::vector<int64_t> query_lens;
    std::vector<int64_t> kv_lens;
  };

  struct Variant {
    const char* name;
    int64_t page_size = 0;  // 0: contiguous keys
    int64_t num_splits = 1;
    int64_t window_left = -1;
    int64_t window_right = 0;
    float soft_cap = 0.0f;
    const char* kv_cache_dtype = "auto";
    bool extras = false;  // ALiBi slopes, sinks, leftpad_k or seqused_k
  };

  void AddAttention(DType dtype) {
    const Batch batches[] = {
        {"prefill", {130, 70, 1}, {130, 70, 1}},
        {"mixed", {17, 1, 65, 0}, {40, 150, 65, 9}},
        {"decode", {1, 1, 1, 1}, {300, 17, 0, 129}},
    };
    const Variant variants[] = {
        {"contiguous"},
        {"contiguous, full", 0, 1, -1, -1},
        {"contiguous, all features", 0, 1, 33, 5, 20.0f, "auto", true},
        {"contiguous, split", 0, 3},
        {"page 16", 16},
        {"page 16, split", 16, 4},
        {"page 24, all features", 24, 1, 33, 0, 20.0f, "auto", true},
        {"page 16, fp8, split", 16, 3, -1, 0, 0.0f, "fp8_e4m3"},
        {"page 16, e5m2", 16, 1, -1, 0, 0.0f, "fp8_e5m2"},
        {"page 256", 256},
    };
    for (const int64_t head_dim : {64, 128, 256, 40}) {
      for (const Batch& batch : batches) {
        for (const Variant& variant : variants) {
          AddAttention(dtype, head_dim, batch, variant);
        }
      }
    }
  }

  void AddAttention(DType dtype, int64_t head_dim, const Batch& batch,
                    const Variant& v) {
    constexpr int64_t kHeads = 4, kKvHeads = 2;
    const bool paged = v.page_size > 0;
    const bool fp8 = v.kv_cache_dtype != std::string_view("auto");
    const DType kv_dtype = fp8 ? kU8 : dtype;
    const auto num_seqs = static_cast<int64_t>(batch.query_lens.size());
    const int64_t max_num_seqs = num_seqs + 1;

    // One sequence and three tokens more than there are.
    TestTensor cu_seqlens_q(kS32, {max_num_seqs + 1});
    TestTensor cu_seqlens_k(kS32, {max_num_seqs + 1});
    TestTensor seqused_k(kS32, {max_num_seqs});
    TestTensor leftpad_k(kS32, {max_num_seqs});
    int64_t num_tokens = 0, num_kv_tokens = 0, longest = 0;
    for (int64_t s = 0; s <= max_num_seqs; ++s) {
      cu_seqlens_q.Set(s, static_cast<double>(num_tokens));
      cu_seqlens_k.Set(s, static_cast<double>(num_kv_tokens));
      if (s == max_num_seqs) break;
      const int64_t kv_len = s < num_seqs ? batch.kv_lens[s] : 0;
      num_tokens += s < num_seqs ? batch.query_lens[s] : 0;
      num_kv_tokens += kv_len;
      longest = std::max(longest, kv_len);
      seqused_k.Set(s, static_cast<double>(kv_len));
      leftpad_k.Set(s, static_cast<double>(kv_len / 5));
    }
    num_tokens += 3;

    const int64_t max_blocks =
        paged ? (longest + v.page_size - 1) / v.page_size : 0;
    const int64_t num_blocks = paged ? max_blocks * max_num_seqs : 1;
    const int64_t page_size = paged ? v.page_size : num_kv_tokens;
    // Blocks in a mixed order, and one that does not exist.
    TestTensor block_table(kS32, {max_num_seqs, max_blocks});
    for (int64_t i = 0; i < block_table.size(); ++i) {
      block_table.Set(i, static_cast<double>(block_table.size() - 1 - i));
    }
    if (max_blocks > 1) block_table.Set(1, 9999);

    const Dims query = {num_tokens, kHeads, head_dim};
    const Dims cache = {num_blocks, page_size, kKvHeads, head_dim};
    const int64_t workspace =
        AttentionWorkspaceBytes(num_tokens, kHeads, head_dim, v.num_splits);
    const std::string detail = NameOf(dtype) + " " + std::to_string(head_dim) +
                               " " + batch.name + ", " + v.name;
    const TestTensor scale = Scalar(0.1);
    Add(paged ? "paged_attention" : "flash_attn_varlen", detail,
        {Random(dtype, query), Random(kv_dtype, cache), Random(kv_dtype, cache),
         cu_seqlens_q, paged ? Absent(kS32) : cu_seqlens_k,
         paged ? seqused_k : Absent(kS32), paged ? block_table : Absent(kS32),
         !paged && v.extras ? leftpad_k : Absent(kS32),
         TestTensor(kS32, {1}, {static_cast<double>(num_seqs)}),
         v.extras ? Random(kF32, {kHeads}, 0.1) : Absent(kF32),
         v.extras ? Random(kF32, {kHeads}) : Absent(kF32),
         fp8 ? scale : Absent(kF32), fp8 ? scale : Absent(kF32)},
        {{dtype, query},
         {kF32, {kHeads, num_tokens}},
         {kU8, {workspace}, -1, /*scratch=*/true}},
        [=](CallFrame* frame) {
          const int64_t row = kKvHeads * head_dim;
          frame->AddAttr("scale", 0.125f)
              .AddAttr("window_left", v.window_left)
              .AddAttr("window_right", v.window_right)
              .AddAttr("soft_cap", v.soft_cap)
              .AddAttr("kv_cache_dtype", v.kv_cache_dtype)
              .AddAttr("paged", paged)
              .AddAttr("num_splits", v.num_splits)
              .AddAttr("num_kv_heads", kKvHeads)
              .AddAttr("num_blocks", num_blocks)
              .AddAttr("page_size", page_size)
              .AddAttr("block_stride", page_size * row)
              .AddAttr("page_stride", row)
              .AddAttr("head_stride", head_dim)
              .AddAttr("key_offset", int64_t{0})
              .AddAttr("value_offset", int64_t{0})
              .AddAttr("debug", false);
        });
  }

  std::mt19937 random_{1};
  std::vector<Case> cases_;
};

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
    without_case.insert(target);
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
