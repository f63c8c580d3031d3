// The CPU ops that ops.cpp registers. Arguments are those of the schemas, in their order.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace refrag::cpu {

using torch::stable::Tensor;

}  // namespace refrag::cpu
