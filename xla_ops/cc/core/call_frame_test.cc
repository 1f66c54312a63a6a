// Hand-built call frames, and the handler table: small handlers that say what
// arrived, or fail, wait, or keep state.

#include "xla_ops/cc/core/call_frame.h"

#include <atomic>
#include <chrono>  // NOLINT
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <thread>  // NOLINT
#include <vector>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/core/error.h"
#include "xla_ops/cc/core/test_tensor.h"
#include "xla_ops/cc/core/testing.h"

namespace xla_ops {
namespace {

using testing::ExpectInvalid;
using testing::ExpectOk;

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

}  // namespace
}  // namespace xla_ops

XLA_OPS_TEST_MAIN()
