// Forward kernel of mixed_attention: FlashAttention over the tiles of a plan. attention_kernels.h explains how rows are
// packed.
#include "cpu/kernels/attention_block.h"

namespace refrag::cpu::REFRAG_ISA {
namespace {

// Keys per online-softmax update. Larger steps amortize the update and the loads and stores of the output accumulator,
// but the scores, keys and values of a step should fit in the L1 and L2 caches.
inline constexpr int kStepKeys = 128;

struct Scratch {
  char* rows;                          // [num_rows, words]: the gathered queries
  char* queries;                       // [words, num_rows]: their transpose
  float* scores;                       // [kStepKeys, num_rows]
  char* probs;                         // [kStepKeys / 2, num_rows] bfloat16 pairs; float32 shares the scores' memory
  float* acc;                          // [num_rows, padded_head_dim]: unnormalized output
  float *row_max, *row_sum, *rescale;  // [num_rows]
  char* local[2];                      // keys and values that are packed on the fly

  static Scratch allocate(Arena& arena, const AttentionParams& p) {
    const int64_t num_rows = kMaxRowTiles * kLanes, dim = p.padded_head_dim();
    Scratch s;
    s.rows = arena.allocate<char>(4 * num_rows * dim);
    s.queries = arena.allocate<char>(4 * num_rows * dim);
    s.scores = arena.allocate<float>(kStepKeys * num_rows);
    s.probs = arena.allocate<char>(2 * kStepKeys * num_rows);
    s.acc = arena.allocate<float>(num_rows * dim);
    s.row_max = arena.allocate<float>(num_rows);
    s.row_sum = arena.allocate<float>(num_rows);
    s.rescale = arena.allocate<float>(num_rows);
    for (char*& local : s.local) local = arena.allocate<char>(4 * kStepKeys * dim);
    return s;
  }
};

// Online-softmax update of one row tile: replaces its scores [keys, num_rows] by 2^((score - row_max) * to_log2).
// `keys` is even for bfloat16 pairs.
template <class Math>
void update_softmax(const Scratch& s, int row_tile, int num_rows, int keys, float to_log2) {
  float* scores = s.scores + kLanes * row_tile;
  Vec high[4];
  for (Vec& h : high) h = broadcast(-kInfinity);
  int key = 0;
  for (; key + 4 <= keys; key += 4) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) high[i] = max(high[i], load(scores + (key + i) * num_rows));
  }
  for (; key < keys; ++key) high[0] = max(high[0], load(scores + key * num_rows));
  const Vec step_max = max(max(high[0], high[1]), max(high[2], high[3]));

  const Vec scale = broadcast(to_log2), old_max = load(s.row_max + kLanes * row_tile);
  const Vec new_max = max(old_max, step_max);
  // A row without any unmasked key so far: -inf - -inf would be NaN, so use 0 as the base.
  const Vec base = select(equal(new_max, broadcast(-kInfinity)), zero_vec(), new_max);
  const Vec factor = exp2_bounded((old_max - base) * scale);
  store(s.row_max + kLanes * row_tile, new_max);
  store(s.rescale + kLanes * row_tile, factor);

  Vec total[2] = {zero_vec(), zero_vec()};
  if constexpr (Math::kPairs) {
#if defined(__AVX512BF16__)
    char* probs = s.probs + 4 * kLanes * row_tile;
    for (key = 0; key < keys; key += 2) {
      const Vec even = exp2_bounded<4>((load(scores + key * num_rows) - base) * scale);
      const Vec odd = exp2_bounded<4>((load(scores + (key + 1) * num_rows) - base) * scale);
      total[0] = total[0] + even;
      total[1] = total[1] + odd;
      store_pairs(probs + key / 2 * num_rows * 4, even, odd);
    }
#endif
  } else {
    const auto exponentiate = [&](int k) {
      const Vec prob = exp2_bounded((load(scores + k * num_rows) - base) * scale);
      store(scores + k * num_rows, prob);
      return prob;
    };
    for (key = 0; key + 2 <= keys; key += 2) {
      total[0] = total[0] + exponentiate(key);
      total[1] = total[1] + exponentiate(key + 1);
    }
    if (key < keys) total[0] = total[0] + exponentiate(key);
  }
  float* row_sum = s.row_sum + kLanes * row_tile;
  store(row_sum, fma(load(row_sum), factor, total[0] + total[1]));
}

