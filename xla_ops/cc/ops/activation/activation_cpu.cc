// CPU kernels and handlers of the gated activations, rows spread over XLA's
// threads.

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/core/dispatch.h"
#include "xla_ops/cc/core/exp.h"
#include "xla_ops/cc/core/float.h"
#include "xla_ops/cc/core/handler.h"
#include "xla_ops/cc/core/parallel.h"
#include "xla_ops/cc/core/quant.h"
#include "xla_ops/cc/ops/activation/activation.h"
#include "xla_ops/cc/ops/activation/activation_checks.h"

namespace xla_ops {
namespace {

// Inner-loop steps of ParallelFor's cost model that one exp, erf or tanh is.
constexpr int64_t kFunctionCost = 16;

template <Activation kActivation>
float Activate(float x) {
  if constexpr (kActivation == Activation::kGeluAndMul) {
    return x * 0.5f * (1.0f + std::erf(x * 0.70710678f));
  } else if constexpr (kActivation == Activation::kGeluTanhAndMul) {
    const float inner = 0.79788456f * (x + 0.044715f * (x * x * x));
    return 0.5f * x * (1.0f + std::tanh(inner));
  } else {
    return x / (1.0f + Exp(-x));
  }
}

// T(T(act(x)) * y), as a float that T can hold.
template <Activation kActivation, typename T>
float Gate(T x, T y) {
  if constexpr (kActivation == Activation::kMulAndSilu) {
    return Gate<Activation::kSiluAndMul>(y, x);
  } else {
    const T activated = FromFloat<T>(Activate<kActivation>(ToFloat(x)));
    return ToFloat(FromFloat<T>(ToFloat(activated) * ToFloat(y)));
  }
}

// `row`: [2 * size]; `out`: [size].
template <Activation kActivation, typename T, typename Out>
void ActivationRow(const T* row, int64_t size, float inverse_scale, Out* out) {
  for (int64_t i = 0; i < size; ++i) {
    const float value = Gate<kActivation>(row[i], row[size + i]);
    if constexpr (kActivation == Activation::kSiluAndMulQuant) {
      out[i] = ToFp8(value * inverse_scale);
    } else {
      out[i] = FromFloat<Out>(value);
    }
  }
}

template <Activation kActivation>
void Run(const ActivationParams& params, ffi::ThreadPool& pool) {
  constexpr bool kQuant = kActivation == Activation::kSiluAndMulQuant;
  if (params.num_tokens == 0 || params.size == 0) return;
  const float inverse_scale = kQuant ? 1.0f / *params.scale : 1.0f;
  DispatchFloat(params.dtype, [&](auto dtype) {
    using T = CpuType<dtype.value>;
    using Out = std::conditional_t<kQuant, Float8E4M3FN, T>;
    const int64_t size = params.size;
    const T* input = static_cast<const T*>(params.input);
    Out* out = static_cast<Out*>(params.out);
    ParallelFor(pool, params.num_tokens, kFunctionCost * size,
                [&](int64_t token) {
                  ActivationRow<kActivation>(input + token * 2 * size, size,
                                             inverse_scale, out + token * size);
                });
  });
}

}  // namespace

XLA_OPS_CPU_HANDLER(silu_and_mul, ActivationBinding(),
                    MakeActivationParams<Activation::kSiluAndMul>,
                    Run<Activation::kSiluAndMul>);
XLA_OPS_CPU_HANDLER(mul_and_silu, ActivationBinding(),
                    MakeActivationParams<Activation::kMulAndSilu>,
                    Run<Activation::kMulAndSilu>);
XLA_OPS_CPU_HANDLER(gelu_and_mul, ActivationBinding(),
                    MakeActivationParams<Activation::kGeluAndMul>,
                    Run<Activation::kGeluAndMul>);
XLA_OPS_CPU_HANDLER(gelu_tanh_and_mul, ActivationBinding(),
                    MakeActivationParams<Activation::kGeluTanhAndMul>,
                    Run<Activation::kGeluTanhAndMul>);
XLA_OPS_CPU_HANDLER(silu_and_mul_quant, ActivationQuantBinding(),
                    MakeActivationQuantParams,
                    Run<Activation::kSiluAndMulQuant>);

}  // namespace xla_ops
