// The launcher of mixed_attention: checks arguments, and selects the kernel by head_dim and device.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "cuda/attention_kernels.cuh"
#include "cuda/attention_launch.h"
#include "plan_fields.h"

namespace refrag::cuda {
namespace {

using torch::stable::Tensor;

constexpr const char* kOp = "mixed_attention";
constexpr int64_t kMaxAhead = 1 << 20;  // CTAs: many times more than a device can hold

template <class T, int D, int kTiles>
void launch_attention(const AttentionParams& params, const AttentionGrid& grid, cudaStream_t stream) {
  launch(kOp, "mixed_attention_kernel", mixed_attention_kernel<T, D, kTiles>, dim3(grid.x, grid.y), dim3(grid.threads),
         AttentionShared<D, kTiles>::kBytes, stream, params);
}

template <class T, int D>
void launch_tiles(const AttentionParams& params, const AttentionGrid& grid, cudaStream_t stream) {
  if (attention_tiles<D>(shared_limits(kOp)) == kAttentionTiles) {
    launch_attention<T, D, kAttentionTiles>(params, grid, stream);
  } else {
    launch_attention<T, D, kFewerTiles<D>>(params, grid, stream);
  }
}

std::tuple<Tensor, Tensor> mixed_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                           const std::vector<Tensor>& plan, double scale, double softcap,
                                           const std::optional<Tensor>& sinks, int64_t section_heads, int64_t ahead) {
  STD_TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && v.dim() == 3, "q, k, v: need three dimensions");
  const int64_t kv_heads = k.size(1);
  check_queries(q, kv_heads);
  STD_TORCH_CHECK(k.size(2) == q.size(2) && v.size(0) == k.size(0) && v.size(1) == kv_heads && v.size(2) == q.size(2),
                  "k, v: need the same shape, and the head_dim of q");
  check_rows("k", k, q);
  check_rows("v", v, q);
  // Tile lists follow the fields; these kernels don't use them.
  STD_TORCH_CHECK(plan.size() >= kNumPlanFields, "plan: got ", plan.size(), " tensors, needs ", int{kNumPlanFields});
  STD_TORCH_CHECK(plan[kQRowBlock].numel() == q.size(0) && plan[kKvRowBlock].numel() == k.size(0),
                  "plan: was made for other row counts");

  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  auto [out, lse] = empty_results(q);
  if (q.numel() == 0) return {out, lse};
  AttentionParams params = {};
  set_queries(params, q, kv_heads, out, lse, sinks, scale, softcap);
  params.k = k.const_data_ptr();
  params.v = v.const_data_ptr();
  params.sizes = indices("plan", plan[kSizes], q);
  params.q_blocks = reinterpret_cast<const int4*>(indices("plan", plan[kQBlocks], q));
  params.full_offsets = indices("plan", plan[kFullOffsets], q);
  params.full_ranges = reinterpret_cast<const int2*>(indices("plan", plan[kFullRanges], q));
  params.partial_offsets = indices("plan", plan[kPartialOffsets], q);
  params.partial_keys = indices("plan", plan[kPartialKeys], q);
  params.partial_bits = indices("plan", plan[kPartialBits], q);
  // AttentionPlan starts each of its tensors at a multiple of 64 bytes.
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(params.q_blocks) % 16 == 0 &&
                      reinterpret_cast<uintptr_t>(params.full_ranges) % 8 == 0 &&
                      reinterpret_cast<uintptr_t>(params.partial_bits) % 16 == 0,
                  "plan: needs tensors that start at multiples of 16 bytes");
  params.k_row = k.stride(0);
  params.k_head = k.stride(1);
  params.v_row = v.stride(0);
  params.v_head = v.stride(1);
  params.kv_rows = static_cast<int32_t>(k.size(0));
  params.num_blocks = static_cast<int32_t>(plan[kQBlocks].size(0));
  STD_TORCH_CHECK(section_heads >= 0 && section_heads <= kv_heads, "section_heads: got ", section_heads,
                  ", needs 0 to the number of key/value heads");
  STD_TORCH_CHECK(ahead >= 0 && ahead <= kMaxAhead, "ahead: got ", ahead, ", needs 0 to ", kMaxAhead);
  const AttentionGrid grid =
      divide_attention(params, static_cast<int>(kv_heads), static_cast<int>(section_heads), static_cast<int>(ahead));
  const cudaStream_t stream = current_stream(q);
  for_queries(q, [&]<class T, int D>() { launch_tiles<T, D>(params, grid, stream); });
  return {out, lse};
}

}  // namespace
}  // namespace refrag::cuda

STABLE_TORCH_LIBRARY_IMPL(REFRAG_CUDA_OPS, CUDA, m) {
  m.impl("mixed_attention", TORCH_BOX(&refrag::cuda::mixed_attention));
}
