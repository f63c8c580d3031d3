// The kernels behind paged_attention and merge_states. Raw pointers; strides in bytes, so that one struct serves every
// element type. Included by kernel files: no inline functions here (see isa.h).
#pragma once

#include <cstdint>

#include "cpu/element.h"
#include "cpu/isa.h"

namespace refrag::cpu {

// Keys are taken in splits, counted from the start of the sequence: a split's state (its softmax's maximum, denominator
// and weighted sum) depends on nothing but its own keys, and states are merged in ascending order. So results don't
// depend on how many threads share the splits. Splits are short where one row's keys are all there is to share (at 4,096
// keys: 16 of them), and long where there are rows enough, so that states take little memory.
inline constexpr int kPagedFewRowsSplit = 256;
inline constexpr int kPagedManyRowsSplit = 2048;

// Up to this many rows (query rows times heads of a group) keys are read row by row, beyond it they are transposed first:
// there the transposition (64 shuffles for 256 numbers) is cheaper than adding up a register's lanes for each product.
// Measured with 4,096 keys of 8 heads and D 128: 16 rows 3.5 against 4.6 ms, 32 rows 6.1 against 5.7.
inline constexpr int kPagedFewRows = 16;
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
  int page, group, dim;
  const int32_t* visible_indptr;  // null: every row sees every key
  const int32_t* visible_ranges;
  int64_t range_stride;  // in numbers
  int window_left;       // -1: no bound
  float scale, softcap;  // softcap 0: none
  const float* sinks;    // or null
  char* out;             // [T_q, H_q, D]
  float* lse;            // [T_q, H_q]
  int q_heads;
};

// Neighbouring query rows of one sequence, and neighbouring key/value heads.
struct PagedBlock {
  const int32_t* table;  // the sequence's pages
  int64_t first_row;     // in q
  int rows, position;    // of the first row in its sequence
  int first_head, heads;
};

// A state: weighted sums [heads, rows * group, dim rounded up to 16], then maxima and denominators [heads, rows * group].
REFRAG_DECLARE_KERNEL(int64_t, paged_state_floats, const PagedParams& params, const PagedBlock& block);
REFRAG_DECLARE_KERNEL(int64_t, paged_scratch_bytes, const PagedParams& params, const PagedBlock& block);

// The state of keys [begin, end), of one split.
REFRAG_DECLARE_KERNEL(void, paged_split, const PagedParams& params, const PagedBlock& block, int begin, int end,
                      float* state, char* scratch);
REFRAG_DECLARE_KERNEL(void, paged_empty, const PagedParams& params, const PagedBlock& block, float* state);
// Takes the keys of `part` into `total`.
REFRAG_DECLARE_KERNEL(void, paged_merge, const PagedParams& params, const PagedBlock& block, float* total,
                      const float* part);
// Writes out and lse.
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
  int heads, dim;
  char* out;   // [T, H, D]
  float* lse;  // [T, H]
};

struct StatesBackwardParams {
  Element element;
  const char* grad_out;   // [T, H, D]
  const float* grad_lse;  // [T, H]
  StatesRows a, b;
  int heads, dim;
  char *grad_out_a, *grad_out_b;   // [T, H, D]
  float *grad_lse_a, *grad_lse_b;  // [T, H]
};

REFRAG_DECLARE_KERNEL(void, merge_states_rows, const StatesParams& params, int64_t first_row, int64_t last_row);
REFRAG_DECLARE_KERNEL(void, merge_states_backward_rows, const StatesBackwardParams& params, int64_t first_row,
                      int64_t last_row);

}  // namespace refrag::cpu