// Normalizes the outputs and writes them and the log-sum-exp.
template <class T>
void write_output(const AttentionParams& p, const PackedRows& packed, const Scratch& s, float scale) {
  float sinks[kMaxRowTiles * kLanes];
  for (float& sink : sinks) sink = -kInfinity;
  if (p.sinks) packed.for_each([&](int32_t packed_row, int64_t, int32_t head) { sinks[packed_row] = p.sinks[head]; });
  for (int row_tile = 0; row_tile < packed.row_tiles; ++row_tile) {
    const Vec maximum = load(s.row_max + kLanes * row_tile) * broadcast(scale),
              total = load(s.row_sum + kLanes * row_tile);
    const Vec sink = load(sinks + kLanes * row_tile);
    const Vec high = max(maximum, sink);
    const Vec base = select(equal(high, broadcast(-kInfinity)), zero_vec(), high);
    const Vec correction = exp2_bounded((maximum - base) * broadcast(kLog2e));
    const Vec denominator = fma(total, correction, exp2_bounded((sink - base) * broadcast(kLog2e)));
    // Not less(0, denominator): NaN must be preserved.
    store(s.rescale + kLanes * row_tile, select(equal(denominator, zero_vec()), zero_vec(), correction / denominator));
    store(s.row_max + kLanes * row_tile, fma(log2(denominator), broadcast(kLn2), base));
  }
  const int padded_dim = p.padded_head_dim();
  packed.for_each([&](int32_t packed_row, int64_t row, int32_t head) {
    const int64_t index = row * p.heads + head;
    T* out = reinterpret_cast<T*>(p.out) + index * p.head_dim;
    const float* acc = s.acc + int64_t{packed_row} * padded_dim;
    const Vec factor = broadcast(s.rescale[packed_row]);
    p.lse[index] = s.row_max[packed_row];
    int d = 0;
    for (; d + kLanes <= p.head_dim; d += kLanes) store(out + d, load(acc + d) * factor);
    if (d < p.head_dim) store_partial(out + d, load(acc + d) * factor, p.head_dim - d);
  });
}

// The probability of one key, as stored by `update_softmax`.
template <class Math>
float prob_at(const Scratch& s, int num_rows, int key, int packed_row) {
  if constexpr (!Math::kPairs) return s.scores[key * num_rows + packed_row];
  uint16_t half;
  std::memcpy(&half, s.probs + 4 * (key / 2 * num_rows + packed_row) + 2 * (key % 2), sizeof(half));
  const uint32_t word = uint32_t{half} << 16;
  float prob;
  std::memcpy(&prob, &word, sizeof(prob));
  return prob;
}

// Accumulates the output of a step segment by segment, for values that are not all finite.
template <class T, class Math>
void accumulate_nonfinite(const AttentionParams& p, const PackedRows& packed, const Scratch& s, const char* probs,
                          int32_t kv_head, const Segment* segments, const Span* values, int count) {
  constexpr int kKeysPerWord = Math::kPairs ? 2 : 1;
  const int num_rows = packed.padded_count(), padded_dim = p.padded_head_dim();
  const int64_t b_stride = kKeysPerWord * p.v_cols.row_bytes;
  const auto product = [&]<Epilogue kEpilogue>(int first_word, const Span* span, int spans) {
    multiply<Math, Order::col_major, kEpilogue>({probs + int64_t{4} * first_word * num_rows, 4 * int64_t{num_rows},
                                                 span, spans, b_stride, s.acc, padded_dim, s.rescale},
                                                num_rows, padded_dim / kLanes);
  };
  product.template operator()<Epilogue::rescale>(0, values, 0);
  int word = 0;
  for (int i = 0; i < count; ++i) {
    const Segment& segment = segments[i];
    if (!segment.bits || rows_finite<T>(p.v, segment.first_key, segment.count, kv_head, p.head_dim)) {
      product.template operator()<Epilogue::accumulate>(word, values + i, 1);
    } else {
      for_each_visible(segment, packed, [&](int key, int32_t packed_row, int64_t, int32_t) {
        const float prob = prob_at<Math>(s, num_rows, kKeysPerWord * word + key, packed_row);
        add_row<T>(p.v, segment.first_key + key, kv_head, p.head_dim, prob, s.acc + int64_t{packed_row} * padded_dim);
      });
    }
    word += values[i].length;
  }
}

