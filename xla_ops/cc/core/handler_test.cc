// XLA_OPS_CPU_HANDLER: what reaches the parts of a handler, and the table.

#include "xla_ops/cc/core/handler.h"

#include <cstdint>
#include <string>

#include "xla_ops/cc/core/call_frame.h"
#include "xla_ops/cc/core/checks.h"
#include "xla_ops/cc/core/test_tensor.h"
#include "xla_ops/cc/core/testing.h"

namespace xla_ops {
namespace {

using testing::ExpectInvalid;
using testing::ExpectOk;

struct AddParams {
  const int64_t* input;
  int64_t summand;
  int64_t* out;
};

auto AddBinding() {
  return ffi::Ffi::Bind()
      .Arg<ffi::AnyBuffer>()  // input
      .Ret<ffi::AnyBuffer>()  // out
      .Attr<int64_t>("summand");
}

ffi::Error MakeAddParams(ffi::AnyBuffer input, ffi::Result<ffi::AnyBuffer> out,
                         int64_t summand, AddParams* params) {
  XLA_OPS_RETURN_IF_ERROR(CheckAtLeast("add", "summand", summand, 0));
  params->input = static_cast<const int64_t*>(input.untyped_data());
  params->summand = summand;
  params->out = static_cast<int64_t*>(out->untyped_data());
  return ffi::Error::Success();
}

void Add(const AddParams& params, ffi::ThreadPool&) {
  *params.out = *params.input + params.summand;
}

// Fails after its work, and only then.
ffi::Error AddTooMuch(const AddParams& params, ffi::ThreadPool& pool) {
  Add(params, pool);
  if (*params.out < 100) return ffi::Error::Success();
  return ffi::Error::Internal("too much");
}

}  // namespace

XLA_OPS_CPU_HANDLER(add, AddBinding(), MakeAddParams, Add);
XLA_OPS_CPU_HANDLER(add_too_much, AddBinding(), MakeAddParams, AddTooMuch);

namespace {

CallStatus Run(XLA_FFI_Handler* handler, int64_t input, int64_t summand,
               int64_t* out) {
  CallFrame frame;
  frame.AddArg(&input, XLA_FFI_DataType_S64, {})
      .AddResult(out, XLA_FFI_DataType_S64, {})
      .AddAttr("summand", summand);
  return frame.Call(handler);
}

XLA_OPS_TEST(RunsWithWhatWasMade) {
  int64_t out = 0;
  ExpectOk(Run(xla_ops_add_cpu, 4, 3, &out));
  EXPECT_EQ(out, 7);
  ExpectOk(Run(xla_ops_add_too_much_cpu, 4, 5, &out));
  EXPECT_EQ(out, 9);
}

XLA_OPS_TEST(RunsNothingAfterAFailedCheck) {
  int64_t out = 11;
  ExpectInvalid(Run(xla_ops_add_cpu, 4, -1, &out),
                "add: summand must be at least 0, got -1");
  EXPECT_EQ(out, 11);
}

XLA_OPS_TEST(ReturnsTheErrorOfTheWork) {
  int64_t out = 0;
  const CallStatus status = Run(xla_ops_add_too_much_cpu, 99, 1, &out);
  EXPECT_TRUE(!status.ok());
  EXPECT_EQ(status.message, "too much");
  EXPECT_EQ(out, 100);
}

XLA_OPS_TEST(TableListsHandlersInTheirOrder) {
  size_t count = 0;
  const XlaOpsHandler* handlers = xla_ops_handlers(&count);
  EXPECT_EQ(count, 2u);
  EXPECT_EQ(std::string(handlers[0].target), "xla_ops.add");
  EXPECT_EQ(std::string(handlers[0].platform), "Host");
  EXPECT_TRUE(handlers[0].bundle.execute == xla_ops_add_cpu);
  EXPECT_TRUE(handlers[0].bundle.initialize == nullptr);
  EXPECT_EQ(std::string(handlers[1].target), "xla_ops.add_too_much");
  EXPECT_TRUE(handlers[1].bundle.execute == xla_ops_add_too_much_cpu);
}

}  // namespace
}  // namespace xla_ops

XLA_OPS_TEST_MAIN()
