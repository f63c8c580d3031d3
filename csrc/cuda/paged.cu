// The launchers of paged_attention, append_kv and merge_states: check arguments, allocate memory and select kernels.
#include "cuda/paged_kernels.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <tuple>

#include "cuda/attention_launch.h"
#include "cuda/paged_append_merge_kernels.cuh"

namespace refrag::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = "paged_attention";

// Checks page_table [B, max_pages], whose rows may have any stride, and returns its data.
const int32_t* check_table(const Tensor& page_table, const Tensor& like) {
  STD_TORCH_CHECK(page_table.scalar_type() == ScalarType::Int && page_table.dim() == 2 &&
                      (page_table.size(1) <= 1 || page_table.stride(1) == 1),
                  "page_table: needs int32 [B, max_pages] with a contiguous last dimension");
  STD_TORCH_CHECK(page_table.is_cuda() && page_table.get_device_index() == like.get_device_index(),
                  "page_table: needs the device of the pages");
  return static_cast<const int32_t*>(page_table.const_data_ptr());
}

template <class T, int D, int kWarps>
void launch_splits(const PagedParams& params, const PagedGrid& grid, cudaStream_t stream) {
  launch(kOp, "paged_attention_kernel", paged_attention_kernel<T, D, kWarps>, dim3(grid.x, grid.y, grid.z),
         dim3(kWarps * kWarp), PagedShared<D, kWarps>::kBytes, stream, params);
}

template <class T, int D>
void launch_paged(const PagedParams& params, const PagedGrid& grid, cudaStream_t stream) {
  if (paged_warps<D>(shared_limits(kOp)) == kPagedWarps) {
    launch_splits<T, D, kPagedWarps>(params, grid, stream);
  } else {
    launch_splits<T, D, kFewerWarps<D>>(params, grid, stream);
  }
  if (grid.z == 1) return;
  const int64_t num_states = static_cast<int64_t>(params.q_rows) * params.q_heads;
  launch(kOp, "merge_splits_kernel", merge_splits_kernel<T, D>,
         dim3(static_cast<unsigned>((num_states + kMergeWarps - 1) / kMergeWarps)), dim3(kMergeWarps * kWarp), 0,
         stream, params);
}

std::tuple<Tensor, Tensor> paged_attention(const Tensor& q, const Tensor& k_pages, const Tensor& v_pages,
                                           const Tensor& page_table, const Tensor& kv_lengths,
                                           std::optional<Tensor> q_offsets, std::optional<Tensor> visible_indptr,
                                           std::optional<Tensor> visible_ranges, double scale, double softcap,
                                           int64_t window_left, int64_t, std::optional<Tensor> sinks) {
  STD_TORCH_CHECK(q.dim() == 3 && k_pages.dim() == 4 && v_pages.dim() == 4, "q needs 3 dimensions, pages need 4");
  const int64_t rows = q.size(0), kv_heads = k_pages.size(2);
  check_queries(q, kv_heads);
  STD_TORCH_CHECK(k_pages.size(3) == q.size(2), "k_pages: needs the head_dim of q");
  for (int64_t i = 0; i < 4; ++i) {
    STD_TORCH_CHECK(v_pages.size(i) == k_pages.size(i), "v_pages: needs the shape of k_pages");
  }
  check_rows("k_pages", k_pages, q);
  check_rows("v_pages", v_pages, q);
  PagedParams params = {};
  params.page_table = check_table(page_table, q);
  params.kv_lengths = indices("kv_lengths", kv_lengths, q);
  STD_TORCH_CHECK(kv_lengths.numel() == page_table.size(0), "kv_lengths: needs one length for each row of page_table");
  if (q_offsets) {
    params.q_offsets = indices("q_offsets", *q_offsets, q);
    STD_TORCH_CHECK(q_offsets->numel() == kv_lengths.numel() + 1, "q_offsets: needs one more than kv_lengths");
  } else {
    STD_TORCH_CHECK(rows == kv_lengths.numel(), "q: needs one row for each sequence without q_offsets");
  }
  if (visible_indptr && visible_ranges) {
    params.indptr = indices("visible.indptr", *visible_indptr, q);
    params.ranges = reinterpret_cast<const int2*>(indices("visible.ranges", *visible_ranges, q));
    params.num_ranges = static_cast<int32_t>(visible_ranges->size(0));
    STD_TORCH_CHECK(visible_indptr->numel() == rows + 1, "visible.indptr: needs one more than the rows of q");
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(params.ranges) % sizeof(int2) == 0,
                    "visible.ranges: needs to start at a multiple of 8 bytes");
  }
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  auto [out, lse] = empty_results(q);
  if (q.numel() == 0) return {out, lse};
  set_queries(params, q, kv_heads, out, lse, sinks, scale, softcap);
  params.k_pages = k_pages.const_data_ptr();
  params.v_pages = v_pages.const_data_ptr();
  params.k_page = k_pages.stride(0);
  params.k_slot = k_pages.stride(1);
  params.k_head = k_pages.stride(2);
  params.v_page = v_pages.stride(0);
  params.v_slot = v_pages.stride(1);
  params.v_head = v_pages.stride(2);
  params.table_row = page_table.stride(0);
  params.num_sequences = static_cast<int32_t>(kv_lengths.numel());
  params.num_pages = static_cast<int32_t>(k_pages.size(0));
  params.page_size = static_cast<int32_t>(k_pages.size(1));
  params.max_pages = static_cast<int32_t>(page_table.size(1));
  params.window_left = window_left < 0 || window_left > INT32_MAX ? -1 : static_cast<int32_t>(window_left);
  const PagedGrid grid = divide_paged(params, static_cast<int>(kv_heads));
  std::optional<Tensor> split_out, split_lse;
  if (grid.z > 1) {
    split_out = torch::stable::new_empty(q, {grid.z, rows, q.size(1), q.size(2)}, ScalarType::Float);
    split_lse = torch::stable::new_empty(q, {grid.z, rows, q.size(1)}, ScalarType::Float);
    params.split_out = static_cast<float*>(split_out->mutable_data_ptr());
    params.split_lse = static_cast<float*>(split_lse->mutable_data_ptr());
  }
  const cudaStream_t stream = current_stream(q);
  for_queries(q, [&]<class T, int D>() { launch_paged<T, D>(params, grid, stream); });
  return {out, lse};
}

