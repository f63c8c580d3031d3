// Dispatch from the runtime element type to the types that a kernel is compiled for.
#pragma once

#include "cpu/element.h"
#include "cpu/kernels/product.h"

namespace refrag::cpu::REFRAG_ISA {
namespace {

// Calls f with a value of the element type, and with the arithmetic to use for it.
template <class F>
REFRAG_INLINE void with_types(Element element, F f) {
  switch (element) {
    case Element::float32: f(float{}, Float32Math{}); break;
#if defined(__AVX512BF16__)
    case Element::bfloat16: f(BFloat16{}, Bf16PairMath{}); break;
#else
    case Element::bfloat16: f(BFloat16{}, Float32Math{}); break;
#endif
    case Element::float16: f(Half{}, Float32Math{}); break;
  }
}

template <class T>
REFRAG_INLINE int64_t offset_of(int64_t elements) {
  return elements * static_cast<int64_t>(sizeof(T));
}

}  // namespace
}  // namespace refrag::cpu::REFRAG_ISA
