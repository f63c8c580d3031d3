// append_kv and merge_states on the device. Raw pointers and a params struct, no torch.
#pragma once

#include "cuda/device.cuh"

namespace refrag::cuda {

constexpr int kRowWarps = 4;  // warps per CTA, one row each

struct AppendParams {
  const void* k;  // [rows, kv_heads, head_dim]
  const void* v;
  void* k_pages;  // [num_pages, page_size, kv_heads, head_dim]
  void* v_pages;
  const int32_t* page_table;  // [num_sequences, max_pages]
  const int32_t* kv_lengths;  // [num_sequences]
  const int32_t* q_offsets;   // [num_sequences + 1]
  // Strides in bytes.
  int64_t k_row, k_head, v_row, v_head, k_page, k_slot, k_page_head, v_page, v_slot, v_page_head;
  int64_t table_row;   // stride in elements
  int64_t head_bytes;  // bytes of one row of one head
  int32_t rows, num_sequences, num_pages, page_size, max_pages, kv_heads;
};

// Writes each new row to its page, in pieces of type `Piece`. Skips rows without a place in the page table.
template <class Piece>
__global__ __launch_bounds__(kRowWarps * kWarp) void append_kv_kernel(const AppendParams params) {
  const int row = blockIdx.x * kRowWarps + threadIdx.x / kWarp;
  if (row >= params.rows) return;
  int low = 0, high = params.num_sequences;  // the first sequence that ends after `row`
  while (low < high) {
    const int middle = (low + high) / 2;
    if (params.q_offsets[middle + 1] <= row) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  if (low == params.num_sequences || params.q_offsets[low] > row) return;
  const int position = params.kv_lengths[low] - params.q_offsets[low + 1] + row;
  if (position < 0 || position / params.page_size >= params.max_pages) return;
  const int page = params.page_table[low * params.table_row + position / params.page_size];
  if (page < 0 || page >= params.num_pages) return;
  const int64_t slot = position % params.page_size;
  const auto* k = static_cast<const char*>(params.k) + row * params.k_row;
  const auto* v = static_cast<const char*>(params.v) + row * params.v_row;
  auto* k_to = static_cast<char*>(params.k_pages) + page * params.k_page + slot * params.k_slot;
  auto* v_to = static_cast<char*>(params.v_pages) + page * params.v_page + slot * params.v_slot;
  const int pieces = static_cast<int>(params.head_bytes / sizeof(Piece));
  for (int i = threadIdx.x % kWarp; i < params.kv_heads * pieces; i += kWarp) {
    const int head = i / pieces;
    const int64_t offset = static_cast<int64_t>(i - head * pieces) * sizeof(Piece);
    *reinterpret_cast<Piece*>(k_to + head * params.k_page_head + offset) =
        *reinterpret_cast<const Piece*>(k + head * params.k_head + offset);
    *reinterpret_cast<Piece*>(v_to + head * params.v_page_head + offset) =
        *reinterpret_cast<const Piece*>(v + head * params.v_head + offset);
  }
}

struct MergeParams {
  const void* out_a;  // [num_states, head_dim], contiguous
  const float* lse_a;
  const void* out_b;
  const float* lse_b;
  void* out;
  float* lse;
  int64_t num_states;
  int32_t head_dim;
};

// Merges pairs of attention states by their log-sum-exps. One warp per row and head, N elements per thread. The output
// of an empty state is not read, because it may be NaN.
template <class T, int N>
__global__ __launch_bounds__(kRowWarps * kWarp) void merge_states_kernel(const MergeParams params) {
  const int64_t state = static_cast<int64_t>(blockIdx.x) * kRowWarps + threadIdx.x / kWarp;
  if (state >= params.num_states) return;
  const float lse_a = params.lse_a[state], lse_b = params.lse_b[state];
  const float max_lse = fmaxf(lse_a, lse_b), base = max_lse == minus_infinity() ? 0.0f : max_lse;
  const float exp_a = expf(lse_a - base), exp_b = expf(lse_b - base), total = exp_a + exp_b;
  const float weight_a = total != 0 ? exp_a / total : 0.0f, weight_b = total != 0 ? exp_b / total : 0.0f;
  const T* a = static_cast<const T*>(params.out_a) + state * params.head_dim;
  const T* b = static_cast<const T*>(params.out_b) + state * params.head_dim;
  T* out = static_cast<T*>(params.out) + state * params.head_dim;
  for (int column = threadIdx.x % kWarp * N; column < params.head_dim; column += kWarp * N) {
    float sum[N] = {};
    if (lse_a != minus_infinity()) {
      const auto pack = *reinterpret_cast<const Pack<T, N>*>(a + column);
#pragma unroll
      for (int i = 0; i < N; ++i) sum[i] = weight_a * to_float(pack.values[i]);
    }
    if (lse_b != minus_infinity()) {
      const auto pack = *reinterpret_cast<const Pack<T, N>*>(b + column);
#pragma unroll
      for (int i = 0; i < N; ++i) sum[i] += weight_b * to_float(pack.values[i]);
    }
    Pack<T, N> result;
#pragma unroll
    for (int i = 0; i < N; ++i) result.values[i] = from_float<T>(sum[i]);
    *reinterpret_cast<Pack<T, N>*>(out + column) = result;
  }
  if (threadIdx.x % kWarp == 0) params.lse[state] = total != 0 ? base + logf(total) : minus_infinity();
}

}  // namespace refrag::cuda