// Computes the unnormalized output, row_max and row_sum of the packed rows.
template <class T, class Math>
void attend(const AttentionParams& p, int32_t block, int32_t kv_head, const PackedRows& packed, const Scratch& s,
            bool nonfinite_safe) {
  const int num_rows = packed.padded_count(), padded_dim = p.padded_head_dim(), words = words_of<Math>(p.head_dim);
  std::memset(s.acc, 0, sizeof(float) * num_rows * padded_dim);
  for (int row_tile = 0; row_tile < packed.row_tiles; ++row_tile) {
    store(s.row_max + kLanes * row_tile, broadcast(-kInfinity));
    store(s.row_sum + kLanes * row_tile, zero_vec());
  }
  constexpr Layout kCols = Math::kPairs ? Layout::bf16_pairs : Layout::padded_rows;
  constexpr int kKeysPerWord = Math::kPairs ? 2 : 1;
  // A positive scale is applied together with the conversion to powers of 2, after the maximum is subtracted.
  const bool prescaled = scales_before_softmax(p);
  const float to_log2 = softmax_scale(p) * kLog2e;

  SegmentIterator<kStepKeys> iterator(p.plan, block);
  while (const int count = iterator.next()) {
    char* local[2] = {s.local[0], s.local[1]};
    Span values[SegmentIterator<kStepKeys>::kMaxSegments];
    const Span queries{s.queries, words};
    int keys = 0;
    for (int i = 0; i < count; ++i) {
      const Segment& segment = iterator.segments[i];
      const char* k =
          operand_rows<T, Layout::padded_rows>(p.k_rows, p.k, p.plan, segment, p.head_dim, kv_head, local[0]);
      const char* v = operand_rows<T, kCols>(p.v_cols, p.v, p.plan, segment, p.head_dim, kv_head, local[1]);
      float* scores = s.scores + int64_t{keys} * num_rows;
      const int64_t k_stride = p.k_rows.row_bytes;
      multiply<Math, Order::row_major, Epilogue::store>(
          {k, k_stride, &queries, 1, 4 * int64_t{num_rows}, scores, num_rows, nullptr}, segment.count,
          packed.row_tiles);
      if (prescaled) scale_scores(scores, int64_t{segment.count} * num_rows, p.scale, p.softcap);
      if (segment.bits) apply_mask(segment.bits, packed, segment.count, scores);
      keys += segment.count;
      if (keys % kKeysPerWord) {
        // Fill the other half of the last pair; the packed values have zeros there.
        for (int x = 0; x < num_rows; x += kLanes) {
          store(s.scores + int64_t{keys} * num_rows + x, broadcast(-kInfinity));
        }
        ++keys;
      }
      values[i] = {v, (segment.count + kKeysPerWord - 1) / kKeysPerWord};
    }
    for (int row_tile = 0; row_tile < packed.row_tiles; ++row_tile) {
      update_softmax<Math>(s, row_tile, num_rows, keys, to_log2);
    }
    const char* probs = Math::kPairs ? s.probs : reinterpret_cast<const char*>(s.scores);
    if (nonfinite_safe) {
      accumulate_nonfinite<T, Math>(p, packed, s, probs, kv_head, iterator.segments, values, count);
      continue;
    }
    multiply<Math, Order::col_major, Epilogue::rescale>(
        {probs, 4 * int64_t{num_rows}, values, count, kKeysPerWord * p.v_cols.row_bytes, s.acc, padded_dim, s.rescale},
        num_rows, padded_dim / kLanes);
  }
}

template <class T, class Math>
void forward(const AttentionParams& p, const AttentionTask& task, char* memory) {
  const PackedRows packed = packed_rows_of(p, task.block, task.kv_head, task.row_tile_group);
  if (packed.row_tiles == 0) return;
  Arena arena{memory};
  const Scratch s = Scratch::allocate(arena, p);
  gather<T, Math>(p.q, p.head_dim, packed, s.rows, s.queries);
  attend<T, Math>(p, task.block, task.kv_head, packed, s, false);
  // A value that is not finite also reached the rows that don't attend to it (0 * NaN): compute those again.
  if (!all_finite(s.acc, int64_t{packed.count} * p.padded_head_dim())) {
    attend<T, Math>(p, task.block, task.kv_head, packed, s, true);
  }
  write_output<T>(p, packed, s, softmax_scale(p));
}

}  // namespace

int64_t attention_forward_scratch(const AttentionParams& params) {
  Arena arena{nullptr};
  Scratch::allocate(arena, params);
  return arena.used;
}

void attention_forward(const AttentionParams& params, const AttentionTask& task, char* scratch) {
  with_types(params.element,
             [&](auto scalar, auto math) { forward<decltype(scalar), decltype(math)>(params, task, scratch); });
}

}  // namespace refrag::cpu::REFRAG_ISA
