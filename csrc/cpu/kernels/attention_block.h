// Building blocks of the attention kernels: packed query rows, iteration over the keys of a block, and masking.
#pragma once

#include "cpu/attention_kernels.h"
#include "cpu/kernels/arena.h"
#include "cpu/kernels/product.h"
#include "cpu/kernels/rows.h"
#include "cpu/kernels/types.h"
#include "cpu/simd_math.h"

namespace refrag::cpu::REFRAG_ISA {
namespace {

inline constexpr float kInfinity = __builtin_inff();

// The packed rows (row of the block, head of the group) of one pass: `count` rows in `row_tiles` tiles of 16.
struct PackedRows {
  int32_t first_row, rows;  // of the block, in q
  int32_t first_packed, count, row_tiles;
  int32_t head;  // first head of the group

  int32_t padded_count() const { return row_tiles * kLanes; }

  // Calls visit(packed_row, row of q, head) for every packed row, in order.
  template <class Visit>
  REFRAG_INLINE void for_each(Visit visit) const {
    int32_t row = first_packed % rows, q_head = head + first_packed / rows;
    for (int32_t packed_row = 0; packed_row < count; ++packed_row) {
      visit(packed_row, int64_t{first_row} + row, q_head);
      if (++row == rows) {
        row = 0;
        ++q_head;
      }
    }
  }
};

inline PackedRows packed_rows_of(const AttentionParams& p, int32_t block, int32_t kv_head, int32_t row_tile_group) {
  const int32_t* q_block = p.plan.q_blocks + 4 * int64_t{block};
  PackedRows packed{q_block[0], q_block[1], 0, 0, 0, kv_head * p.group()};
  const int32_t total = packed.rows * p.group(), total_tiles = (total + kLanes - 1) / kLanes;
  const int32_t groups = (total_tiles + kMaxRowTiles - 1) / kMaxRowTiles;
  if (row_tile_group >= groups) return packed;
  const int32_t first = total_tiles * row_tile_group / groups, last = total_tiles * (row_tile_group + 1) / groups;
  packed.row_tiles = last - first;
  packed.first_packed = first * kLanes;
  packed.count = (total < last * kLanes ? total : last * kLanes) - packed.first_packed;
  return packed;
}

// Copies the packed rows of a tensor [T, H, D], as words for Math, to rows [padded_count, stride words], with zeros in
// the padding; and their transpose to columns [words, padded_count].
template <class T, class Math>
void gather(const HeadRows& tensor, int head_dim, const PackedRows& packed, char* rows, char* columns) {
  const int words = words_of<Math>(head_dim), stride = (words + 15) / 16 * 16;
  packed.for_each([&](int32_t packed_row, int64_t row, int32_t head) {
    char* copy = rows + int64_t{4} * packed_row * stride;
    const char* source = tensor.data + row * tensor.row_bytes + head * tensor.head_bytes;
    if constexpr (Math::kPairs) {
      int word = 0;
      for (; word + 16 <= words; word += 16) store_int(copy + 4 * word, load_int(source + 4 * word));
      if (word < words) std::memcpy(copy + 4 * word, source + 4 * word, 4 * (words - word));
    } else {
      copy_row<T>(source, head_dim, reinterpret_cast<float*>(copy));
    }
  });
  std::memset(rows + int64_t{4} * packed.count * stride, 0, 4 * (packed.padded_count() - packed.count) * stride);
  for (int row_tile = 0; row_tile < packed.row_tiles; ++row_tile) {
    for (int word = 0; word < words; word += 16) {
      transpose_words(rows + int64_t{64} * row_tile * stride + 4 * word, stride,
                      columns + int64_t{4} * word * packed.padded_count() + 64 * row_tile, packed.padded_count());
    }
  }
}

// Consecutive keys that a block attends to, either all of them or as given by `bits`.
struct Segment {
  const char* operand[2];
  const uint32_t* bits;  // null: every row attends to every key
  int32_t first_key, count;
};

// Iterates over the keys of a block, full ranges first, in steps of at most `kKeys` keys.
template <int kKeys>
class SegmentIterator {
 public:
  static constexpr int kMaxSegments = kKeys / kTile;

