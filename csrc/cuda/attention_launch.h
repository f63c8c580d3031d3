// Shared by the launchers of mixed_attention and paged_attention: query checks and params, outputs, and dispatch.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "cuda/attention_tile.cuh"
#include "cuda/launch.h"

namespace refrag::cuda {

// Checks that q [q_rows, q_heads, D] has a dtype, head_dim and number of heads that the kernels are compiled for.
inline void check_queries(const torch::stable::Tensor& q, int64_t kv_heads) {
  const int64_t head_dim = q.size(2);
  STD_TORCH_CHECK(head_dim == 64 || head_dim == 96 || head_dim == 128, "q: got head_dim ", head_dim,
                  ", needs 64, 96 or 128");
  STD_TORCH_CHECK(kv_heads > 0 && q.size(1) % kv_heads == 0, "q: got ", q.size(1), " heads, needs a multiple of the ",
                  kv_heads, " key/value heads");
  check_16_bit("q", q);
  check_rows("q", q, q);
}

// Returns out [q_rows, q_heads, D] and lse [q_rows, q_heads].
inline std::tuple<torch::stable::Tensor, torch::stable::Tensor> empty_results(const torch::stable::Tensor& q) {
  return {torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)}),
          torch::stable::new_empty(q, {q.size(0), q.size(1)}, torch::headeronly::ScalarType::Float)};
}

inline void set_queries(QueryParams& params, const torch::stable::Tensor& q, int64_t kv_heads,
                        torch::stable::Tensor& out, torch::stable::Tensor& lse,
                        const std::optional<torch::stable::Tensor>& sinks, double scale, double softcap) {
  params.q = q.const_data_ptr();
  params.out = out.mutable_data_ptr();
  params.lse = static_cast<float*>(lse.mutable_data_ptr());
  if (sinks) {
    STD_TORCH_CHECK(sinks->scalar_type() == torch::headeronly::ScalarType::Float && sinks->is_contiguous() &&
                        sinks->numel() == q.size(1) && sinks->get_device_index() == q.get_device_index(),
                    "sinks: needs a contiguous float32 tensor [H_q] on the device of q");
    params.sinks = static_cast<const float*>(sinks->const_data_ptr());
  }
  params.q_row = q.stride(0);
  params.q_head = q.stride(1);
  params.q_rows = static_cast<int32_t>(q.size(0));
  params.q_heads = static_cast<int32_t>(q.size(1));
  params.group = static_cast<int32_t>(q.size(1) / kv_heads);
  params.scale = static_cast<float>(scale);
  params.softcap = static_cast<float>(softcap);
}

// Calls `function` with the element type and the head_dim of q as template arguments.
template <class Function>
void for_queries(const torch::stable::Tensor& q, const Function& function) {
  const auto for_head_dim = [&]<class T>() {
    switch (q.size(2)) {
      case 64: return function.template operator()<T, 64>();
      case 96: return function.template operator()<T, 96>();
      default: return function.template operator()<T, 128>();
    }
  };
  if (q.scalar_type() == torch::headeronly::ScalarType::Half) {
    for_head_dim.template operator()<__half>();
  } else {
    for_head_dim.template operator()<__nv_bfloat16>();
  }
}

}  // namespace refrag::cuda
