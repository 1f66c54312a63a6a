// A typed-FFI handler from its parts, one macro call a target:
//
//   // in rms_norm_cpu.cc, inside namespace xla_ops
//   XLA_OPS_CPU_HANDLER(rms_norm, RmsNormBinding(), MakeRmsNormParams,
//   RmsNorm);
//
// It makes the C function xla_ops_rms_norm_cpu, which other frameworks find by
// that name, and adds {"xla_ops.rms_norm", "Host"} to the library's table
// (registry.h). device/cuda_handler.h has the same for CUDA. The parts:
//
//   auto RmsNormBinding();    operands and attributes, for every platform
//   ffi::Error MakeRmsNormParams(<what is bound, in order>,
//                                RmsNormParams* params);
//   void RmsNorm(const RmsNormParams& params, ffi::ThreadPool& pool);
//
// The handler runs the last, which may return ffi::Error too, if the one
// before succeeded.
//
// Tested by handler_test.cc.

#ifndef XLA_OPS_CC_CORE_HANDLER_H_
#define XLA_OPS_CC_CORE_HANDLER_H_

#include <cstddef>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/core/error.h"
#include "xla_ops/cc/core/registry.h"

namespace xla_ops {

// What XLA calls with the bound operands and attributes and, behind them, the
// platform's context: make(operands..., &params), then run(params, context).
template <typename Params, typename Make, typename Run>
class CheckedHandler {
 public:
  CheckedHandler(Make make, Run run) : make_(make), run_(run) {}

  template <typename... Args>
  ffi::Error operator()(Args... args) const {
    return Call(std::forward_as_tuple(args...),
                std::make_index_sequence<sizeof...(Args) - 1>());
  }

 private:
  template <typename Args, size_t... kOperands>
  ffi::Error Call(Args args, std::index_sequence<kOperands...>) const {
    Params params = {};
    XLA_OPS_RETURN_IF_ERROR(make_(std::get<kOperands>(args)..., &params));
    return run_(params, std::get<sizeof...(kOperands)>(args));
  }

  Make make_;
  Run run_;
};

template <typename Params, typename Make, typename Run>
auto MakeCheckedHandler(Make make, Run run) {
  return CheckedHandler<Params, Make, Run>(make, run);
}

template <typename Make, typename Result, typename Params>
auto CpuHandler(Make make, Result (*run)(const Params&, ffi::ThreadPool&)) {
  return MakeCheckedHandler<Params>(
      make, [run](const Params& params, ffi::ThreadPool& pool) {
        if constexpr (std::is_void_v<Result>) {
          run(params, pool);
          return ffi::Error::Success();
        } else {
          return run(params, pool);
        }
      });
}

// The library's table, filled while it is loaded; never destroyed, since
// handlers may run while the process exits.
XLA_OPS_HIDDEN inline std::vector<XlaOpsHandler>& HandlerTable() {
  static auto* const table = new std::vector<XlaOpsHandler>;
  return *table;
}

XLA_OPS_HIDDEN inline bool AddToHandlerTable(const XlaOpsHandler& handler) {
  HandlerTable().push_back(handler);
  return true;
}

}  // namespace xla_ops

// `used`: nothing in the library calls it, and it must be exported all the
// same.
extern "C" XLA_OPS_EXPORT __attribute__((used)) inline const XlaOpsHandler*
xla_ops_handlers(size_t* count) {
  *count = xla_ops::HandlerTable().size();
  return xla_ops::HandlerTable().data();
}

extern "C" XLA_OPS_EXPORT __attribute__((used)) inline int
xla_ops_api_version() {
  return XLA_OPS_API_VERSION;
}

// What targets begin with. A library outside this project defines its own
// before it includes this file, such as "mine.".
#ifndef XLA_OPS_TARGET_PREFIX
#define XLA_OPS_TARGET_PREFIX "xla_ops."
#endif

// Defines the exported C function `symbol`.
#define XLA_OPS_HANDLER_SYMBOL(symbol, ...)                                 \
  extern "C" XLA_OPS_EXPORT XLA_FFI_Error* symbol(XLA_FFI_CallFrame* call); \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(symbol, __VA_ARGS__)

// The last argument is the handlers' XlaOpsHandlerBundle, in braces.
#define XLA_OPS_LIST_HANDLER(target, platform, ...)              \
  [[maybe_unused]] static const bool xla_ops_##target##_listed = \
      ::xla_ops::AddToHandlerTable(                              \
          {XLA_OPS_TARGET_PREFIX #target, platform, __VA_ARGS__})

#define XLA_OPS_CPU_HANDLER(target, binding, make, run)            \
  XLA_OPS_HANDLER_SYMBOL(xla_ops_##target##_cpu,                   \
                         ::xla_ops::CpuHandler(make, run),         \
                         (binding).Ctx<::xla::ffi::ThreadPool>()); \
  XLA_OPS_LIST_HANDLER(target, "Host",                             \
                       {nullptr, nullptr, nullptr, xla_ops_##target##_cpu})

#endif  // XLA_OPS_CC_CORE_HANDLER_H_
