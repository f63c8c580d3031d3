// A query block as the attention kernels see it: its rows gathered into panels, its keys in steps of a few tiles.
#pragma once

#include "cpu/attention_kernels.h"
#include "cpu/kernels/attention_product.h"

namespace refrag::cpu::REFRAG_ISA {
namespace {

inline constexpr float kInfinity = __builtin_inff();

// Splits one piece of memory into arrays; without memory, adds up what they need.
struct Arena {
  char* next;
  int64_t used = 0;

  template <class T>
  T* take(int64_t count) {
    // Whole cache lines, so that no array's vectors straddle two.
    const int64_t bytes = (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    T* result = reinterpret_cast<T*>(next);
    if (next) next += bytes;
    used += bytes;
    return result;
  }
};

template <class T>
REFRAG_INLINE int64_t offset_of(int64_t elements) {
  return elements * static_cast<int64_t>(sizeof(T));
}

// Words of a row that is the first factor of a product, or the inner length of that product.
template <class Math>
REFRAG_INLINE int words_of(int width) {
  return Math::kPairs ? width / 2 : width;
}

// Calls f with a value of the type that the tensors' elements have, and with the arithmetic to use for it.
template <class F>
REFRAG_INLINE void with_types(Element element, F f) {
  switch (element) {
    case Element::float32: f(float{}, Floats{}); break;
#if defined(__AVX512BF16__)
    case Element::bfloat16: f(BFloat16{}, Pairs{}); break;
#else
    case Element::bfloat16: f(BFloat16{}, Floats{}); break;
#endif
    case Element::float16: f(Half{}, Floats{}); break;
  }
}

// One row as float32, zeros from `width` to the next multiple of 16.
template <class T>
REFRAG_INLINE void copy_row(const char* source, int width, float* row) {
  const T* from = reinterpret_cast<const T*>(source);
  int d = 0;
  for (; d + kLanes <= width; d += kLanes) store(row + d, load(from + d));
  if (d < width) store(row + d, load_partial(from + d, width - d));
}

template <class T>
void pack_rows(const char* source, int64_t row_bytes, int count, int width, char* copy) {
  const int64_t stride = (width + 15) / 16 * 64;
  for (int i = 0; i < count; ++i) {
    copy_row<T>(source + i * row_bytes, width, reinterpret_cast<float*>(copy + i * stride));
  }
}

REFRAG_INLINE VecI load_u16_partial(const char* p, int count) {
  uint16_t numbers[kLanes] = {};
  std::memcpy(numbers, p, count * sizeof(uint16_t));
  return load_u16(numbers);
}

// Rows of 16-bit numbers, two and two: word d of pair i is number d of row 2i, and above it number d of row 2i + 1.
inline void pack_pairs(const char* source, int64_t row_bytes, int count, int width, char* copy) {
  const int64_t stride = (width + 15) / 16 * 64;
  for (int i = 0; i < count; i += 2) {
    const char* even = source + i * row_bytes;
    const char* odd = even + row_bytes;
    char* words = copy + i / 2 * stride;
    for (int d = 0; d < width; d += kLanes) {
      const int numbers = width - d < kLanes ? width - d : kLanes;
      VecI low, high = broadcast_int(0);
      if (numbers == kLanes) {
        low = load_u16(reinterpret_cast<const uint16_t*>(even + 2 * d));
        if (i + 1 < count) high = load_u16(reinterpret_cast<const uint16_t*>(odd + 2 * d));
      } else {
        low = load_u16_partial(even + 2 * d, numbers);
        if (i + 1 < count) high = load_u16_partial(odd + 2 * d, numbers);
      }
      store_int(words + 4 * d, low | shift_left<16>(high));
    }
  }
}

// to[c * to_stride + r] = from[r * from_stride + c] for 16 x 16 words; strides in words.
REFRAG_INLINE void transpose_words(const char* from, int64_t from_stride, char* to, int64_t to_stride) {
#if defined(__AVX512F__)
  __m512 a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = load_words(from + 4 * i * from_stride).part[0];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  // Now a[4i + j]: column j of each 4 x 4 square of rows 4i to 4i + 3.
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_shuffle_ps(b[i], b[i + 2], 0x44);
    a[i + 1] = _mm512_shuffle_ps(b[i], b[i + 2], 0xee);
    a[i + 2] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    a[i + 3] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512 low01 = _mm512_shuffle_f32x4(a[j], a[4 + j], 0x44),
                 high01 = _mm512_shuffle_f32x4(a[j], a[4 + j], 0xee);
    const __m512 low23 = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0x44);
    const __m512 high23 = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0xee);
    b[j] = _mm512_shuffle_f32x4(low01, low23, 0x88);
    b[4 + j] = _mm512_shuffle_f32x4(low01, low23, 0xdd);
    b[8 + j] = _mm512_shuffle_f32x4(high01, high23, 0x88);
    b[12 + j] = _mm512_shuffle_f32x4(high01, high23, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) store_int(to + 4 * i * to_stride, {{reinterpret_cast<PartI>(b[i])}});
#else
  for (int c = 0; c < 16; ++c) {
    for (int r = 0; r < 16; ++r) std::memcpy(to + 4 * (c * to_stride + r), from + 4 * (r * from_stride + c), 4);
  }
#endif
}

#if defined(__AVX512BF16__)
// Words of one pair of keys: the lanes of `even` in the low halves, of `odd` in the high ones.
REFRAG_INLINE void store_pairs(char* words, const Vec even, const Vec odd) {
  // 0, 16, 1, 17, ...
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd.part[0], even.part[0]));
  store_int(words, {{reinterpret_cast<PartI>(_mm512_permutexvar_epi16(order, both))}});
}
#endif

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

// scores = softcap * tanh(scale * scores / softcap), or scale * scores.
inline void shape_scores(float* scores, int64_t count, float scale, float softcap) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vec score = load(scores + i) * broadcast(scale);
    store(scores + i, softcap > 0 ? broadcast(softcap) * tanh(score / broadcast(softcap)) : score);
  }
}

}  // namespace
}  // namespace refrag::cpu::REFRAG_ISA
