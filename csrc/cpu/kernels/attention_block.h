// A query block as the attention kernels see it: its rows gathered into panels, its keys in steps of a few tiles.
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

// The pairs (row of the block, head of the group) that one pass serves: lanes [0, pairs) of `panels` panels.
struct Pack {
  int32_t first_row, rows;  // of the block, among the packed query rows
  int32_t first_pair, pairs, panels;
  int32_t head;  // first of the group

  int32_t lanes() const { return panels * kLanes; }

  // Calls visit(lane, row among the packed query rows, head) for every lane that has a pair, in order.
  template <class Visit>
  REFRAG_INLINE void each_pair(Visit visit) const {
    int32_t row = first_pair % rows, in_head = head + first_pair / rows;
    for (int32_t lane = 0; lane < pairs; ++lane) {
      visit(lane, int64_t{first_row} + row, in_head);
      if (++row == rows) {
        row = 0;
        ++in_head;
      }
    }
  }
};

inline Pack pack_of(const AttentionParams& p, int32_t block, int32_t kv_head, int32_t panel_group) {
  const int32_t* q_block = p.plan.q_blocks + 4 * int64_t{block};
  Pack pack{q_block[0], q_block[1], 0, 0, 0, kv_head * p.group()};
  const int32_t all_pairs = pack.rows * p.group(), all_panels = (all_pairs + kLanes - 1) / kLanes;
  const int32_t groups = (all_panels + kMaxPanels - 1) / kMaxPanels;
  if (panel_group >= groups) return pack;
  const int32_t first = all_panels * panel_group / groups, last = all_panels * (panel_group + 1) / groups;
  pack.panels = last - first;
  pack.first_pair = first * kLanes;
  pack.pairs = (all_pairs < last * kLanes ? all_pairs : last * kLanes) - pack.first_pair;
  return pack;
}

// Copies the pack's rows of a tensor [T, H, D], as words for Math, to rows [lanes, stride words]; lanes without a pair
// get zeros. And transposes them: columns [words, lanes].
template <class T, class Math>
void gather(const HeadRows& tensor, int width, const Pack& pack, char* rows, char* columns) {
  const int words = words_of<Math>(width), stride = (words + 15) / 16 * 16;
  pack.each_pair([&](int32_t lane, int64_t row, int32_t head) {
    char* copy = rows + int64_t{4} * lane * stride;
    const char* source = tensor.data + row * tensor.row_bytes + head * tensor.head_bytes;
    if constexpr (Math::kPairs) {
      int word = 0;
      for (; word + 16 <= words; word += 16) store_int(copy + 4 * word, load_int(source + 4 * word));
      if (word < words) std::memcpy(copy + 4 * word, source + 4 * word, 4 * (words - word));
    } else {
      copy_row<T>(source, width, reinterpret_cast<float*>(copy));
    }
  });
  std::memset(rows + int64_t{4} * pack.pairs * stride, 0, 4 * (pack.lanes() - pack.pairs) * stride);
  for (int panel = 0; panel < pack.panels; ++panel) {
    for (int word = 0; word < words; word += 16) {
      transpose_words(rows + int64_t{64} * panel * stride + 4 * word, stride,
                      columns + int64_t{4} * word * pack.lanes() + 64 * panel, pack.lanes());
    }
  }
}

// Neighbouring keys that a block sees, all of them or by `bits`.
struct Segment {
  const char* operand[2];
  const uint32_t* bits;  // null: every row sees every key
  int32_t first_key, count;
};

// Walks the keys of a block, full ranges first, in steps of at most `kKeys` keys.
template <int kKeys>
class Walk {
 public:
  static constexpr int kMaxSegments = kKeys / kTile;

  Walk(const PlanView& plan, int32_t block) : plan_(plan) {
    const int32_t* q_block = plan.q_blocks + 4 * int64_t{block};
    last_key_ = q_block[2] + q_block[3];
    range_ = plan.full_offsets[block];
    last_range_ = plan.full_offsets[block + 1];
    partial_ = plan.partial_offsets[block];
    last_partial_ = plan.partial_offsets[block + 1];
    if (range_ < last_range_) key_ = plan.full_ranges[2 * int64_t{range_}];
  }

  // Fills `segments` for the next step; their number.
  int next() {
    int number = 0, keys = 0;
    while (range_ < last_range_ && keys < kKeys) {
      const int32_t end = plan_.full_ranges[2 * int64_t{range_} + 1];
      const int32_t count = end - key_ < kKeys - keys ? end - key_ : kKeys - keys;
      segments[number++] = {{nullptr, nullptr}, nullptr, key_, count};
      keys += count;
      key_ += count;
      if (key_ >= end && ++range_ < last_range_) key_ = plan_.full_ranges[2 * int64_t{range_}];
    }
    // A tile at the end of a sequence may hold fewer keys, but room for 16 is what the scores have.
    for (; partial_ < last_partial_ && keys + kTile <= kKeys; keys += kTile) {
      const int32_t first = plan_.partial_keys[partial_];
      const int32_t count = last_key_ - first < kTile ? last_key_ - first : kTile;
      segments[number++] = {{nullptr, nullptr}, plan_.partial_bits + 8 * int64_t{partial_}, first, count};
      ++partial_;
    }
    return number;
  }

  Segment segments[kMaxSegments];

 private:
  const PlanView& plan_;
  int32_t range_, last_range_, partial_, last_partial_, key_ = 0, last_key_;
};