  SegmentIterator(const PlanView& plan, int32_t block) : plan_(plan) {
    const int32_t* q_block = plan.q_blocks + 4 * int64_t{block};
    last_key_ = q_block[2] + q_block[3];
    range_ = plan.full_offsets[block];
    last_range_ = plan.full_offsets[block + 1];
    partial_ = plan.partial_offsets[block];
    last_partial_ = plan.partial_offsets[block + 1];
    if (range_ < last_range_) key_ = plan.full_ranges[2 * int64_t{range_}];
  }

  // Fills `segments` for the next step and returns their number; 0 at the end.
  int next() {
    int num_segments = 0, keys = 0;
    while (range_ < last_range_ && keys < kKeys) {
      const int32_t end = plan_.full_ranges[2 * int64_t{range_} + 1];
      const int32_t count = end - key_ < kKeys - keys ? end - key_ : kKeys - keys;
      segments[num_segments++] = {{nullptr, nullptr}, nullptr, key_, count};
      keys += count;
      key_ += count;
      if (key_ >= end && ++range_ < last_range_) key_ = plan_.full_ranges[2 * int64_t{range_}];
    }
    // The last tile of a sequence may hold fewer than 16 keys, but the score buffer reserves 16.
    for (; partial_ < last_partial_ && keys + kTile <= kKeys; keys += kTile) {
      const int32_t first = plan_.partial_keys[partial_];
      const int32_t count = last_key_ - first < kTile ? last_key_ - first : kTile;
      segments[num_segments++] = {{nullptr, nullptr}, plan_.partial_bits + 8 * int64_t{partial_}, first, count};
      ++partial_;
    }
    return num_segments;
  }

  Segment segments[kMaxSegments];

