// The activations of the feed-forward network and their derivatives.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <type_traits>

#include "ops/ffn.h"

namespace gpt_ext::cuda {

// tanh(u) of gelu_tanh, u = sqrt(2/pi) (z + 0.044715 z^3)
template <class Acc>
__device__ Acc gelu_tanh_inner(Acc z) {
  constexpr Acc kSqrt2OverPi = 0.79788456080286535588, kCubic = 0.044715;
  return tanh(kSqrt2OverPi * (z + kCubic * z * z * z));
}

// Phi(z), the normal distribution's cumulative function
template <class Acc>
__device__ Acc normal_cdf(Acc z) {
  constexpr Acc kSqrtHalf = 0.70710678118654752440;
  return Acc(0.5) * (1 + erf(z * kSqrtHalf));
}

// f(std::integral_constant of it), in a kernel that serves all of them: a branch for several
// elements, where a kernel for each would be three times as many to compile.
template <class F>
__device__ void dispatch(Activation activation, F&& f) {
  switch (activation) {
    case Activation::kRelu:
      return f(std::integral_constant<Activation, Activation::kRelu>{});
    case Activation::kGelu:
      return f(std::integral_constant<Activation, Activation::kGelu>{});
    default:
      return f(std::integral_constant<Activation, Activation::kGeluTanh>{});
  }
}

template <Activation kActivation, class Acc>
__device__ Acc activate(Acc z) {
  if constexpr (kActivation == Activation::kRelu) {
    return z > 0 || z != z ? z : Acc{0};  // NaN stays NaN
  } else if constexpr (kActivation == Activation::kGelu) {
    return z * normal_cdf(z);
  } else {
    return Acc(0.5) * z * (1 + gelu_tanh_inner(z));
  }
}

// act'(z), from z for the GELUs, from act(z) for kRelu.
template <Activation kActivation, class Acc>
__device__ Acc activation_derivative(Acc saved) {
  if constexpr (kActivation == Activation::kRelu) {
    return saved <= 0 ? 0 : 1;  // NaN lets the gradient through, as in torch
  } else if constexpr (kActivation == Activation::kGelu) {
    constexpr Acc kInvSqrt2Pi = 0.39894228040143267794;
    return normal_cdf(saved) + saved * kInvSqrt2Pi * exp(Acc(-0.5) * saved * saved);
  } else {  // (1 + t)/2 + z/2 (1 - t^2) u'
    constexpr Acc kSqrt2OverPi = 0.79788456080286535588, kCubic = 0.044715;
    const Acc t = gelu_tanh_inner(saved);
    const Acc du = kSqrt2OverPi * (1 + 3 * kCubic * saved * saved);
    return Acc(0.5) * (1 + t) + Acc(0.5) * saved * (1 - t * t) * du;
  }
}

}  // namespace gpt_ext::cuda
