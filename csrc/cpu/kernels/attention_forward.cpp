// mixed_attention, forward: flash attention over the tiles of a plan. See attention_kernels.h for how rows are packed.
#include "cpu/kernels/attention_block.h"

namespace refrag::cpu::REFRAG_ISA {
namespace {

// Keys between two looks at the running maximum. Many make its cost, and that of loading and storing the sums, small;
// but their scores, keys and values should stay in the first two levels of the cache.
inline constexpr int kStepKeys = 128;

struct Scratch {
  char* rows;                        // [lanes, words]: queries as gathered
  char* queries;                     // [words, lanes]
  float* scores;                     // [kStepKeys, lanes]
  char* weights;                     // [kStepKeys / 2, lanes] pairs; floats share the scores' memory
  float* sums;                       // [lanes, padded width]
  float *maxima, *totals, *factors;  // [lanes]
  char* local[2];                    // keys and values packed on the way

  static Scratch carve(Arena& arena, const AttentionParams& p) {
    const int64_t lanes = kMaxPanels * kLanes, width = p.padded_width();
    Scratch s;
    s.rows = arena.take<char>(4 * lanes * width);
    s.queries = arena.take<char>(4 * lanes * width);
    s.scores = arena.take<float>(kStepKeys * lanes);
    s.weights = arena.take<char>(2 * kStepKeys * lanes);
    s.sums = arena.take<float>(lanes * width);
    s.maxima = arena.take<float>(lanes);
    s.totals = arena.take<float>(lanes);
    s.factors = arena.take<float>(lanes);
    for (char*& local : s.local) local = arena.take<char>(4 * kStepKeys * width);
    return s;
  }
};

// One step of the online softmax for one panel: of the scores [keys, lanes] this panel's 16 become weights
// 2^((score - maximum) * to_log2), and the highest score's is 1. `keys` is even for pairs.
template <class Math>
void soften(const Scratch& s, int panel, int lanes, int keys, float to_log2) {
  float* scores = s.scores + kLanes * panel;
  Vec high[4];
  for (Vec& h : high) h = broadcast(-kInfinity);
  int key = 0;
  for (; key + 4 <= keys; key += 4) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) high[i] = max(high[i], load(scores + (key + i) * lanes));
  }
  for (; key < keys; ++key) high[0] = max(high[0], load(scores + key * lanes));
  const Vec step_high = max(max(high[0], high[1]), max(high[2], high[3]));

  const Vec scale = broadcast(to_log2), old = load(s.maxima + kLanes * panel);
  const Vec maximum = max(old, step_high);
  // A row that has seen nothing yet: any finite number will do in place of -inf, which would give NaN.
  const Vec base = select(equal(maximum, broadcast(-kInfinity)), zero_vec(), maximum);
  const Vec factor = exp2_bounded((old - base) * scale);
  store(s.maxima + kLanes * panel, maximum);
  store(s.factors + kLanes * panel, factor);

  Vec total[2] = {zero_vec(), zero_vec()};
  if constexpr (Math::kPairs) {
#if defined(__AVX512BF16__)
    char* weights = s.weights + 4 * kLanes * panel;
    for (key = 0; key < keys; key += 2) {
      const Vec even = exp2_bounded<4>((load(scores + key * lanes) - base) * scale);
      const Vec odd = exp2_bounded<4>((load(scores + (key + 1) * lanes) - base) * scale);
      total[0] = total[0] + even;
      total[1] = total[1] + odd;
      store_pairs(weights + key / 2 * lanes * 4, even, odd);
    }
#endif
  } else {
    const auto weigh = [&](int k) {
      const Vec weight = exp2_bounded((load(scores + k * lanes) - base) * scale);
      store(scores + k * lanes, weight);
      return weight;
    };
    for (key = 0; key + 2 <= keys; key += 2) {
      total[0] = total[0] + weigh(key);
      total[1] = total[1] + weigh(key + 1);
    }
    if (key < keys) total[0] = total[0] + weigh(key);
  }
  float* totals = s.totals + kLanes * panel;
  store(totals, fma(load(totals), factor, total[0] + total[1]));
}

