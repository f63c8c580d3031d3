// mixed_attention, backward: one pass over the tiles of a plan.
//
// With p = exp(s - lse) and delta = dout . out - dlse:  ds = p * (dout . v - delta) * slope,  dq = ds k,  dk = ds^T q,
// dv = p^T dout. As in the forward pass, p and ds are kept as [key][pair].
#include "cpu/kernels/attention_block.h"

namespace refrag::cpu::REFRAG_ISA {
namespace {

// Keys of a step. The scores, their gradients and dq's sums are in use together, so fewer than in the forward pass.
inline constexpr int kStepKeys = 64;

struct Scratch {
  char *q_rows, *q_columns, *grad_rows, *grad_columns;  // as gather leaves them
  char *q_pairs, *grad_pairs;                           // [lanes / 2, padded width], for pairs
  float *scores, *slopes;                               // [kStepKeys, lanes]: s then p; dout . v then ds
  char *weights, *narrow;                               // p and ds in bfloat16 [kStepKeys, lanes], for pairs
  char* paired;                                         // ds [kStepKeys / 2, lanes] pairs of keys, for pairs
  float* dq;                                            // [lanes, padded width]
  float *lse, *delta;                                   // [lanes]; lse as a power of 2
  char* local[3];

  static Scratch carve(Arena& arena, const AttentionParams& p) {
    const int64_t lanes = kMaxPanels * kLanes, width = p.padded_width();
    Scratch s;
    s.q_rows = arena.take<char>(4 * lanes * width);
    s.q_columns = arena.take<char>(4 * lanes * width);
    s.grad_rows = arena.take<char>(4 * lanes * width);
    s.grad_columns = arena.take<char>(4 * lanes * width);
    s.q_pairs = arena.take<char>(2 * lanes * width);
    s.grad_pairs = arena.take<char>(2 * lanes * width);
    s.scores = arena.take<float>(kStepKeys * lanes);
    s.slopes = arena.take<float>(kStepKeys * lanes);
    s.weights = arena.take<char>(2 * kStepKeys * lanes);
    s.narrow = arena.take<char>(2 * kStepKeys * lanes);
    s.paired = arena.take<char>(2 * kStepKeys * lanes);
    s.dq = arena.take<float>(lanes * width);
    s.lse = arena.take<float>(lanes);
    s.delta = arena.take<float>(lanes);
    for (char*& local : s.local) local = arena.take<char>(4 * kStepKeys * width);
    return s;
  }
};

// Gathers the pack's rows and their gradients; lse, delta, and the sinks' share of the gradient.
template <class T, class Math>
void prepare(const AttentionBackwardParams& b, const Pack& pack, const Scratch& s, float* dsinks) {
  const AttentionParams& p = b.forward;
  const int lanes = pack.lanes(), words = words_of<Math>(p.width);
  gather<T, Math>(b.grad_out, p.width, pack, s.grad_rows, s.grad_columns);
  gather<T, Math>(b.out, p.width, pack, s.q_rows, s.q_columns);
  for (int panel = 0; panel < pack.panels; ++panel) {
    // In the order in which dout . v will be summed: for a row that sees one key the two are then equal to the last
    // bit.
    Vec sum = zero_vec();
    for (int word = 0; word < words; ++word) {
      const int64_t at = int64_t{4} * word * lanes + 64 * panel;
      sum = Math::multiply_add(load_words(s.q_columns + at), load_words(s.grad_columns + at), sum);
    }
    store(s.delta + kLanes * panel, sum);
  }
  gather<T, Math>(p.q, p.width, pack, s.q_rows, s.q_columns);
  // A lane without a row, or of a row that sees nothing: exp2(s - inf) makes its weights 0.
  for (int lane = 0; lane < lanes; ++lane) s.lse[lane] = kInfinity;
  for (int lane = pack.pairs; lane < lanes; ++lane) s.delta[lane] = 0;
  pack.each_pair([&](int32_t lane, int64_t row, int32_t head) {
    const int64_t entry = row * p.heads + head;
    if (b.lse[entry] == -kInfinity) {
      s.delta[lane] = 0;
      return;
    }
    s.lse[lane] = b.lse[entry] * kLog2e;
    s.delta[lane] -= b.grad_lse[entry];
    if (dsinks) {
      const Vec weight = exp2_bounded(broadcast(p.sinks[head] * kLog2e - s.lse[lane]));
      dsinks[head] -= lane_of(weight, 0) * s.delta[lane];
    }
  });
}

// Whether lse and delta of a pack's rows are numbers; lse is inf for a row that sees nothing.
inline bool lanes_finite(const Scratch& s, const Pack& pack) {
  bool finite = true;
  for (int lane = 0; lane < pack.pairs; ++lane) {
    finite &= s.lse[lane] == s.lse[lane] && s.delta[lane] - s.delta[lane] == 0;
  }
  return finite;
}

struct Shape {
  float scale, softcap;  // softcap 0: none
  bool shaped;           // whether the scores have had their scale and softcap before they are weighed
  float to_log2;
};

// Scores and dout . v of one key, 16 lanes, to p and ds.
REFRAG_INLINE void weigh(const Shape& shape, const Vec score, const Vec lse, const Vec delta, Vec& weight, Vec& slope) {
  weight = exp2_bounded(fma(score, broadcast(shape.to_log2), zero_vec() - lse));
  slope = weight * (slope - delta) * broadcast(shape.scale);
  if (shape.softcap > 0) {
    const Vec ratio = score * broadcast(1.0f / shape.softcap);
    // A hidden score is -inf; its weight is 0, and so must this be.
    slope = slope * (broadcast(1.0f) - min(ratio * ratio, broadcast(1.0f)));
  }
}

template <class Math>
void weigh_panel(const Shape& shape, const Scratch& s, int panel, int lanes, int keys) {
  const int column = kLanes * panel;
  const Vec lse = load(s.lse + column), delta = load(s.delta + column);
  if constexpr (Math::kPairs) {
#if defined(__AVX512BF16__)
    for (int key = 0; key < keys; key += 2) {
      Vec weight[2], slope[2];
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const int64_t at = int64_t{key + i} * lanes + column;
        slope[i] = load(s.slopes + at);
        weigh(shape, load(s.scores + at), lse, delta, weight[i], slope[i]);
        store(reinterpret_cast<BFloat16*>(s.weights) + at, weight[i]);
        store(reinterpret_cast<BFloat16*>(s.narrow) + at, slope[i]);
      }
      store_pairs(s.paired + 4 * (int64_t{key / 2} * lanes + column), slope[0], slope[1]);
    }
#endif
  } else {
    for (int key = 0; key < keys; ++key) {
      const int64_t at = int64_t{key} * lanes + column;
      Vec weight, slope = load(s.slopes + at);
      weigh(shape, load(s.scores + at), lse, delta, weight, slope);
      store(s.scores + at, weight);
      store(s.slopes + at, slope);
    }
  }
}

// p and ds of a key of a step, as weigh_panel leaves them.
template <class Math>
float number_at(const char* numbers, int64_t at) {
  if constexpr (Math::kPairs) {
    return lane_of(load_partial(reinterpret_cast<const BFloat16*>(numbers) + at, 1), 0);
  } else {
    return reinterpret_cast<const float*>(numbers)[at];
  }
}

// Adds a segment in which something is not finite to dq, and to dk and dv of its keys, pair by pair. p and ds of its keys
// are those from `first` on.
template <class T, class Math>
void add_pairs(const AttentionBackwardParams& b, const Pack& pack, const Scratch& s, int32_t kv_head,
               const Segment& segment, const char* weights, const char* slopes, int first, float* dk, float* dv) {
  const AttentionParams& p = b.forward;
  const int lanes = pack.lanes(), padded = p.padded_width();
  each_seen(segment, pack, [&](int key, int32_t lane, int64_t row, int32_t head) {
    const int64_t at = int64_t{first + key} * lanes + lane;
    const float weight = number_at<Math>(weights, at), slope = number_at<Math>(slopes, at);
    add_row<T>(p.k, segment.first_key + key, kv_head, p.width, slope, s.dq + int64_t{lane} * padded);
    add_row<T>(p.q, row, head, p.width, slope, dk + key * padded);
    add_row<T>(b.grad_out, row, head, p.width, weight, dv + key * padded);
  });
}

template <class T, class Math>
void backward_pack(const AttentionBackwardParams& b, const Strip& strip, int32_t block, int32_t kv_head,
                   const Pack& pack, const Scratch& s) {
  const AttentionParams& p = b.forward;
  const int lanes = pack.lanes(), padded = p.padded_width(), words = words_of<Math>(p.width);
  constexpr int kKeysPerWord = Math::kPairs ? 2 : 1;
  constexpr Form kCols = Math::kPairs ? Form::pairs : Form::rows;
  constexpr int64_t kNumberBytes = Math::kPairs ? 2 : 4;
  const char *queries = s.q_rows, *grads = s.grad_rows;
  if constexpr (Math::kPairs) {
    const int64_t row_bytes = (words + 15) / 16 * 64;
    pack_pairs(s.q_rows, row_bytes, lanes, p.width, s.q_pairs);
    pack_pairs(s.grad_rows, row_bytes, lanes, p.width, s.grad_pairs);
    queries = s.q_pairs;
    grads = s.grad_pairs;
  }
  std::memset(s.dq, 0, sizeof(float) * lanes * padded);
  const bool shaped = is_shaped(p);
  const Shape shape{p.scale, p.softcap, shaped, natural_factor(p) * kLog2e};
  const Span q_columns{s.q_columns, words}, grad_columns{s.grad_columns, words};
  // A row that attends to what is not finite has NaN in these, and so in its pairs with keys that it doesn't see.
  const bool rows_are_finite = lanes_finite(s, pack);
  const Span q_span{queries, lanes / kKeysPerWord}, grad_span{grads, lanes / kKeysPerWord};

  Walk<kStepKeys> walk(p.plan, block);
  while (const int count = walk.next()) {
    char* local[3] = {s.local[0], s.local[1], s.local[2]};
    Span key_spans[Walk<kStepKeys>::kMaxSegments];
    int first_keys[Walk<kStepKeys>::kMaxSegments];
    bool spoilt[Walk<kStepKeys>::kMaxSegments];
    bool any_spoilt = false;
    int keys = 0;
    for (int i = 0; i < count; ++i) {
      const Segment& segment = walk.segments[i];
      const char* k = rows_of<T, Form::rows>(p.k_rows, p.k, p.plan, segment, p.width, kv_head, local[0]);
      const char* v = rows_of<T, Form::rows>(p.v_rows, p.v, p.plan, segment, p.width, kv_head, local[1]);
      const char* k_cols = rows_of<T, kCols>(p.k_cols, p.k, p.plan, segment, p.width, kv_head, local[2]);
      float *scores = s.scores + int64_t{keys} * lanes, *slopes = s.slopes + int64_t{keys} * lanes;
      multiply<Math, Lie::apart, Into::set>(
          {k, p.k_rows.row_bytes, &q_columns, 1, 4 * int64_t{lanes}, scores, lanes, nullptr}, segment.count,
          pack.panels);
      multiply<Math, Lie::apart, Into::set>(
          {v, p.v_rows.row_bytes, &grad_columns, 1, 4 * int64_t{lanes}, slopes, lanes, nullptr}, segment.count,
          pack.panels);
      const int64_t numbers = int64_t{segment.count} * lanes;
      spoilt[i] = segment.bits && !(rows_are_finite && all_finite(scores, numbers) && all_finite(slopes, numbers));
      any_spoilt |= spoilt[i];
      if (shaped) shape_scores(scores, numbers, p.scale, p.softcap);
      if (segment.bits) hide(segment.bits, pack, segment.count, scores);
      first_keys[i] = keys;
      keys += segment.count;
      if (keys % kKeysPerWord) {
        for (int x = 0; x < lanes; x += kLanes) {
          store(s.scores + int64_t{keys} * lanes + x, broadcast(-kInfinity));
          store(s.slopes + int64_t{keys} * lanes + x, zero_vec());
        }
        ++keys;
      }
      key_spans[i] = {k_cols, (segment.count + kKeysPerWord - 1) / kKeysPerWord};
    }
    for (int panel = 0; panel < pack.panels; ++panel) weigh_panel<Math>(shape, s, panel, lanes, keys);
    const char* by_key = Math::kPairs ? s.paired : reinterpret_cast<const char*>(s.slopes);
    const auto add_dq = [&](int first, const Span* spans, int number) {
      multiply<Math, Lie::adjacent, Into::add>({by_key + int64_t{4} * (first / kKeysPerWord) * lanes, 4 * int64_t{lanes},
                                                spans, number, kKeysPerWord * p.k_cols.row_bytes, s.dq, padded, nullptr},
                                               lanes, padded / kLanes);
    };
    if (!any_spoilt) add_dq(0, key_spans, count);
    const char* weights = Math::kPairs ? s.weights : reinterpret_cast<const char*>(s.scores);
    const char* slopes = Math::kPairs ? s.narrow : reinterpret_cast<const char*>(s.slopes);
    const int64_t stride = kNumberBytes * lanes;
    for (int i = 0; i < count; ++i) {
      const Segment& segment = walk.segments[i];
      const int32_t tile = p.plan.kv_row_block[segment.first_key] - strip.first_tile;
      const int64_t slot = kv_head * b.num_slots + strip.first_slot + strip.slots[tile];
      float *dk = b.dk_sums + slot * kTile * padded, *dv = b.dv_sums + slot * kTile * padded;
      if (spoilt[i]) {
        add_pairs<T, Math>(b, pack, s, kv_head, segment, weights, slopes, first_keys[i], dk, dv);
        continue;
      }
      if (any_spoilt) add_dq(first_keys[i], key_spans + i, 1);
      multiply<Math, Lie::apart, Into::add>(
          {weights + first_keys[i] * stride, stride, &grad_span, 1, 4 * int64_t{padded}, dv, padded, nullptr},
          segment.count, padded / kLanes);
      multiply<Math, Lie::apart, Into::add>(
          {slopes + first_keys[i] * stride, stride, &q_span, 1, 4 * int64_t{padded}, dk, padded, nullptr},
          segment.count, padded / kLanes);
    }
  }
  pack.each_pair([&](int32_t lane, int64_t row, int32_t head) {
    T* to = reinterpret_cast<T*>(b.dq) + (row * p.heads + head) * p.width;
    const float* sums = s.dq + int64_t{lane} * padded;
    int d = 0;
    for (; d + kLanes <= p.width; d += kLanes) store(to + d, load(sums + d));
    if (d < p.width) store_partial(to + d, load(sums + d), p.width - d);
  });
}

template <class T, class Math>
void backward(const AttentionBackwardParams& b, const Strip& strip, int32_t kv_head, char* memory) {
  const AttentionParams& p = b.forward;
  Arena arena{memory};
  const Scratch s = Scratch::carve(arena, p);
  const int64_t slot_floats = int64_t{kTile} * p.padded_width();
  const int64_t first = (kv_head * b.num_slots + strip.first_slot) * slot_floats;
  std::memset(b.dk_sums + first, 0, sizeof(float) * strip.num_slots * slot_floats);
  std::memset(b.dv_sums + first, 0, sizeof(float) * strip.num_slots * slot_floats);
  for (int32_t block = strip.first_block; block < strip.last_block; ++block) {
    float* dsinks = b.dsinks ? b.dsinks + int64_t{block} * p.heads : nullptr;
    if (dsinks) std::memset(dsinks + kv_head * p.group(), 0, sizeof(float) * p.group());
    for (int32_t group = 0; group < p.panel_groups(); ++group) {
      const Pack pack = pack_of(p, block, kv_head, group);
      if (pack.panels == 0) continue;
      prepare<T, Math>(b, pack, s, dsinks);
      backward_pack<T, Math>(b, strip, block, kv_head, pack, s);
    }
  }
}

template <class T>
void sum_slots(const AttentionBackwardParams& b, const float* sums, int32_t tile, int32_t head, char* gradient) {
  const AttentionParams& p = b.forward;
  const int32_t* kv_block = p.plan.kv_blocks + 4 * int64_t{tile};
  const int32_t *first = b.slot_lists + b.slot_offsets[tile], *last = b.slot_lists + b.slot_offsets[tile + 1];
  const int64_t padded = p.padded_width();
  for (int row = 0; row < kv_block[1]; ++row) {
    T* to = reinterpret_cast<T*>(gradient) + (int64_t{kv_block[0] + row} * p.kv_heads + head) * p.width;
    for (int d = 0; d < p.width; d += kLanes) {
      Vec sum = zero_vec();
      for (const int32_t* slot = first; slot < last; ++slot) {
        sum = sum + load(sums + ((head * b.num_slots + *slot) * kTile + row) * padded + d);
      }
      if (p.width - d >= kLanes) {
        store(to + d, sum);
      } else {
        store_partial(to + d, sum, p.width - d);
      }
    }
  }
}

}  // namespace

int64_t attention_backward_scratch(const AttentionBackwardParams& params) {
  Arena arena{nullptr};
  Scratch::carve(arena, params.forward);
  return arena.used;
}

void attention_backward(const AttentionBackwardParams& params, const Strip& strip, int32_t kv_head, char* scratch) {
  with_types(params.forward.element, [&](auto number, auto math) {
    backward<decltype(number), decltype(math)>(params, strip, kv_head, scratch);
  });
}

void attention_backward_sum(const AttentionBackwardParams& params, int32_t begin, int32_t end) {
  with_types(params.forward.element, [&](auto number, auto) {
    for (int32_t tile = begin; tile < end; ++tile) {
      for (int32_t head = 0; head < params.forward.kv_heads; ++head) {
        sum_slots<decltype(number)>(params, params.dk_sums, tile, head, params.dk);
        sum_slots<decltype(number)>(params, params.dv_sums, tile, head, params.dv);
      }
    }
  });
}

}  // namespace refrag::cpu::REFRAG_ISA
