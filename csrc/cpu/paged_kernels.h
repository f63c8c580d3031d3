// Interface between csrc/cpu/paged.cpp and the kernels of paged_attention and merge_states. Raw pointers, and strides
// in bytes, so that one struct serves every element type. Kernel files include this header: no inline functions (see
// isa.h).
#pragma once

#include <cstdint>

#include "cpu/element.h"
#include "cpu/isa.h"

namespace refrag::cpu {

// Keys are processed in splits, counted from the start of the sequence. The state of a split (row maximum, row sum and
// unnormalized output) depends on its own keys only, and states are merged in ascending order, so results don't depend
// on the number of threads that share the splits. Splits are short for small M, where the keys of one row are all the
// available parallelism (16 splits at 4,096 keys), and long for large M, so that states take little memory.
inline constexpr int kPagedSmallMSplit = 256;
inline constexpr int kPagedLargeMSplit = 2048;

// Up to this many rows (query rows times heads of a group), keys are read row by row. Beyond it they are transposed
// first, which is then cheaper (64 shuffles per 256 elements) than a horizontal sum for each dot product. Measured with
// 4,096 keys, 8 heads and head_dim 128: 16 rows 3.5 against 4.6 ms, 32 rows 6.1 against 5.7.
inline constexpr int kPagedMaxSmallM = 16;
inline constexpr int kPagedMaxRows = 60;

struct PagedPages {
  const char* data;
  int64_t page_bytes, row_bytes, head_bytes;
};

struct PagedParams {
  Element element;
  const char* q;
  int64_t q_row_bytes, q_head_bytes;
  PagedPages k, v;
  int page_size, group, head_dim;
  const int32_t* visible_indptr;  // null: every row attends to every key
  const int32_t* visible_ranges;
  int64_t range_stride;  // in elements
  int window_left;       // -1: no bound
  float scale, softcap;  // softcap 0: none
  const float* sinks;    // or null
  char* out;             // [T_q, H_q, D]
  float* lse;            // [T_q, H_q]
  int q_heads;
};

// Consecutive query rows of one sequence, and consecutive key/value heads.
struct PagedBlock {
  const int32_t* table;  // page table of the sequence
  int64_t first_row;     // in q
  int rows, position;    // position of the first row in the sequence
  int first_head, heads;
};

// A state: unnormalized outputs [heads, rows * group, head_dim rounded up to 16], then row maxima and row sums, each
// [heads, rows * group].
REFRAG_DECLARE_KERNEL(int64_t, paged_state_floats, const PagedParams& params, const PagedBlock& block);
REFRAG_DECLARE_KERNEL(int64_t, paged_scratch_bytes, const PagedParams& params, const PagedBlock& block);

// Computes the state of one split, keys [begin, end).
REFRAG_DECLARE_KERNEL(void, paged_split, const PagedParams& params, const PagedBlock& block, int begin, int end,
                      float* state, char* scratch);
REFRAG_DECLARE_KERNEL(void, paged_empty, const PagedParams& params, const PagedBlock& block, float* state);
// Merges `partial` into `total`.
REFRAG_DECLARE_KERNEL(void, paged_merge, const PagedParams& params, const PagedBlock& block, float* total,
                      const float* partial);
// Normalizes the state and writes `out` and `lse`.
REFRAG_DECLARE_KERNEL(void, paged_finish, const PagedParams& params, const PagedBlock& block, const float* state);

struct StatesRows {
  const char* out;
  int64_t out_row_bytes, out_head_bytes;
  const char* lse;
  int64_t lse_row_bytes, lse_head_bytes;
};

struct StatesParams {
  Element element;
  StatesRows a, b;
  int heads, head_dim;
  char* out;   // [T, H, D]
  float* lse;  // [T, H]
};

struct StatesBackwardParams {
  Element element;
  const char* grad_out;   // [T, H, D]
  const float* grad_lse;  // [T, H]
  StatesRows a, b;
  int heads, head_dim;
  char *grad_out_a, *grad_out_b;   // [T, H, D]
  float *grad_lse_a, *grad_lse_b;  // [T, H]
};

REFRAG_DECLARE_KERNEL(void, merge_states_rows, const StatesParams& params, int64_t first_row, int64_t last_row);
REFRAG_DECLARE_KERNEL(void, merge_states_backward_rows, const StatesBackwardParams& params, int64_t first_row,
                      int64_t last_row);

}  // namespace refrag::cpu
