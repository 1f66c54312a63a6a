// CPU kernels and handlers of the activations, rows spread over XLA's threads.

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

template <typename T>
float Rounded(float x) {
  return ToFloat(FromFloat<T>(x));
}

// What the tanh of gelu_new and gelu_fast is taken of.
template <Activation kActivation, typename T>
float GeluInner(float x) {
  if constexpr (kActivation == Activation::kGeluNew) {
    const float cube = Rounded<T>(Rounded<T>(x * x) * x);
    return 0.79788456f * Rounded<T>(x + Rounded<T>(0.044715f * cube));
  } else {
    const float square = Rounded<T>(Rounded<T>(0.044715f * x) * x);
    return Rounded<T>(0.79788456f * x) * Rounded<T>(1.0f + square);
  }
}

// Activations without a gate; the caller rounds the result to T.
template <Activation kActivation, typename T>
float ActivateAlone(float x) {
  if constexpr (kActivation == Activation::kGeluQuick) {
    return x / (1.0f + Exp(-1.702f * x));
  } else {
    const float inner = Rounded<T>(GeluInner<kActivation, T>(x));
    const float tanh = Rounded<T>(std::tanh(inner));
    return Rounded<T>(0.5f * x) * Rounded<T>(1.0f + tanh);
  }
}

// Comparisons that NaN passes by.
float SwigluOai(float gate, float up, float alpha, float limit) {
  gate = gate > limit ? limit : gate;
  up = up > limit ? limit : up < -limit ? -limit : up;
  const float sigmoid = 1.0f / (1.0f + Exp(-gate * alpha));
  return (up + 1.0f) * (gate * sigmoid);
}

template <Activation kActivation>
float Activate(float x, const ActivationConstants& constants) {
  if constexpr (kActivation == Activation::kGeluAndMul) {
    return x * 0.5f * (1.0f + std::erf(x * 0.70710678f));
  } else if constexpr (kActivation == Activation::kGeluTanhAndMul) {
    const float inner = 0.79788456f * (x + 0.044715f * (x * x * x));
    return 0.5f * x * (1.0f + std::tanh(inner));
  } else if constexpr (kActivation == Activation::kFatreluAndMul) {
    return x > constants.threshold ? x : 0.0f;
  } else {
    return x / (1.0f + Exp(-x));
  }
}

// T(T(act(x)) * y), as a float that T can hold.
template <Activation kActivation, typename T>
float Gate(T x, T y, const ActivationConstants& constants) {
  if constexpr (kActivation == Activation::kMulAndSilu) {
    return Gate<Activation::kSiluAndMul>(y, x, constants);
  } else {
    const float activated = Activate<kActivation>(ToFloat(x), constants);
    return Rounded<T>(Rounded<T>(activated) * ToFloat(y));
  }
}

// Element i of the result, as a float; the caller rounds it to T.
template <Activation kActivation, typename T>
float Element(const T* row, int64_t size, int64_t i,
              const ActivationConstants& constants) {
  if constexpr (!IsGated(kActivation)) {
    return ActivateAlone<kActivation, T>(ToFloat(row[i]));
  } else if constexpr (kActivation == Activation::kSwigluoaiAndMul) {
    return SwigluOai(ToFloat(row[2 * i]), ToFloat(row[2 * i + 1]),
                     constants.alpha, constants.limit);
  } else {
    return Gate<kActivation>(row[i], row[size + i], constants);
  }
}

// `row`: [2 * size], or [size] without a gate; `out`: [size].
template <Activation kActivation, typename T, typename Out>
void ActivationRow(const T* row, int64_t size,
                   const ActivationConstants& constants, float inverse_scale,
                   Out* out) {
  for (int64_t i = 0; i < size; ++i) {
    const float value = Element<kActivation>(row, size, i, constants);
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
    const int64_t row_size = IsGated(kActivation) ? 2 * size : size;
    const T* input = static_cast<const T*>(params.input);
    Out* out = static_cast<Out*>(params.out);
    ParallelFor(pool, params.num_tokens, kFunctionCost * size,
                [&](int64_t token) {
                  ActivationRow<kActivation>(input + token * row_size, size,
                                             params.constants, inverse_scale,
                                             out + token * size);
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
XLA_OPS_CPU_HANDLER(fatrelu_and_mul, FatreluBinding(), MakeFatreluParams,
                    Run<Activation::kFatreluAndMul>);
XLA_OPS_CPU_HANDLER(swigluoai_and_mul, SwigluoaiBinding(), MakeSwigluoaiParams,
                    Run<Activation::kSwigluoaiAndMul>);
XLA_OPS_CPU_HANDLER(gelu_new, ActivationBinding(),
                    MakeActivationParams<Activation::kGeluNew>,
                    Run<Activation::kGeluNew>);
XLA_OPS_CPU_HANDLER(gelu_fast, ActivationBinding(),
                    MakeActivationParams<Activation::kGeluFast>,
                    Run<Activation::kGeluFast>);
XLA_OPS_CPU_HANDLER(gelu_quick, ActivationBinding(),
                    MakeActivationParams<Activation::kGeluQuick>,
                    Run<Activation::kGeluQuick>);

}  // namespace xla_ops
