// Activation functions on vectors.
#pragma once

#include "cpu/projection_kernels.h"
#include "cpu/simd_math.h"

namespace refrag::cpu::REFRAG_ISA {
namespace {

// Accurate to about 3e-7: x P(x^2) / Q(x^2), fitted for the least relative error on [0, 3.93]; beyond, erf is 1 in
// float32.
REFRAG_INLINE Vec erf(const Vec x) {
  const VecI sign = as_int(x) & broadcast_int(static_cast<int32_t>(0x80000000));
  const Vec magnitude = as_float(as_int(x) ^ sign);
  const Vec u = x * x;
  Vec p = broadcast(2.041968024e-06f);
  p = fma(p, u, broadcast(2.848052063e-04f));
  p = fma(p, u, broadcast(3.779518200e-03f));
  p = fma(p, u, broadcast(5.278999961e-02f));
  p = fma(p, u, broadcast(1.907819042e-01f));
  p = fma(p, u, broadcast(1.128379145e+00f));
  Vec q = broadcast(3.800386824e-05f);
  q = fma(q, u, broadcast(1.165188136e-03f));
  q = fma(q, u, broadcast(1.499725574e-02f));
  q = fma(q, u, broadcast(1.142566975e-01f));
  q = fma(q, u, broadcast(5.024087804e-01f));
  q = fma(q, u, broadcast(1.0f));
  return select(less(broadcast(3.93f), magnitude), as_float(as_int(broadcast(1.0f)) | sign), x * p / q);
}

template <Activation kActivation>
REFRAG_INLINE Vec activate(const Vec x) {
  const Vec half = broadcast(0.5f), one = broadcast(1.0f);
  switch (kActivation) {
    case Activation::gelu: {
      const Vec halved = x * half;
      return fma(halved, erf(x * broadcast(0.70710678f)), halved);
    }
    case Activation::gelu_tanh: {
      const Vec halved = x * half;
      const Vec inner = x * broadcast(0.79788456f) * fma(x * x, broadcast(0.044715f), one);
      return fma(halved, tanh(inner), halved);
    }
    case Activation::silu: return x / (one + exp(zero_vec() - x));
    case Activation::relu: return select(less(x, zero_vec()), zero_vec(), x);
    case Activation::tanh: return tanh(x);
    case Activation::none: return x;
  }
}

// The activation as a compile-time constant.
template <Activation kActivation>
struct ActivationConstant {
  static constexpr Activation value = kActivation;
};

template <class F>
REFRAG_INLINE void with_activation(Activation activation, F f) {
  switch (activation) {
    case Activation::gelu: return f(ActivationConstant<Activation::gelu>{});
    case Activation::gelu_tanh: return f(ActivationConstant<Activation::gelu_tanh>{});
    case Activation::silu: return f(ActivationConstant<Activation::silu>{});
    case Activation::relu: return f(ActivationConstant<Activation::relu>{});
    case Activation::tanh: return f(ActivationConstant<Activation::tanh>{});
    case Activation::none: return f(ActivationConstant<Activation::none>{});
  }
}

}  // namespace
}  // namespace refrag::cpu::REFRAG_ISA