// Divides by the totals, and writes the rows' outputs and lse.
template <class T>
void finish(const AttentionParams& p, const Pack& pack, const Scratch& s, float to_natural) {
  float sinks[kMaxPanels * kLanes];
  for (float& sink : sinks) sink = -kInfinity;
  if (p.sinks) pack.each_pair([&](int32_t lane, int64_t, int32_t head) { sinks[lane] = p.sinks[head]; });
  for (int panel = 0; panel < pack.panels; ++panel) {
    const Vec maximum = load(s.maxima + kLanes * panel) * broadcast(to_natural),
              total = load(s.totals + kLanes * panel);
    const Vec sink = load(sinks + kLanes * panel);
    const Vec high = max(maximum, sink);
    const Vec base = select(equal(high, broadcast(-kInfinity)), zero_vec(), high);
    const Vec shrink = exp2_bounded((maximum - base) * broadcast(kLog2e));
    const Vec whole = fma(total, shrink, exp2_bounded((sink - base) * broadcast(kLog2e)));
    // Not less(0, whole): a NaN must stay one.
    store(s.factors + kLanes * panel, select(equal(whole, zero_vec()), zero_vec(), shrink / whole));
    store(s.maxima + kLanes * panel, fma(log2(whole), broadcast(kLn2), base));
  }
  const int padded = p.padded_width();
  pack.each_pair([&](int32_t lane, int64_t row, int32_t head) {
    const int64_t entry = row * p.heads + head;
    T* out = reinterpret_cast<T*>(p.out) + entry * p.width;
    const float* sums = s.sums + int64_t{lane} * padded;
    const Vec factor = broadcast(s.factors[lane]);
    p.lse[entry] = s.maxima[lane];
    int d = 0;
    for (; d + kLanes <= p.width; d += kLanes) store(out + d, load(sums + d) * factor);
    if (d < p.width) store_partial(out + d, load(sums + d) * factor, p.width - d);
  });
}

// The weight of a key of a step, as `soften` leaves it.
template <class Math>
float weight_at(const Scratch& s, int lanes, int key, int lane) {
  if constexpr (!Math::kPairs) return s.scores[key * lanes + lane];
  uint16_t half;
  std::memcpy(&half, s.weights + 4 * (key / 2 * lanes + lane) + 2 * (key % 2), sizeof(half));
  const uint32_t word = uint32_t{half} << 16;
  float weight;
  std::memcpy(&weight, &word, sizeof(weight));
  return weight;
}

// The step's share of the sums, segment by segment, where values are not finite.
template <class T, class Math>
void add_values(const AttentionParams& p, const Pack& pack, const Scratch& s, const char* weights, int32_t kv_head,
                const Segment* segments, const Span* values, int count) {
  constexpr int kKeysPerWord = Math::kPairs ? 2 : 1;
  const int lanes = pack.lanes(), padded = p.padded_width();
  const int64_t b_stride = kKeysPerWord * p.v_cols.row_bytes;
  const auto product = [&]<Into kInto>(int first_word, const Span* span, int spans) {
    multiply<Math, Lie::adjacent, kInto>({weights + int64_t{4} * first_word * lanes, 4 * int64_t{lanes},
                                                          span, spans, b_stride, s.sums, padded, s.factors},
                                                         lanes, padded / kLanes);
  };
  product.template operator()<Into::scale>(0, values, 0);
  int word = 0;
  for (int i = 0; i < count; ++i) {
    const Segment& segment = segments[i];
    if (!segment.bits || rows_finite<T>(p.v, segment.first_key, segment.count, kv_head, p.width)) {
      product.template operator()<Into::add>(word, values + i, 1);
    } else {
      each_seen(segment, pack, [&](int key, int32_t lane, int64_t, int32_t) {
        const float weight = weight_at<Math>(s, lanes, kKeysPerWord * word + key, lane);
        add_row<T>(p.v, segment.first_key + key, kv_head, p.width, weight, s.sums + int64_t{lane} * padded);
      });
    }
    word += values[i].length;
  }
}

