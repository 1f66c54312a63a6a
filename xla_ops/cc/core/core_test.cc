// Call frames, operand checks, dtypes, cache geometry and ParallelFor.

#include <atomic>
#include <cstdint>
#include <limits>
#include <memory>
#include <mutex>  // NOLINT
#include <set>
#include <string>
#include <thread>  // NOLINT
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/core/cache_geometry.h"
#include "xla_ops/cc/core/call_frame.h"
#include "xla_ops/cc/core/checks.h"
#include "xla_ops/cc/core/dispatch.h"
#include "xla_ops/cc/core/error.h"
#include "xla_ops/cc/core/ffi_dtype.h"
#include "xla_ops/cc/core/parallel.h"
#include "xla_ops/cc/core/registry.h"
#include "xla_ops/cc/core/test_tensor.h"
#include "xla_ops/cc/core/testing.h"

namespace xla_ops {
namespace {

using testing::ExpectInvalid;
using testing::ExpectOk;
using testing::TestThreads;

std::string ErrorText(const ffi::Error& error) { return error.message(); }

// --- Call frames -----------------------------------------------------------

// Every kind of operand at once; the result says what arrived.
ffi::Error Describe(ffi::AnyBuffer arg, ffi::Result<ffi::AnyBuffer> out,
                    bool flag, int32_t i32, int64_t i64, float f32, double f64,
                    std::string_view text, ffi::Span<const int64_t> sizes,
                    ffi::Span<const float> factors) {
  const bool right = arg.element_type() == ffi::F32 &&
                     arg.dimensions().size() == 2 && arg.dimensions()[0] == 2 &&
                     arg.dimensions()[1] == 3 && flag && i32 == -7 &&
                     i64 == (int64_t{1} << 40) && f32 == 0.5f && f64 == 0.1 &&
                     text == "NHD" && sizes.size() == 2 && sizes[1] == 9 &&
                     factors.size() == 1 && factors[0] == 2.0f;
  *static_cast<int32_t*>(out->untyped_data()) = right ? 1 : 2;
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(DescribeHandler, Describe,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<bool>("flag")
                                  .Attr<int32_t>("i32")
                                  .Attr<int64_t>("i64")
                                  .Attr<float>("f32")
                                  .Attr<double>("f64")
                                  .Attr<std::string_view>("text")
                                  .Attr<ffi::Span<const int64_t>>("sizes")
                                  .Attr<ffi::Span<const float>>("factors"));

void FillDescribeFrame(CallFrame* frame, const float* arg, int32_t* out) {
  // Not in the order of the names, in which handlers expect them.
  frame->AddArg(arg, XLA_FFI_DataType_F32, {2, 3})
      .AddResult(out, XLA_FFI_DataType_S32, {1})
      .AddAttr("text", "NHD")
      .AddAttr("flag", true)
      .AddAttr("f64", 0.1)
      .AddAttr("f32", 0.5f)
      .AddAttr("i64", int64_t{1} << 40)
      .AddAttr("i32", int32_t{-7})
      .AddAttr("sizes", std::vector<int64_t>{8, 9})
      .AddAttr("factors", std::vector<float>{2.0f});
}

XLA_OPS_TEST(FramePassesEveryKindOfOperand) {
  const float arg[6] = {};
  int32_t out = 0;
  CallFrame frame;
  FillDescribeFrame(&frame, arg, &out);
  ExpectOk(frame.Call(DescribeHandler));
  EXPECT_EQ(out, 1);
  out = 0;
  ExpectOk(frame.Call(DescribeHandler));  // and once more
  EXPECT_EQ(out, 1);
}

XLA_OPS_TEST(FrameRefusesAnAttributeGivenTwice) {
  int32_t out = 0;
  const float arg[6] = {};
  CallFrame frame;
  FillDescribeFrame(&frame, arg, &out);
  frame.AddAttr("i64", int64_t{3});
  ExpectInvalid(frame.Call(DescribeHandler), "attribute i64 is given twice");
  EXPECT_EQ(out, 0);
}

XLA_OPS_TEST(WrongOperandsAreErrorsOfTheBinding) {
  CallFrame frame;
  const CallStatus status = frame.Call(DescribeHandler);
  EXPECT_EQ(status.code, XLA_FFI_Error_Code_INVALID_ARGUMENT);
  EXPECT_TRUE(status.message.find("Wrong number of arguments") !=
              std::string::npos);
}

XLA_OPS_TEST(WrongStageIsAnErrorOfTheBinding) {
  const float arg[6] = {};
  int32_t out = 0;
  CallFrame frame;
  FillDescribeFrame(&frame, arg, &out);
  EXPECT_TRUE(
      !frame.Call(DescribeHandler, XLA_FFI_ExecutionStage_PREPARE).ok());
  EXPECT_EQ(out, 0);
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    FailHandler,
    [] { return ffi::Error(ffi::ErrorCode::kResourceExhausted, "no room"); },
    ffi::Ffi::Bind());

XLA_OPS_TEST(ErrorsKeepCodeAndText) {
  CallFrame frame;
  const CallStatus status = frame.Call(FailHandler);
  EXPECT_EQ(status.code, XLA_FFI_Error_Code_RESOURCE_EXHAUSTED);
  EXPECT_EQ(status.message, "no room");
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    StreamHandler,
    [](void* stream, int32_t ordinal, ffi::Result<ffi::AnyBuffer> out) {
      static_cast<int64_t*>(out->untyped_data())[0] =
          reinterpret_cast<intptr_t>(stream);
      static_cast<int64_t*>(out->untyped_data())[1] = ordinal;
      return ffi::Error::Success();
    },
    ffi::Ffi::Bind()
        .Ctx<ffi::PlatformStream<void*>>()
        .Ctx<ffi::DeviceOrdinal>()
        .Ret<ffi::AnyBuffer>());

XLA_OPS_TEST(StreamAndOrdinalArrive) {
  int64_t out[2] = {-1, -1};
  CallFrame frame;
  frame.AddResult(out, XLA_FFI_DataType_S64, {2});
  const CallStatus none = frame.Call(StreamHandler);
  EXPECT_EQ(none.code, XLA_FFI_Error_Code_INVALID_ARGUMENT);
  EXPECT_TRUE(none.message.find("this call has no stream") !=
              std::string::npos);
  frame.SetStream(nullptr);  // the default stream is a stream
  ExpectOk(frame.Call(StreamHandler));
  EXPECT_EQ(out[0], 0);
  EXPECT_EQ(out[1], 0);
  frame.SetStream(out).SetDeviceOrdinal(3);
  ExpectOk(frame.Call(StreamHandler));
  EXPECT_EQ(out[0], reinterpret_cast<intptr_t>(&out[0]));
  EXPECT_EQ(out[1], 3);
}

struct Plan {
  static ffi::TypeId id;
  explicit Plan(int64_t size, std::atomic<int>* alive)
      : size(size), alive(alive) {
    ++*alive;
  }
  ~Plan() { --*alive; }
  int64_t size;
  std::atomic<int>* alive;
};
ffi::TypeId Plan::id = {};

std::atomic<int> plans_alive{0};

// Asks for its type's id first, as a library does when XLA loads it.
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    InstantiateHandler,
    [](const XLA_FFI_Api* api,
       int64_t size) -> ffi::ErrorOr<std::unique_ptr<Plan>> {
      if (ffi::Ffi::RegisterTypeId(api, "xla_ops.Plan", &Plan::id)) {
        return ffi::Unexpected(ffi::Error::Internal("no type id"));
      }
      return std::make_unique<Plan>(size, &plans_alive);
    },
    ffi::Ffi::BindInstantiate().Ctx<ffi::FfiApi>().Attr<int64_t>("size"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    ExecuteHandler,
    [](Plan* plan, ffi::AnyBuffer, ffi::Result<ffi::AnyBuffer> out, int64_t) {
      *static_cast<int64_t*>(out->untyped_data()) = plan->size;
      return ffi::Error::Success();
    },
    ffi::Ffi::Bind()
        .Ctx<ffi::State<Plan>>()
        .Arg<ffi::AnyBuffer>()
        .Ret<ffi::AnyBuffer>()
        .Attr<int64_t>("size"));

XLA_OPS_TEST(StateLivesFromInstantiateToExecute) {
  int64_t out = 0;
  const float arg = 0;
  {
    CallState state;
    for (int call = 0; call < 3; ++call) {
      CallFrame frame;
      frame.AddArg(&arg, XLA_FFI_DataType_F32, {})
          .AddResult(&out, XLA_FFI_DataType_S64, {})
          .AddAttr("size", int64_t{42})
          .SetState(&state);
      if (call == 0) {
        // Sees no buffers: its binding has none.
        ExpectOk(
            frame.Call(InstantiateHandler, XLA_FFI_ExecutionStage_INSTANTIATE));
      }
      out = 0;
      ExpectOk(frame.Call(ExecuteHandler));
      EXPECT_EQ(out, 42);
      EXPECT_EQ(plans_alive.load(), 1);
    }
  }
  EXPECT_EQ(plans_alive.load(), 0);
  EXPECT_TRUE(Plan::id.type_id > 0);
}

XLA_OPS_TEST(AFrameKeepsItsOwnState) {
  int64_t out = 0;
  const float arg = 0;
  {
    CallFrame frame;
    frame.AddArg(&arg, XLA_FFI_DataType_F32, {})
        .AddResult(&out, XLA_FFI_DataType_S64, {})
        .AddAttr("size", int64_t{7});
    const CallStatus early = frame.Call(ExecuteHandler);
    EXPECT_TRUE(early.message.find("the call has no state of this type") !=
                std::string::npos);
    ExpectOk(
        frame.Call(InstantiateHandler, XLA_FFI_ExecutionStage_INSTANTIATE));
    ExpectOk(frame.Call(ExecuteHandler));
    EXPECT_EQ(out, 7);
    // A second state is refused and freed.
    const CallStatus twice =
        frame.Call(InstantiateHandler, XLA_FFI_ExecutionStage_INSTANTIATE);
    EXPECT_EQ(twice.code, XLA_FFI_Error_Code_ALREADY_EXISTS);
    EXPECT_EQ(plans_alive.load(), 1);
  }
  EXPECT_EQ(plans_alive.load(), 0);
}

// Completes its future from another thread.
ffi::Future Later(int64_t value, ffi::Result<ffi::AnyBuffer> out) {
  ffi::Promise promise;
  ffi::Future future(promise);
  auto* to = static_cast<int64_t*>(out->untyped_data());
  std::thread([promise, to, value]() mutable {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    *to = value;
    if (value < 0) {
      promise.SetError(ffi::Error::InvalidArgument("negative"));
    } else {
      promise.SetAvailable();
    }
  }).detach();
  return future;
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    LaterHandler, Later,
    ffi::Ffi::Bind().Attr<int64_t>("value").Ret<ffi::AnyBuffer>());

XLA_OPS_TEST(CallWaitsForFutures) {
  for (int i = 0; i < 20; ++i) {
    int64_t out = 0;
    CallFrame good;
    good.AddAttr("value", int64_t{5}).AddResult(&out, XLA_FFI_DataType_S64, {});
    ExpectOk(good.Call(LaterHandler));
    EXPECT_EQ(out, 5);
    CallFrame bad;
    bad.AddAttr("value", int64_t{-5}).AddResult(&out, XLA_FFI_DataType_S64, {});
    ExpectInvalid(bad.Call(LaterHandler), "negative");
    EXPECT_EQ(out, -5);
  }
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(CapturableHandler,
                              [] { return ffi::Error::Success(); },
                              ffi::Ffi::Bind(),
                              {ffi::Traits::kCmdBufferCompatible});

XLA_OPS_TEST(MetadataTellsVersionAndTraits) {
  XLA_FFI_Metadata metadata;
  ExpectOk(QueryMetadata(CapturableHandler, &metadata));
  EXPECT_EQ(metadata.api_version.major_version, XLA_FFI_API_MAJOR);
  EXPECT_EQ(metadata.api_version.minor_version, XLA_FFI_API_MINOR);
  EXPECT_EQ(metadata.traits,
            uint32_t{XLA_FFI_HANDLER_TRAITS_COMMAND_BUFFER_COMPATIBLE});
  ExpectOk(QueryMetadata(FailHandler, &metadata));
  EXPECT_EQ(metadata.traits, 0u);
}

// --- Dtypes ----------------------------------------------------------------

constexpr DType kAllDTypes[] = {DType::kF32,      DType::kF16,    DType::kBF16,
                                DType::kF8E4M3FN, DType::kF8E5M2, DType::kS8,
                                DType::kU8,       DType::kS32,    DType::kS64};

XLA_OPS_TEST(DTypesConvertBothWays) {
  for (const DType dtype : kAllDTypes) {
    EXPECT_TRUE(ToDType(ToFfi(dtype)) == dtype);
    EXPECT_EQ(static_cast<int64_t>(ffi::ByteWidth(ToFfi(dtype))),
              SizeOf(dtype));
    EXPECT_EQ(DTypeName(ToFfi(dtype)), std::string(Name(dtype)));
  }
  EXPECT_TRUE(!ToDType(ffi::F64).has_value());
  EXPECT_EQ(DTypeName(ffi::F64), "float64");
  EXPECT_EQ(DTypeName(ffi::PRED), "bool");
  EXPECT_EQ(DTypeName(ffi::S4), "S4");
}

XLA_OPS_TEST(DispatchKnowsTheTypeAtCompileTime) {
  for (const DType dtype : kFloatDTypes) {
    const int64_t size = DispatchFloat(dtype, [](auto constant) {
      return static_cast<int64_t>(sizeof(CpuType<constant.value>));
    });
    EXPECT_EQ(size, SizeOf(dtype));
    EXPECT_TRUE(DispatchFloat(dtype, [](auto constant) {
                  return constant.value;
                }) == dtype);
  }
}

// --- Checks ----------------------------------------------------------------

// A buffer as a handler sees it.
class FakeBuffer {
 public:
  FakeBuffer(ffi::DataType dtype, std::vector<int64_t> dims)
      : dims_(std::move(dims)),
        buffer_{XLA_FFI_Buffer_STRUCT_SIZE,           nullptr,
                static_cast<XLA_FFI_DataType>(dtype), nullptr,
                static_cast<int64_t>(dims_.size()),   dims_.data()} {}
  ffi::AnyBuffer get() { return ffi::AnyBuffer(&buffer_); }

 private:
  std::vector<int64_t> dims_;
  XLA_FFI_Buffer buffer_;
};

XLA_OPS_TEST(ErrorsHaveOneForm) {
  EXPECT_EQ(ErrorText(MustError("op", "eps", "be positive", "0")),
            "op: eps must be positive, got 0");
  EXPECT_EQ(FormatFloat(0.0), "0");
  EXPECT_EQ(FormatFloat(1e-6f), "1e-06");
  EXPECT_EQ(FormatFloat(std::numeric_limits<double>::infinity()), "inf");
  EXPECT_EQ(FormatDTypes({DType::kF32}), "float32");
  EXPECT_EQ(FormatDTypes({DType::kF32, DType::kF16}), "float32 or float16");
  EXPECT_EQ(FormatDTypes(kFloatDTypes), "float32, float16 or bfloat16");
}

XLA_OPS_TEST(ChecksAcceptAndRefuse) {
  FakeBuffer matrix(ffi::F32, {2, 3});
  FakeBuffer scalar(ffi::S32, {});
  const ffi::AnyBuffer m = matrix.get();
  EXPECT_EQ(ErrorText(CheckDType("op", "x", m, kFloatDTypes)), "");
  EXPECT_EQ(ErrorText(CheckDType("op", "x", scalar.get(), kFloatDTypes)),
            "op: x must be float32, float16 or bfloat16, got int32");
  EXPECT_EQ(ErrorText(CheckShape("op", "x", m, {2, 3})), "");
  EXPECT_EQ(ErrorText(CheckShape("op", "x", m, {"rows", 3})), "");
  EXPECT_EQ(ErrorText(CheckShape("op", "x", m, {"rows", 4})),
            "op: x must have shape [rows, 4], got [2, 3]");
  EXPECT_EQ(ErrorText(CheckShape("op", "x", m, {6})),
            "op: x must have shape [6], got [2, 3]");
  EXPECT_EQ(ErrorText(CheckShape("op", "x", scalar.get(), {"n"})),
            "op: x must have shape [n], got []");
  EXPECT_EQ(ErrorText(CheckShape("op", "x", scalar.get(), {})), "");
  EXPECT_EQ(ErrorText(CheckSameAs("op", "x", m, m)), "");
  EXPECT_EQ(ErrorText(CheckSameAs("op", "x", scalar.get(), m)),
            "op: x must be float32, got int32");
  FakeBuffer other(ffi::F32, {3, 2});
  EXPECT_EQ(ErrorText(CheckSameAs("op", "x", other.get(), m)),
            "op: x must have shape [2, 3], got [3, 2]");
  EXPECT_EQ(ErrorText(CheckOneElement("op", "x", scalar.get())), "");
  EXPECT_EQ(ErrorText(CheckOneElement("op", "x", m)),
            "op: x must have 1 element, got shape [2, 3]");
  EXPECT_EQ(ErrorText(CheckAtLeast("op", "n", 0, 0)), "");
  EXPECT_EQ(ErrorText(CheckAtLeast("op", "n", -1, 0)),
            "op: n must be at least 0, got -1");
}

// --- Cache geometry --------------------------------------------------------

constexpr int64_t kHuge = int64_t{1} << 62;

XLA_OPS_TEST(CacheExtentIsExact) {
  // NHD, 3 blocks of 4 tokens of 2 heads of 8.
  EXPECT_EQ(CacheExtent({3, 4, 64, 16, 8}, 2, 8), 3 * 4 * 2 * 8);
  // HND.
  EXPECT_EQ(CacheExtent({3, 4, 64, 8, 32}, 2, 8), 3 * 4 * 2 * 8);
  // Every second block: the last gap is not part of it.
  EXPECT_EQ(CacheExtent({3, 4, 128, 16, 8}, 2, 8), 5 * 64);
  EXPECT_EQ(CacheExtent({1, 1, 0, 0, 0}, 1, 1), 1);
  EXPECT_EQ(CacheExtent({0, 4, 64, 16, 8}, 2, 8), 0);
  EXPECT_EQ(CacheExtent({3, 0, kHuge, kHuge, 8}, 2, 8), 0);
  EXPECT_EQ(CacheExtent({3, 4, kHuge, 16, 8}, 2, 8), -1);
  EXPECT_EQ(CacheExtent({kHuge, 4, kHuge, 16, 8}, 2, 8), -1);
  EXPECT_EQ(CacheExtent({2, 3, kHuge, kHuge, 8}, 2, 8), -1);
}

XLA_OPS_TEST(CacheBoundsHold) {
  FakeBuffer buffer(ffi::F32, {2, 192});
  const CacheGeometry geometry = {3, 4, 64, 16, 8};
  const auto check = [&](const CacheGeometry& geometry, int64_t offset) {
    return ErrorText(CheckCacheInBounds("op", "key_cache", buffer.get(),
                                        geometry, 2, 8, "key_offset", offset));
  };
  EXPECT_EQ(check(geometry, 0), "");
  EXPECT_EQ(check(geometry, 192), "");
  EXPECT_EQ(check(geometry, 193),
            "op: key_cache must have at least 385 elements, got 384");
  EXPECT_EQ(check(geometry, -1), "op: key_offset must be at least 0, got -1");
  EXPECT_EQ(check(geometry, std::numeric_limits<int64_t>::max()),
            "op: key_cache must hold its view (offset and strides), got "
            "384 elements");
  EXPECT_EQ(check({3, 4, kHuge, 16, 8}, 0),
            "op: key_cache must hold its view (offset and strides), got "
            "384 elements");
  EXPECT_EQ(check({0, 4, 64, 16, 8}, kHuge), "");  // nothing to reach
  EXPECT_EQ(ErrorText(CheckGeometry("op", geometry)), "");
  EXPECT_EQ(ErrorText(CheckGeometry("op", {3, -4, 64, 16, 8})),
            "op: page_size must be at least 0, got -4");
  EXPECT_EQ(ErrorText(CheckGeometry("op", {3, 4, 64, 16, -8})),
            "op: head_stride must be at least 0, got -8");
  EXPECT_EQ(ErrorText(CheckGeometry("op", {kHuge, 4, 0, 0, 0})),
            "op: num_blocks must give less than 2^63 slots, got "
            "4611686018427387904");
}

// --- ParallelFor -----------------------------------------------------------

constexpr int64_t kCount = 1000;

struct ParallelProbe {
  std::vector<std::atomic<int>> calls = std::vector<std::atomic<int>>(kCount);
  std::vector<std::atomic<int>> busy = std::vector<std::atomic<int>>(256);
  std::atomic<int> shared_workers{0};
  std::mutex mutex;
  std::set<std::thread::id> threads;
};

ParallelProbe* probe = nullptr;

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    ParallelHandler,
    [](ffi::ThreadPool pool, int64_t cost) {
      const int workers = NumWorkers(pool, kCount, cost);
      ParallelForWithWorker(pool, kCount, cost, [&](int worker, int64_t i) {
        if (worker < 0 || worker >= workers) ++probe->shared_workers;
        if (probe->busy[worker]++ != 0) ++probe->shared_workers;
        ++probe->calls[i];
        std::this_thread::sleep_for(std::chrono::microseconds(20));
        {
          std::lock_guard<std::mutex> lock(probe->mutex);
          probe->threads.insert(std::this_thread::get_id());
        }
        --probe->busy[worker];
      });
      return ffi::Error::Success();
    },
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attr<int64_t>("cost"));

// Runs the handler over `runner` and returns how many threads took part.
size_t RunParallel(TaskRunner* runner, int64_t cost) {
  ParallelProbe local;
  probe = &local;
  CallFrame frame;
  frame.AddAttr("cost", cost).SetTaskRunner(runner);
  ExpectOk(frame.Call(ParallelHandler));
  for (const auto& calls : local.calls) EXPECT_EQ(calls.load(), 1);
  EXPECT_EQ(local.shared_workers.load(), 0);
  return local.threads.size();
}

XLA_OPS_TEST(ParallelForWithoutPoolRunsHere) {
  EXPECT_EQ(RunParallel(nullptr, int64_t{1} << 40), 1u);
}

XLA_OPS_TEST(ParallelForUsesThreads) {
  TestThreads threads(8);
  EXPECT_TRUE(RunParallel(&threads, int64_t{1} << 62) > 1);
}

XLA_OPS_TEST(ParallelForKeepsSmallWorkHere) {
  TestThreads threads(8);
  EXPECT_EQ(RunParallel(&threads, 1), 1u);
}

// A busy pool: its tasks start only after the handler has returned.
class LateRunner : public TaskRunner {
 public:
  ~LateRunner() override {
    for (const auto& task : tasks_) task.first(task.second);
  }
  int64_t num_threads() const override { return 4; }
  void Schedule(XLA_FFI_Task* task, void* data) override {
    tasks_.emplace_back(task, data);
  }

 private:
  std::vector<std::pair<XLA_FFI_Task*, void*>> tasks_;
};

XLA_OPS_TEST(ParallelForNeedsNoOtherThread) {
  LateRunner late;
  EXPECT_EQ(RunParallel(&late, int64_t{1} << 40), 1u);
  probe = nullptr;  // a late task that touches it crashes
}

// --- Registry --------------------------------------------------------------

}  // namespace
}  // namespace xla_ops

XLA_OPS_EXPORT_HANDLERS({"xla_ops.first",
                         "Host",
                         {nullptr, nullptr, nullptr, xla_ops::FailHandler}},
                        {"xla_ops.second",
                         "CUDA",
                         {xla_ops::InstantiateHandler, nullptr, nullptr,
                          xla_ops::ExecuteHandler}})

XLA_OPS_TEST(TableListsHandlers) {
  size_t count = 0;
  const XlaOpsHandler* handlers = xla_ops_handlers(&count);
  EXPECT_EQ(count, 2u);
  EXPECT_EQ(std::string(handlers[0].target), "xla_ops.first");
  EXPECT_EQ(std::string(handlers[1].platform), "CUDA");
  EXPECT_TRUE(handlers[0].bundle.instantiate == nullptr);
  EXPECT_TRUE(handlers[1].bundle.instantiate == xla_ops::InstantiateHandler);
}

XLA_OPS_TEST_MAIN()
