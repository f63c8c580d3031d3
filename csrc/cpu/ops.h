// The CPU ops that ops.cpp registers. Arguments are those of the schemas, in their order.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace refrag::cpu {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor> mixed_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                           const std::vector<Tensor>& plan, double scale, double softcap,
                                           const std::optional<Tensor>& sinks);

}  // namespace refrag::cpu
