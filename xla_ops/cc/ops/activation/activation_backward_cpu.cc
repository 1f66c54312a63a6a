// CPU kernel and handler of activation_backward, rows spread over XLA's
// threads.

#include <cmath>
#include <cstdint>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/core/dispatch.h"
#include "xla_ops/cc/core/exp.h"
#include "xla_ops/cc/core/float.h"
#include "xla_ops/cc/core/handler.h"
#include "xla_ops/cc/core/parallel.h"
#include "xla_ops/cc/ops/activation/activation_backward.h"
#include "xla_ops/cc/ops/activation/activation_backward_checks.h"
#include "xla_ops/cc/ops/activation/activation_gradient.h"

namespace xla_ops {
namespace {

// Inner-loop steps of ParallelFor's cost model that one exp, erf or tanh is.
constexpr int64_t kFunctionCost = 16;

struct CpuMath {
  static float Sigmoid(float x) { return 1.0f / (1.0f + xla_ops::Exp(-x)); }
  static float Tanh(float x) { return std::tanh(x); }
  static float Erf(float x) { return std::erf(x); }
  static float Exp(float x) { return xla_ops::Exp(x); }
};

// `grad`: [size]; `row` and `dinput`: [2 * size], or [size] without a gate.
template <Activation kActivation, typename T>
void GradientRow(const T* grad, const T* row, int64_t size,
                 const ActivationConstants& constants, T* dinput) {
  constexpr bool kGated = IsGated(kActivation);
  constexpr bool kPairs = kActivation == Activation::kSwigluoaiAndMul;
  for (int64_t i = 0; i < size; ++i) {
    const int64_t x = kPairs ? 2 * i : i;
    const int64_t y = kPairs ? 2 * i + 1 : kGated ? size + i : i;
    const InputGradient found = GradientOf<kActivation, CpuMath>(
        ToFloat(grad[i]), ToFloat(row[x]), ToFloat(row[y]), constants);
    dinput[x] = FromFloat<T>(found.dx);
    if constexpr (kGated) dinput[y] = FromFloat<T>(found.dy);
  }
}

void ActivationBackward(const ActivationBackwardParams& params,
                        ffi::ThreadPool& pool) {
  if (params.num_tokens == 0 || params.size == 0) return;
  DispatchFloat(params.dtype, [&](auto dtype) {
    using T = CpuType<dtype.value>;
    DispatchActivation(params.activation, [&](auto activation) {
      constexpr Activation kActivation = decltype(activation)::value;
      const int64_t size = params.size;
      const int64_t row_size = IsGated(kActivation) ? 2 * size : size;
      ParallelFor(pool, params.num_tokens, kFunctionCost * size,
                  [&](int64_t token) {
                    GradientRow<kActivation>(
                        static_cast<const T*>(params.grad) + token * size,
                        static_cast<const T*>(params.input) + token * row_size,
                        size, params.constants,
                        static_cast<T*>(params.dinput) + token * row_size);
                  });
    });
  });
}

}  // namespace

XLA_OPS_CPU_HANDLER(activation_backward, ActivationBackwardBinding(),
                    MakeActivationBackwardParams, ActivationBackward);

}  // namespace xla_ops