bool is_aligned(const Tensor& tensor, int64_t bytes) {
  bool aligned = reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % bytes == 0;
  for (int64_t i = 0; i + 1 < tensor.dim(); ++i) {
    aligned = aligned && tensor.stride(i) * static_cast<int64_t>(tensor.element_size()) % bytes == 0;
  }
  return aligned;
}

void append_kv(const Tensor& k, const Tensor& v, Tensor k_pages, Tensor v_pages, const Tensor& page_table,
               const Tensor& kv_lengths, const Tensor& q_offsets) {
  STD_TORCH_CHECK(k.dim() == 3 && v.dim() == 3 && k_pages.dim() == 4 && v_pages.dim() == 4,
                  "k and v need 3 dimensions, pages need 4");
  const int64_t bytes = static_cast<int64_t>(k.element_size());
  STD_TORCH_CHECK(bytes == 2 || bytes == 4, "k: needs float32, float16 or bfloat16");
  for (const Tensor* tensor : std::array<const Tensor*, 3>{&v, &k_pages, &v_pages}) {
    STD_TORCH_CHECK(tensor->scalar_type() == k.scalar_type() && tensor->get_device_index() == k.get_device_index() &&
                        tensor->size(tensor->dim() - 1) == k.size(2) && tensor->size(tensor->dim() - 2) == k.size(1),
                    "append_kv: needs the same dtype, device, number of heads and head_dim for all rows and pages");
  }
  for (const Tensor* tensor : std::array<const Tensor*, 4>{&k, &v, &k_pages, &v_pages}) {
    STD_TORCH_CHECK(tensor->size(tensor->dim() - 1) <= 1 || tensor->stride(tensor->dim() - 1) == 1,
                    "append_kv: needs a contiguous last dimension");
  }
  STD_TORCH_CHECK(v.size(0) == k.size(0) && v_pages.size(0) == k_pages.size(0) && v_pages.size(1) == k_pages.size(1),
                  "append_kv: needs as many rows and pages of values as of keys");
  STD_TORCH_CHECK(kv_lengths.numel() == page_table.size(0) && q_offsets.numel() == kv_lengths.numel() + 1,
                  "append_kv: needs tables of the same number of sequences");
  if (k.numel() == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(k.get_device_index());
  const AppendParams params = {k.const_data_ptr(),
                               v.const_data_ptr(),
                               k_pages.mutable_data_ptr(),
                               v_pages.mutable_data_ptr(),
                               check_table(page_table, k),
                               indices("kv_lengths", kv_lengths, k),
                               indices("q_offsets", q_offsets, k),
                               k.stride(0) * bytes,
                               k.stride(1) * bytes,
                               v.stride(0) * bytes,
                               v.stride(1) * bytes,
                               k_pages.stride(0) * bytes,
                               k_pages.stride(1) * bytes,
                               k_pages.stride(2) * bytes,
                               v_pages.stride(0) * bytes,
                               v_pages.stride(1) * bytes,
                               v_pages.stride(2) * bytes,
                               page_table.stride(0),
                               k.size(2) * bytes,
                               static_cast<int32_t>(k.size(0)),
                               static_cast<int32_t>(kv_lengths.numel()),
                               static_cast<int32_t>(k_pages.size(0)),
                               static_cast<int32_t>(k_pages.size(1)),
                               static_cast<int32_t>(page_table.size(1)),
                               static_cast<int32_t>(k.size(1))};
  const bool wide = params.head_bytes % kAccessBytes == 0 && is_aligned(k, kAccessBytes) &&
                    is_aligned(v, kAccessBytes) && is_aligned(k_pages, kAccessBytes) &&
                    is_aligned(v_pages, kAccessBytes);
  const auto kernel = wide         ? append_kv_kernel<Words>
                      : bytes == 4 ? append_kv_kernel<uint32_t>
                                   : append_kv_kernel<uint16_t>;
  launch("append_kv", "append_kv_kernel", kernel, dim3((params.rows + kRowWarps - 1) / kRowWarps),
         dim3(kRowWarps * kWarp), 0, current_stream(k), params);
}

template <class T>
void launch_merge(const MergeParams& params, bool wide, cudaStream_t stream) {
  constexpr int kPack = kAccessBytes / sizeof(T);
  const dim3 grid(static_cast<unsigned>((params.num_states + kRowWarps - 1) / kRowWarps)), block(kRowWarps * kWarp);
  const auto kernel = wide && params.head_dim % kPack == 0 ? merge_states_kernel<T, kPack> : merge_states_kernel<T, 1>;
  launch("merge_states", "merge_states_kernel", kernel, grid, block, 0, stream, params);
}

std::tuple<Tensor, Tensor> merge_states(const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b,
                                        const Tensor& lse_b) {
  STD_TORCH_CHECK(out_a.dim() == 3 && out_a.is_contiguous() && out_b.is_contiguous() && lse_a.is_contiguous() &&
                      lse_b.is_contiguous(),
                  "merge_states: needs contiguous tensors");
  STD_TORCH_CHECK(out_b.numel() == out_a.numel() && out_b.scalar_type() == out_a.scalar_type() &&
                      out_b.get_device_index() == out_a.get_device_index(),
                  "out_b: needs the shape, dtype and device of out_a");
  const int64_t num_states = out_a.size(0) * out_a.size(1);
  for (const Tensor* lse : std::array<const Tensor*, 2>{&lse_a, &lse_b}) {
    STD_TORCH_CHECK(lse->scalar_type() == ScalarType::Float && lse->numel() == num_states &&
                        lse->get_device_index() == out_a.get_device_index(),
                    "lse_a, lse_b: need float32 [T, H] on the device of out_a");
  }
  const torch::stable::accelerator::DeviceGuard guard(out_a.get_device_index());
  Tensor out = torch::stable::new_empty(out_a, {out_a.size(0), out_a.size(1), out_a.size(2)});
  Tensor lse = torch::stable::new_empty(lse_a, {out_a.size(0), out_a.size(1)});
  if (num_states == 0) return {out, lse};
  const MergeParams params = {out_a.const_data_ptr(),
                              static_cast<const float*>(lse_a.const_data_ptr()),
                              out_b.const_data_ptr(),
                              static_cast<const float*>(lse_b.const_data_ptr()),
                              out.mutable_data_ptr(),
                              static_cast<float*>(lse.mutable_data_ptr()),
                              num_states,
                              static_cast<int32_t>(out_a.size(2))};
  const bool wide = reinterpret_cast<uintptr_t>(params.out_a) % kAccessBytes == 0 &&
                    reinterpret_cast<uintptr_t>(params.out_b) % kAccessBytes == 0;
  const cudaStream_t stream = current_stream(out_a);
  switch (out_a.scalar_type()) {
    case ScalarType::Float: launch_merge<float>(params, wide, stream); break;
    case ScalarType::Half: launch_merge<__half>(params, wide, stream); break;
    case ScalarType::BFloat16: launch_merge<__nv_bfloat16>(params, wide, stream); break;
    default: STD_TORCH_CHECK(false, "out_a: needs float32, float16 or bfloat16");
  }
  return {out, lse};
}

}  // namespace
}  // namespace refrag::cuda

STABLE_TORCH_LIBRARY_IMPL(REFRAG_CUDA_OPS, CUDA, m) {
  m.impl("paged_attention", TORCH_BOX(&refrag::cuda::paged_attention));
  m.impl("append_kv", TORCH_BOX(&refrag::cuda::append_kv));
  m.impl("merge_states", TORCH_BOX(&refrag::cuda::merge_states));
}
