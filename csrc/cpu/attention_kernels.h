// Interface between csrc/cpu/attention.cpp and the attention kernels, which are compiled once per instruction set.
//
// A kernel works on one query block and one key/value head. The query heads that share the key/value head are packed
// into rows: packed row g * rows + r is row r of the block in head g of the group. A row tile is 16 packed rows, one
// vector of simd.h. Scores are stored transposed, as [key][packed row], so that
// - keys and values are read in their memory order (elements are broadcast, or loaded along D), and
// - the maximum and the sum over keys need no horizontal reduction.
#pragma once

#include <cstdint>

#include "cpu/element.h"
#include "cpu/isa.h"

namespace refrag::cpu {

inline constexpr int kTile = 16;  // query rows per block and keys per tile, as in the planner
// Row tiles per pass over the keys: their queries, scores and outputs fit in the L1 cache together.
inline constexpr int kMaxRowTiles = 4;

struct HeadRows {
  const char* data;
  int64_t row_bytes, head_bytes;

  // Two views of one storage may start at the same address and still differ in their strides.
  bool operator==(const HeadRows&) const = default;
};

// Keys or values as a kernel reads them: the tensor itself, or a copy made by attention_pack.
struct Operand {
  const char* data;  // null: a tile is packed again each time it is visited
  int64_t row_bytes, head_bytes;
  bool tiled;  // rows are indexed by whole tiles, so that every tile starts at a multiple of 16 rows
};

// Memory layout of an operand.
enum class Layout : int32_t {
  in_place,     // no copy: the tensor itself
  padded_rows,  // float32 rows, zero-padded to a multiple of 16 elements
  bf16_pairs,   // bfloat16, keys 2i and 2i + 1 interleaved (VNNI), as the second operand of vdpbf16ps
};

struct PlanView {
  int32_t num_blocks, num_tiles;
  const int32_t *q_blocks, *full_offsets, *full_ranges, *partial_offsets, *partial_keys;
  const uint32_t* partial_bits;
  const int32_t *kv_blocks, *kv_row_block;
};

struct AttentionParams {
  Element element;
  int32_t heads, kv_heads, head_dim;
  float scale, softcap;
  const float* sinks;  // null: none
  HeadRows q, k, v;
  PlanView plan;
  Operand k_rows, v_rows;  // elements are broadcast: first operand of the products over D
  Operand k_cols, v_cols;  // loaded along D: second operand of the products over keys
  char* out;               // [T_q, H_q, D]
  float* lse;              // [T_q, H_q]

  int32_t group() const { return heads / kv_heads; }
  int32_t padded_head_dim() const { return (head_dim + 15) / 16 * 16; }
  // Passes over the keys for a block of kTile rows.
  int32_t row_tile_groups() const { return (group() + kMaxRowTiles - 1) / kMaxRowTiles; }
};

struct Layouts {
  Layout rows, cols;
};

struct PackTask {
  HeadRows source;
  Layout layout;
  char* copy;  // [kv_heads][tile]
  int64_t tile_bytes;
};

// Layouts that this instruction set uses for `element` and `head_dim`.
REFRAG_DECLARE_KERNEL(Layouts, attention_layouts, Element element, int32_t head_dim);

// Packs tiles [begin, end) of all heads.
REFRAG_DECLARE_KERNEL(void, attention_pack, const AttentionParams& params, const PackTask& task, int32_t begin,
                      int32_t end);

REFRAG_DECLARE_KERNEL(int64_t, attention_forward_scratch, const AttentionParams& params);

struct AttentionTask {
  int32_t block, kv_head, row_tile_group;
};

REFRAG_DECLARE_KERNEL(void, attention_forward, const AttentionParams& params, const AttentionTask& task, char* scratch);

// The backward pass walks the plan once, in ranges of consecutive query blocks of one sequence, which depend on the
// plan only. Each range accumulates dk and dv in accumulator tiles of its own, one for each key tile that it attends
// to; the accumulator tiles of a key tile are then reduced in the order of the ranges, so the result is deterministic.
struct BlockRange {
  int32_t first_block, last_block;
  int32_t first_tile;          // of the sequence
  const int32_t* accum_tiles;  // [tiles of the sequence], relative to first_accum_tile; -1: no block attends to it
  int32_t first_accum_tile, num_accum_tiles;
};

struct AttentionBackwardParams {
  AttentionParams forward;  // `out` and `lse` are unused
  HeadRows grad_out, out;
  const float *lse, *grad_lse;  // [T_q, H_q]
  char *dq, *dk, *dv;
  float* dsinks;               // [query blocks, H_q], to be summed over the blocks; null: no sinks
  float *dk_accum, *dv_accum;  // [kv_heads, num_accum_tiles, 16, padded_head_dim]
  int64_t num_accum_tiles;
  const int32_t *accum_offsets, *accum_lists;  // CSR: the accumulator tiles of each key tile
};

REFRAG_DECLARE_KERNEL(int64_t, attention_backward_scratch, const AttentionBackwardParams& params);

// Computes dq of the range's rows, and accumulates the range's part of dk and dv.
REFRAG_DECLARE_KERNEL(void, attention_backward, const AttentionBackwardParams& params, const BlockRange& range,
                      int32_t kv_head, char* scratch);

// Reduces dk and dv of tiles [begin, end) of all heads.
REFRAG_DECLARE_KERNEL(void, attention_backward_reduce, const AttentionBackwardParams& params, int32_t begin,
                      int32_t end);

// attention_received walks the plan as the backward pass does.
struct AttentionReceivedParams {
  AttentionParams forward;  // v, sinks, `out` and `lse` are unused
  const float* lse;         // [T_q, H_q]
  float* received;          // [T_kv, H_kv]
  float* accum;             // [kv_heads, num_accum_tiles, 16 keys, 16 packed rows of a row tile]
  int64_t num_accum_tiles;
  const int32_t *accum_offsets, *accum_lists;  // CSR: the accumulator tiles of each key tile
};

REFRAG_DECLARE_KERNEL(int64_t, attention_received_scratch, const AttentionReceivedParams& params);

// Accumulates the probabilities of the range's rows.
REFRAG_DECLARE_KERNEL(void, attention_received, const AttentionReceivedParams& params, const BlockRange& range,
                      int32_t kv_head, char* scratch);

// Sums the accumulators of a tile's keys, for all heads.
REFRAG_DECLARE_KERNEL(void, attention_received_reduce, const AttentionReceivedParams& params, int32_t tile);

}  // namespace refrag::cpu