// Points a segment's operand at its rows, packing them into `local` if no copy was made beforehand.
template <class T, Form kForm>
REFRAG_INLINE const char* rows_of(const Operand& operand, const HeadRows& tensor, const PlanView& plan,
                                  const Segment& segment, int width, int32_t kv_head, char*& local) {
  if (operand.data) {
    const int64_t row =
        operand.tiled ? int64_t{kTile} * plan.kv_row_block[segment.first_key] : int64_t{segment.first_key};
    return operand.data + row * operand.row_bytes + kv_head * operand.head_bytes;
  }
  const char* source = tensor.data + segment.first_key * tensor.row_bytes + kv_head * tensor.head_bytes;
  char* copy = local;
  const int64_t padded = (width + 15) / 16 * 16;
  if constexpr (kForm == Form::pairs) {
    pack_pairs(source, tensor.row_bytes, segment.count, width, copy);
    local += (segment.count + 1) / 2 * padded * 4;
  } else {
    pack_rows<T>(source, tensor.row_bytes, segment.count, width, copy);
    local += segment.count * padded * 4;
  }
  return copy;
}

// Which keys of a partial tile each lane's row sees: bit c of lane x of a panel.
REFRAG_INLINE void lane_masks(const uint32_t* bits, const Pack& pack, VecI* masks) {
  if (pack.rows == kTile) {
    // Two rows share a word, the first one in its low half: sixteen 16-bit numbers.
    uint16_t rows[kTile];
    for (int r = 0; r < kTile; ++r) rows[r] = static_cast<uint16_t>(bits[r / 2] >> (16 * (r % 2)));
    const VecI mask = load_u16(rows);
    for (int panel = 0; panel < pack.panels; ++panel) masks[panel] = mask;
    return;
  }
  uint16_t lanes[kMaxPanels * kLanes] = {};
  pack.each_pair([&](int32_t lane, int64_t packed_row, int32_t) {
    const int row = static_cast<int>(packed_row - pack.first_row);
    lanes[lane] = static_cast<uint16_t>(bits[row / 2] >> (16 * (row % 2)));
  });
  for (int panel = 0; panel < pack.panels; ++panel) masks[panel] = load_u16(lanes + kLanes * panel);
}

// Scores [count, lanes] of keys that a row does not see become -inf.
inline void hide(const uint32_t* bits, const Pack& pack, int count, float* scores) {
  VecI masks[kMaxPanels];
  lane_masks(bits, pack, masks);
  for (int key = 0; key < count; ++key) {
    const VecI bit = broadcast_int(1 << key);
    for (int panel = 0; panel < pack.panels; ++panel) {
      float* score = scores + key * pack.lanes() + kLanes * panel;
      store(score, select(any_bit(masks[panel], bit), load(score), broadcast(-kInfinity)));
    }
  }
}

// Where a row does not see a key its weight is 0; but 0 times a NaN or inf is NaN, so a product with a tile that only some
// rows see is right only for finite numbers. What follows is for the tiles where some are not, pair by pair.

inline bool all_finite(const float* numbers, int64_t count) {
  Vec sum = zero_vec();
  for (int64_t i = 0; i < count; i += kLanes) sum = sum + (load(numbers + i) - load(numbers + i));
  return reduce_add(sum) == 0;
}

template <class T>
bool rows_finite(const HeadRows& tensor, int32_t first, int32_t count, int32_t head, int width) {
  Vec sum = zero_vec();
  for (int32_t i = first; i < first + count; ++i) {
    const T* row = reinterpret_cast<const T*>(tensor.data + i * tensor.row_bytes + head * tensor.head_bytes);
    for (int d = 0; d < width; d += kLanes) {
      const Vec numbers = d + kLanes <= width ? load(row + d) : load_partial(row + d, width - d);
      sum = sum + (numbers - numbers);
    }
  }
  return reduce_add(sum) == 0;
}

// sums += weight * row.
template <class T>
void add_row(const HeadRows& tensor, int64_t row, int32_t head, int width, float weight, float* sums) {
  const T* numbers = reinterpret_cast<const T*>(tensor.data + row * tensor.row_bytes + head * tensor.head_bytes);
  for (int d = 0; d < width; d += kLanes) {
    const Vec part = d + kLanes <= width ? load(numbers + d) : load_partial(numbers + d, width - d);
    store(sums + d, fma(broadcast(weight), part, load(sums + d)));
  }
}

// Calls visit(key of the segment, lane, row among the packed query rows, head) for every pair that a segment allows.
template <class Visit>
void each_seen(const Segment& segment, const Pack& pack, Visit visit) {
  pack.each_pair([&](int32_t lane, int64_t row, int32_t head) {
    const int in_block = static_cast<int>(row - pack.first_row);
    const uint32_t seen = segment.bits[in_block / 2] >> (16 * (in_block % 2));
    for (int key = 0; key < segment.count; ++key) {
      if (seen >> key & 1) visit(key, lane, row, head);
    }
  });
}

// Whether scores get their scale and softcap before the softmax; else it applies the scale, which keeps their order.
inline bool is_shaped(const AttentionParams& p) { return p.softcap > 0 || !(p.scale > 0); }
inline float natural_factor(const AttentionParams& p) { return is_shaped(p) ? 1.0f : p.scale; }

// scores = softcap * tanh(scale * scores / softcap), or scale * scores.
inline void shape_scores(float* scores, int64_t count, float scale, float softcap) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vec score = load(scores + i) * broadcast(scale);
    store(scores + i, softcap > 0 ? broadcast(softcap) * tanh(score / broadcast(softcap)) : score);
  }
}

}  // namespace
}  // namespace refrag::cpu::REFRAG_ISA