 private:
  const PlanView& plan_;
  int32_t range_, last_range_, partial_, last_partial_, key_ = 0, last_key_;
};

// Returns a segment's rows of an operand, packing them into `local` unless a copy was made beforehand.
template <class T, Layout kLayout>
REFRAG_INLINE const char* operand_rows(const Operand& operand, const HeadRows& tensor, const PlanView& plan,
                                       const Segment& segment, int head_dim, int32_t kv_head, char*& local) {
  if (operand.data) {
    const int64_t row =
        operand.tiled ? int64_t{kTile} * plan.kv_row_block[segment.first_key] : int64_t{segment.first_key};
    return operand.data + row * operand.row_bytes + kv_head * operand.head_bytes;
  }
  const char* source = tensor.data + segment.first_key * tensor.row_bytes + kv_head * tensor.head_bytes;
  char* copy = local;
  const int64_t padded_dim = (head_dim + 15) / 16 * 16;
  if constexpr (kLayout == Layout::bf16_pairs) {
    pack_pairs(source, tensor.row_bytes, segment.count, head_dim, copy);
    local += (segment.count + 1) / 2 * padded_dim * 4;
  } else {
    pack_rows<T>(source, tensor.row_bytes, segment.count, head_dim, copy);
    local += segment.count * padded_dim * 4;
  }
  return copy;
}

// The mask of a partial tile for each packed row: bit c is set where the row attends to key c.
REFRAG_INLINE void row_masks(const uint32_t* bits, const PackedRows& packed, VecI* masks) {
  if (packed.rows == kTile) {
    // Two rows share a word, the first one in the low half: sixteen 16-bit values.
    uint16_t rows[kTile];
    for (int r = 0; r < kTile; ++r) rows[r] = static_cast<uint16_t>(bits[r / 2] >> (16 * (r % 2)));
    const VecI mask = load_u16(rows);
    for (int row_tile = 0; row_tile < packed.row_tiles; ++row_tile) masks[row_tile] = mask;
    return;
  }
  uint16_t words[kMaxRowTiles * kLanes] = {};
  packed.for_each([&](int32_t packed_row, int64_t q_row, int32_t) {
    const int row = static_cast<int>(q_row - packed.first_row);
    words[packed_row] = static_cast<uint16_t>(bits[row / 2] >> (16 * (row % 2)));
  });
  for (int row_tile = 0; row_tile < packed.row_tiles; ++row_tile) masks[row_tile] = load_u16(words + kLanes * row_tile);
}

// Sets scores [count, padded_count] of masked keys to -inf.
inline void apply_mask(const uint32_t* bits, const PackedRows& packed, int count, float* scores) {
  VecI masks[kMaxRowTiles];
  row_masks(bits, packed, masks);
  for (int key = 0; key < count; ++key) {
    const VecI bit = broadcast_int(1 << key);
    for (int row_tile = 0; row_tile < packed.row_tiles; ++row_tile) {
      float* score = scores + key * packed.padded_count() + kLanes * row_tile;
      store(score, select(any_bit(masks[row_tile], bit), load(score), broadcast(-kInfinity)));
    }
  }
}

// A masked key has probability 0, but 0 times NaN or inf is NaN: a matrix product over a partial tile is correct only
// if all of its elements are finite. The functions below handle the other tiles, one unmasked (row, key) pair at a
// time.

inline bool all_finite(const float* elements, int64_t count) {
  Vec sum = zero_vec();
  for (int64_t i = 0; i < count; i += kLanes) sum = sum + (load(elements + i) - load(elements + i));
  return reduce_add(sum) == 0;
}

template <class T>
bool rows_finite(const HeadRows& tensor, int32_t first, int32_t count, int32_t head, int head_dim) {
  Vec sum = zero_vec();
  for (int32_t i = first; i < first + count; ++i) {
    const T* row = reinterpret_cast<const T*>(tensor.data + i * tensor.row_bytes + head * tensor.head_bytes);
    for (int d = 0; d < head_dim; d += kLanes) {
      const Vec elements = d + kLanes <= head_dim ? load(row + d) : load_partial(row + d, head_dim - d);
      sum = sum + (elements - elements);
    }
  }
  return reduce_add(sum) == 0;
}

// acc += scale * row.
template <class T>
void add_row(const HeadRows& tensor, int64_t row, int32_t head, int head_dim, float scale, float* acc) {
  const T* elements = reinterpret_cast<const T*>(tensor.data + row * tensor.row_bytes + head * tensor.head_bytes);
  for (int d = 0; d < head_dim; d += kLanes) {
    const Vec part = d + kLanes <= head_dim ? load(elements + d) : load_partial(elements + d, head_dim - d);
    store(acc + d, fma(broadcast(scale), part, load(acc + d)));
  }
}

// Calls visit(key of the segment, packed_row, row of q, head) for every (row, key) pair that the mask allows.
template <class Visit>
void for_each_visible(const Segment& segment, const PackedRows& packed, Visit visit) {
  packed.for_each([&](int32_t packed_row, int64_t row, int32_t head) {
    const int in_block = static_cast<int>(row - packed.first_row);
    const uint32_t visible = segment.bits[in_block / 2] >> (16 * (in_block % 2));
    for (int key = 0; key < segment.count; ++key) {
      if (visible >> key & 1) visit(key, packed_row, row, head);
    }
  });
}

// Whether scale and softcap are applied before the softmax. Otherwise the softmax applies the scale, which is positive
// and so keeps the order of the scores.
inline bool scales_before_softmax(const AttentionParams& p) { return p.softcap > 0 || !(p.scale > 0); }
inline float softmax_scale(const AttentionParams& p) { return scales_before_softmax(p) ? 1.0f : p.scale; }

// scores = softcap * tanh(scale * scores / softcap), or scale * scores.
inline void scale_scores(float* scores, int64_t count, float scale, float softcap) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vec score = load(scores + i) * broadcast(scale);
    store(scores + i, softcap > 0 ? broadcast(softcap) * tanh(score / broadcast(softcap)) : score);
  }
}

}  // namespace
}  // namespace refrag::cpu::REFRAG_ISA
