// The CPU ops that ops.cpp registers. Arguments match the schemas.
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
std::tuple<Tensor, Tensor, Tensor, Tensor> mixed_attention_backward(const Tensor& grad_out, const Tensor& grad_lse,
                                                                    const Tensor& q, const Tensor& k, const Tensor& v,
                                                                    const Tensor& out, const Tensor& lse,
                                                                    const std::vector<Tensor>& plan, double scale,
                                                                    double softcap, const std::optional<Tensor>& sinks);

Tensor pool_chunks(const Tensor& hidden, const Tensor& chunk_offsets, std::string mode);

// Packs the weights into the layout that the kernels read; empty if they read the tensors themselves.
Tensor pack_projection(const Tensor& w1, const Tensor& w2);

Tensor project_chunks(const Tensor& chunks, const Tensor& w1, const std::optional<Tensor>& b1, const Tensor& w2,
                      const std::optional<Tensor>& b2, std::string activation, const std::optional<Tensor>& packed);

Tensor embed_mixed(const Tensor& token_ids, const Tensor& token_table, const Tensor& chunks, const Tensor& slot_of_row,
                   const Tensor& w1, const std::optional<Tensor>& b1, const Tensor& w2, const std::optional<Tensor>& b2,
                   std::string activation, double token_scale, const std::optional<Tensor>& packed);

std::tuple<Tensor, Tensor> paged_attention(const Tensor& q, const Tensor& k_pages, const Tensor& v_pages,
                                           const Tensor& page_table, const Tensor& kv_lengths,
                                           std::optional<Tensor> q_offsets, std::optional<Tensor> visible_indptr,
                                           std::optional<Tensor> visible_ranges, double scale, double softcap,
                                           int64_t window_left, int64_t window_right, std::optional<Tensor> sinks);
void append_kv(const Tensor& k, const Tensor& v, Tensor k_pages, Tensor v_pages, const Tensor& page_table,
               const Tensor& kv_lengths, const Tensor& q_offsets);
std::tuple<Tensor, Tensor> merge_states(const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b,
                                        const Tensor& lse_b);
std::tuple<Tensor, Tensor, Tensor, Tensor> merge_states_backward(const Tensor& grad_out, const Tensor& grad_lse,
                                                                 const Tensor& out_a, const Tensor& lse_a,
                                                                 const Tensor& out_b, const Tensor& lse_b);

}  // namespace refrag::cpu
