// The element types of the CPU ops' tensors.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "cpu/element.h"

namespace refrag::cpu {

inline int64_t bytes_of(Element element) { return element == Element::float32 ? 4 : 2; }

inline Element element_of(const torch::stable::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case torch::headeronly::ScalarType::Float: return Element::float32;
    case torch::headeronly::ScalarType::BFloat16: return Element::bfloat16;
    case torch::headeronly::ScalarType::Half: return Element::float16;
    default: STD_TORCH_CHECK(false, "needs float32, bfloat16 or float16");
  }
}

}  // namespace refrag::cpu
