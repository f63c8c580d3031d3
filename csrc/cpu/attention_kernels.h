// What csrc/cpu/attention.cpp asks of the attention kernels, which are compiled once per instruction set.
//
// A kernel works on one query block and one key/value head. The rows of the heads that share the key/value head are
// packed into lanes: pair x = g * rows + r is row r of the block in the group's head g, and a panel is 16 of them.
// Scores are kept transposed, [key][pair], so that
// - the keys and values are read as they lie in memory (their numbers are broadcast, or loaded along D),
// - maximum and sum over the keys need no horizontal step.
#pragma once

#include <cstdint>

#include "cpu/element.h"
#include "cpu/isa.h"

namespace refrag::cpu {

inline constexpr int kTile = 16;  // query rows of a block, keys of a tile; the planner's
// Panels that one pass over the keys serves: their rows, scores and sums fit in the first-level cache together.
inline constexpr int kMaxPanels = 4;

struct HeadRows {
  const char* data;
  int64_t row_bytes, head_bytes;

  // Views of one storage may begin at the same address and still hold other rows.
  bool operator==(const HeadRows&) const = default;
};

// Keys or values in the form in which a kernel reads them: the tensor itself, or a copy made by attention_pack.
struct Operand {
  const char* data;  // null: each visit of a tile packs it anew
  int64_t row_bytes, head_bytes;
  bool tiled;  // rows are counted in whole tiles, so that every tile starts at a multiple of 16 rows
};

// What an operand's copy holds.
enum class Form : int32_t {
  tensor,  // no copy: the tensor will do
  rows,    // float32 rows, padded with zeros to a multiple of 16
  pairs,   // bfloat16, keys 2i and 2i+1 interleaved: what vdpbf16ps takes as its second factor
};

struct PlanView {
  int32_t num_blocks, num_tiles;
  const int32_t *q_blocks, *full_offsets, *full_ranges, *partial_offsets, *partial_keys;
  const uint32_t* partial_bits;
  const int32_t *kv_blocks, *kv_row_block;
};

struct AttentionParams {
  Element element;
  int32_t heads, kv_heads, width;
  float scale, softcap;
  const float* sinks;  // null: none
  HeadRows q, k, v;
  PlanView plan;
  Operand k_rows, v_rows;  // each number broadcast: first factor of the products over D
  Operand k_cols, v_cols;  // loaded along D: second factor of the products over the keys
  char* out;               // [T_q, H_q, D]
  float* lse;              // [T_q, H_q]

  int32_t group() const { return heads / kv_heads; }
  int32_t padded_width() const { return (width + 15) / 16 * 16; }
  // Passes over the keys that a whole block needs.
  int32_t panel_groups() const { return (group() + kMaxPanels - 1) / kMaxPanels; }
};

struct Forms {
  Form rows, cols;
};

struct PackTask {
  HeadRows source;
  Form form;
  char* copy;  // [kv_heads][tile]
  int64_t tile_bytes;
};

// The forms that this instruction set needs for `element` and `width`.
REFRAG_DECLARE_KERNEL(Forms, attention_forms, Element element, int32_t width);

// Copies tiles [begin, end) of all heads.
REFRAG_DECLARE_KERNEL(void, attention_pack, const AttentionParams& params, const PackTask& task, int32_t begin,
                      int32_t end);

REFRAG_DECLARE_KERNEL(int64_t, attention_forward_scratch, const AttentionParams& params);

struct AttentionTask {
  int32_t block, kv_head, panel_group;
};

REFRAG_DECLARE_KERNEL(void, attention_forward, const AttentionParams& params, const AttentionTask& task, char* scratch);

// The backward pass walks the plan once, strip by strip: consecutive query blocks of one sequence, chosen by the plan
// alone. A strip sums the gradients of the keys and values that it sees in slots of its own, one a tile; a tile's slots
// are then added in the order of the strips.
struct Strip {
  int32_t first_block, last_block;
  int32_t first_tile;    // of its sequence
  const int32_t* slots;  // of each tile of its sequence, from the strip's first slot on; -1: no block sees the tile
  int32_t first_slot, num_slots;
};

struct AttentionBackwardParams {
  AttentionParams forward;  // its out and lse are not used
  HeadRows grad_out, out;
  const float *lse, *grad_lse;  // [T_q, H_q]
  char *dq, *dk, *dv;
  float* dsinks;             // [query blocks, H_q], to be added; null without sinks
  float *dk_sums, *dv_sums;  // [kv_heads, slots, 16, padded width]
  int64_t num_slots;
  const int32_t *slot_offsets, *slot_lists;  // [tiles + 1] and the slots of each tile
};

REFRAG_DECLARE_KERNEL(int64_t, attention_backward_scratch, const AttentionBackwardParams& params);

// dq of the strip's rows, and its share of dk and dv.
REFRAG_DECLARE_KERNEL(void, attention_backward, const AttentionBackwardParams& params, const Strip& strip,
                      int32_t kv_head, char* scratch);

// dk and dv of tiles [begin, end) of all heads.
REFRAG_DECLARE_KERNEL(void, attention_backward_sum, const AttentionBackwardParams& params, int32_t begin, int32_t end);

}  // namespace refrag::cpu
