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

Tensor pool_chunks(const Tensor& hidden, const Tensor& chunk_offsets, std::string mode);

// Copies of the weights in the form that the kernels read; empty where they read the tensors themselves.
Tensor pack_projection(const Tensor& w1, const Tensor& w2);

Tensor project_chunks(const Tensor& chunks, const Tensor& w1, const std::optional<Tensor>& b1, const Tensor& w2,
                      const std::optional<Tensor>& b2, std::string activation, const std::optional<Tensor>& packed);

Tensor embed_mixed(const Tensor& token_ids, const Tensor& token_table, const Tensor& chunks, const Tensor& slot_of_row,
                   const Tensor& w1, const std::optional<Tensor>& b1, const Tensor& w2, const std::optional<Tensor>& b2,
                   std::string activation, double token_scale, const std::optional<Tensor>& packed);

}  // namespace refrag::cpu
