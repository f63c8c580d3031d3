// The paged family on the host.
#include "entry.h"

#include "cuda/paged_append_merge_kernels.cuh"
#include "cuda/paged_kernels.cuh"

namespace {

using namespace refrag::cuda;

template <class T, int D, int kWarps>
const char* attend(PagedParams params, int kv_heads, int splits, std::vector<float>& split_out,
                   std::vector<float>& split_lse) {
  PagedGrid grid = divide_paged(params, kv_heads);
  if (splits) {
    // Force splits as for a longer sequence: the launcher does not split problems of a test's size.
    const int capacity = params.max_pages * params.page_size;
    params.split_keys = (capacity / splits + kSplitGranularity) / kSplitGranularity * kSplitGranularity;
    params.splits = grid.z = splits;
  }
  if (grid.z > 1) {
    split_out.assign(static_cast<size_t>(grid.z) * params.q_rows * params.q_heads * D, NAN);
    split_lse.assign(static_cast<size_t>(grid.z) * params.q_rows * params.q_heads, NAN);
    params.split_out = split_out.data();
    params.split_lse = split_lse.data();
  }
  const char* error = cuda_host::launch(paged_attention_kernel<T, D, kWarps>, dim3(grid.x, grid.y, grid.z),
                                        dim3(kWarps * kWarp), PagedShared<D, kWarps>::kBytes, params);
  if (error || grid.z == 1) return error;
  const int blocks = (params.q_rows * params.q_heads + kMergeWarps - 1) / kMergeWarps;
  return cuda_host::launch(merge_splits_kernel<T, D>, dim3(blocks), dim3(kMergeWarps * kWarp), 0, params);
}

const int32_t* int32s(const void* pointer) { return static_cast<const int32_t*>(pointer); }

}  // namespace

// pointers: q, k_pages, v_pages, page_table, kv_lengths, q_offsets, indptr, ranges, sinks, out, lse. strides: row and head
// of q; page, row and head of k and v; row of the table. counts: rows, query heads, sequences, pages, page size, pages per
// sequence, ranges, key/value heads. splits: 0 for the launcher's choice.
extern "C" const char* paged_attention(Element element, int width, int warps, const void* const* pointers,
                                       const int64_t* strides, const int* counts, float scale, float softcap,
                                       int window_left, int splits) {
  PagedParams params = {};
  params.q = pointers[0];
  params.k_pages = pointers[1];
  params.v_pages = pointers[2];
  params.page_table = int32s(pointers[3]);
  params.kv_lengths = int32s(pointers[4]);
  params.q_offsets = int32s(pointers[5]);
  params.indptr = int32s(pointers[6]);
  params.ranges = static_cast<const int2*>(pointers[7]);
  params.sinks = static_cast<const float*>(pointers[8]);
  params.out = const_cast<void*>(pointers[9]);
  params.lse = static_cast<float*>(const_cast<void*>(pointers[10]));
  params.q_row = strides[0];
  params.q_head = strides[1];
  params.k_page = strides[2];
  params.k_slot = strides[3];
  params.k_head = strides[4];
  params.v_page = strides[5];
  params.v_slot = strides[6];
  params.v_head = strides[7];
  params.table_row = strides[8];
  params.q_rows = counts[0];
  params.q_heads = counts[1];
  params.num_sequences = counts[2];
  params.num_pages = counts[3];
  params.page_size = counts[4];
  params.max_pages = counts[5];
  params.num_ranges = counts[6];
  params.group = counts[1] / counts[7];
  params.window_left = window_left;
  params.scale = scale;
  params.softcap = softcap;
  std::vector<float> split_out, split_lse;
  const bool half = element == Element::float16;
  const auto run = [&](auto kernel) { return kernel(params, counts[7], splits, split_out, split_lse); };
  if (width == 64 && warps == 4) return half ? run(attend<__half, 64, 4>) : run(attend<__nv_bfloat16, 64, 4>);
  if (width == 96 && warps == 4 && half) return run(attend<__half, 96, 4>);
  if (width == 96 && warps == 2 && !half) return run(attend<__nv_bfloat16, 96, 2>);
  if (width == 128 && warps == 4 && !half) return run(attend<__nv_bfloat16, 128, 4>);
  if (width == 128 && warps == 2 && half) return run(attend<__half, 128, 2>);
  return "not built";
}

// Returns the launcher's choice for a multiprocessor with that much shared memory.
extern "C" int paged_warps(int width, int multiprocessor, int reserved) {
  const SharedLimits limits = {multiprocessor, reserved};
  return width == 64 ? paged_warps<64>(limits) : width == 96 ? paged_warps<96>(limits) : paged_warps<128>(limits);
}

// pointers: k, v, k_pages, v_pages, page_table, kv_lengths, q_offsets. strides in bytes, in the order of AppendParams.
extern "C" const char* append_kv(int piece, const void* const* pointers, const int64_t* strides, const int* counts) {
  AppendParams params = {};
  params.k = pointers[0];
  params.v = pointers[1];
  params.k_pages = const_cast<void*>(pointers[2]);
  params.v_pages = const_cast<void*>(pointers[3]);
  params.page_table = int32s(pointers[4]);
  params.kv_lengths = int32s(pointers[5]);
  params.q_offsets = int32s(pointers[6]);
  std::memcpy(&params.k_row, strides, 12 * sizeof(int64_t));
  std::memcpy(&params.rows, counts, 6 * sizeof(int));
  const dim3 grid((params.rows + kRowWarps - 1) / kRowWarps), block(kRowWarps * kWarp);
  if (piece == 16) return cuda_host::launch(append_kv_kernel<Words>, grid, block, 0, params);
  return cuda_host::launch(append_kv_kernel<uint16_t>, grid, block, 0, params);
}

extern "C" const char* merge_states(Element element, const void* out_a, const float* lse_a, const void* out_b,
                                    const float* lse_b, void* out, float* lse, int64_t places, int width) {
  const MergeParams params = {out_a, lse_a, out_b, lse_b, out, lse, places, width};
  const dim3 grid(static_cast<unsigned>((places + kRowWarps - 1) / kRowWarps)), block(kRowWarps * kWarp);
  switch (element) {
    case Element::float32: return cuda_host::launch(merge_states_kernel<float, 4>, grid, block, 0, params);
    case Element::bfloat16: return cuda_host::launch(merge_states_kernel<__nv_bfloat16, 8>, grid, block, 0, params);
    case Element::float16: return cuda_host::launch(merge_states_kernel<__half, 8>, grid, block, 0, params);
  }
  return "no such element";
}