// The sums, totals and maxima of a pack's rows.
template <class T, class Math>
void attend(const AttentionParams& p, int32_t block, int32_t kv_head, const Pack& pack, const Scratch& s, bool careful) {
  const int lanes = pack.lanes(), padded = p.padded_width(), words = words_of<Math>(p.width);
  std::memset(s.sums, 0, sizeof(float) * lanes * padded);
  for (int panel = 0; panel < pack.panels; ++panel) {
    store(s.maxima + kLanes * panel, broadcast(-kInfinity));
    store(s.totals + kLanes * panel, zero_vec());
  }
  constexpr Form kCols = Math::kPairs ? Form::pairs : Form::rows;
  constexpr int kKeysPerWord = Math::kPairs ? 2 : 1;
  // The factor that turns scores into powers of 2 is applied with the maximum, if it keeps their order.
  const bool shaped = is_shaped(p);
  const float to_log2 = natural_factor(p) * kLog2e;

  Walk<kStepKeys> walk(p.plan, block);
  while (const int count = walk.next()) {
    char* local[2] = {s.local[0], s.local[1]};
    Span values[Walk<kStepKeys>::kMaxSegments];
    const Span queries{s.queries, words};
    int keys = 0;
    for (int i = 0; i < count; ++i) {
      const Segment& segment = walk.segments[i];
      const char* k = rows_of<T, Form::rows>(p.k_rows, p.k, p.plan, segment, p.width, kv_head, local[0]);
      const char* v = rows_of<T, kCols>(p.v_cols, p.v, p.plan, segment, p.width, kv_head, local[1]);
      float* scores = s.scores + int64_t{keys} * lanes;
      const int64_t k_stride = p.k_rows.row_bytes;
      multiply<Math, Lie::apart, Into::set>({k, k_stride, &queries, 1, 4 * int64_t{lanes}, scores, lanes, nullptr},
                                            segment.count, pack.panels);
      if (shaped) shape_scores(scores, int64_t{segment.count} * lanes, p.scale, p.softcap);
      if (segment.bits) hide(segment.bits, pack, segment.count, scores);
      keys += segment.count;
      if (keys % kKeysPerWord) {
        // The other half of the last pair; the values' copy has zeros there.
        for (int x = 0; x < lanes; x += kLanes) store(s.scores + int64_t{keys} * lanes + x, broadcast(-kInfinity));
        ++keys;
      }
      values[i] = {v, (segment.count + kKeysPerWord - 1) / kKeysPerWord};
    }
    for (int panel = 0; panel < pack.panels; ++panel) soften<Math>(s, panel, lanes, keys, to_log2);
    const char* weights = Math::kPairs ? s.weights : reinterpret_cast<const char*>(s.scores);
    if (careful) {
      add_values<T, Math>(p, pack, s, weights, kv_head, walk.segments, values, count);
      continue;
    }
    multiply<Math, Lie::adjacent, Into::scale>(
        {weights, 4 * int64_t{lanes}, values, count, kKeysPerWord * p.v_cols.row_bytes, s.sums, padded, s.factors},
        lanes, padded / kLanes);
  }
}

template <class T, class Math>
void forward(const AttentionParams& p, const AttentionTask& task, char* memory) {
  const Pack pack = pack_of(p, task.block, task.kv_head, task.panel_group);
  if (pack.panels == 0) return;
  Arena arena{memory};
  const Scratch s = Scratch::carve(arena, p);
  gather<T, Math>(p.q, p.width, pack, s.rows, s.queries);
  attend<T, Math>(p, task.block, task.kv_head, pack, s, false);
  // A value that is not finite is in the sums of rows that don't see it, too: those are computed again.
  if (!all_finite(s.sums, int64_t{pack.pairs} * p.padded_width())) {
    attend<T, Math>(p, task.block, task.kv_head, pack, s, true);
  }
  finish<T>(p, pack, s, natural_factor(p));
}

}  // namespace

int64_t attention_forward_scratch(const AttentionParams& params) {
  Arena arena{nullptr};
  Scratch::carve(arena, params);
  return arena.used;
}

void attention_forward(const AttentionParams& params, const AttentionTask& task, char* scratch) {
  with_types(params.element,
             [&](auto number, auto math) { forward<decltype(number), decltype(math)>(params, task, scratch); });
}

}  // namespace refrag::cpu::REFRAG_ISA
