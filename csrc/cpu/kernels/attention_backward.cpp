// Backward kernel of mixed_attention: one pass over the tiles of a plan.
//
// With p = exp(s - lse) and delta = dout . out - dlse:  ds = p * (dout . v - delta) * slope,  dq = ds k,  dk = ds^T q,
// dv = p^T dout, where slope is the derivative of scale and softcap. As in the forward pass, p and ds are stored as
// [key][packed row].
#include "cpu/kernels/attention_block.h"

namespace refrag::cpu::REFRAG_ISA {
namespace {

// Keys per step. Fewer than in the forward pass, because scores, their gradients and dq are live at the same time.
inline constexpr int kStepKeys = 64;

struct Scratch {
  char *q_rows, *q_columns, *dout_rows, *dout_columns;  // as written by gather
  char *q_pairs, *dout_pairs;                           // bfloat16: [num_rows / 2, padded_head_dim]
  float *scores, *dscores;                              // [kStepKeys, num_rows]: s, then p; dout . v, then ds
  char *probs, *dscores_bf16;                           // bfloat16: p and ds, [kStepKeys, num_rows]
  char* dscore_pairs;                                   // bfloat16: ds, pairs of keys, [kStepKeys / 2, num_rows]
  float* dq;                                            // [num_rows, padded_head_dim]
  float *lse, *delta;                                   // [num_rows]; lse in base 2
  char* local[3];

  static Scratch allocate(Arena& arena, const AttentionParams& p) {
    const int64_t num_rows = kMaxRowTiles * kLanes, dim = p.padded_head_dim();
    Scratch s;
    s.q_rows = arena.allocate<char>(4 * num_rows * dim);
    s.q_columns = arena.allocate<char>(4 * num_rows * dim);
    s.dout_rows = arena.allocate<char>(4 * num_rows * dim);
    s.dout_columns = arena.allocate<char>(4 * num_rows * dim);
    s.q_pairs = arena.allocate<char>(2 * num_rows * dim);
    s.dout_pairs = arena.allocate<char>(2 * num_rows * dim);
    s.scores = arena.allocate<float>(kStepKeys * num_rows);
    s.dscores = arena.allocate<float>(kStepKeys * num_rows);
    s.probs = arena.allocate<char>(2 * kStepKeys * num_rows);
    s.dscores_bf16 = arena.allocate<char>(2 * kStepKeys * num_rows);
    s.dscore_pairs = arena.allocate<char>(2 * kStepKeys * num_rows);
    s.dq = arena.allocate<float>(num_rows * dim);
    s.lse = arena.allocate<float>(num_rows);
    s.delta = arena.allocate<float>(num_rows);
    for (char*& local : s.local) local = arena.allocate<char>(4 * kStepKeys * dim);
    return s;
  }
};

// Gathers the packed rows and their output gradients, and computes lse, delta and the gradient of the sinks.
template <class T, class Math>
void prepare(const AttentionBackwardParams& b, const PackedRows& packed, const Scratch& s, float* dsinks) {
  const AttentionParams& p = b.forward;
  const int num_rows = packed.padded_count(), words = words_of<Math>(p.head_dim);
  gather<T, Math>(b.grad_out, p.head_dim, packed, s.dout_rows, s.dout_columns);
  gather<T, Math>(b.out, p.head_dim, packed, s.q_rows, s.q_columns);
  for (int row_tile = 0; row_tile < packed.row_tiles; ++row_tile) {
    // Summed in the same order as dout . v, so that for a row with a single key the two are equal to the last bit.
    Vec sum = zero_vec();
    for (int word = 0; word < words; ++word) {
      const int64_t at = int64_t{4} * word * num_rows + 64 * row_tile;
      sum = Math::multiply_add(load_words(s.q_columns + at), load_words(s.dout_columns + at), sum);
    }
    store(s.delta + kLanes * row_tile, sum);
  }
  gather<T, Math>(p.q, p.head_dim, packed, s.q_rows, s.q_columns);
  // Padding, and fully masked rows: exp2(s - inf) makes their probabilities 0.
  for (int packed_row = 0; packed_row < num_rows; ++packed_row) s.lse[packed_row] = kInfinity;
  for (int packed_row = packed.count; packed_row < num_rows; ++packed_row) s.delta[packed_row] = 0;
  packed.for_each([&](int32_t packed_row, int64_t row, int32_t head) {
    const int64_t index = row * p.heads + head;
    if (b.lse[index] == -kInfinity) {
      s.delta[packed_row] = 0;
      return;
    }
    s.lse[packed_row] = b.lse[index] * kLog2e;
    s.delta[packed_row] -= b.grad_lse[index];
    if (dsinks) {
      const Vec prob = exp2_bounded(broadcast(p.sinks[head] * kLog2e - s.lse[packed_row]));
      dsinks[head] -= lane_of(prob, 0) * s.delta[packed_row];
    }
  });
}

// Whether lse and delta of the packed rows are finite; lse is inf for a fully masked row.
inline bool packed_rows_finite(const Scratch& s, const PackedRows& packed) {
  bool finite = true;
  for (int packed_row = 0; packed_row < packed.count; ++packed_row) {
    finite &= s.lse[packed_row] == s.lse[packed_row] && s.delta[packed_row] - s.delta[packed_row] == 0;
  }
  return finite;
}

struct ScoreTransform {
  float scale, softcap;  // softcap 0: none
  bool prescaled;        // whether scale and softcap are applied before the softmax
  float to_log2;
};

// Turns the scores and dout . v of one key and one row tile into p and ds.
REFRAG_INLINE void score_gradient(const ScoreTransform& transform, const Vec score, const Vec lse, const Vec delta,
                                  Vec& prob, Vec& dscore) {
  prob = exp2_bounded(fma(score, broadcast(transform.to_log2), zero_vec() - lse));
  dscore = prob * (dscore - delta) * broadcast(transform.scale);
  if (transform.softcap > 0) {
    const Vec ratio = score * broadcast(1.0f / transform.softcap);
    // A masked score is -inf; its probability is 0, and so must this be.
    dscore = dscore * (broadcast(1.0f) - min(ratio * ratio, broadcast(1.0f)));
  }
}

template <class Math>
void score_gradients(const ScoreTransform& transform, const Scratch& s, int row_tile, int num_rows, int keys) {
  const int column = kLanes * row_tile;
  const Vec lse = load(s.lse + column), delta = load(s.delta + column);
  if constexpr (Math::kPairs) {
#if defined(__AVX512BF16__)
    for (int key = 0; key < keys; key += 2) {
      Vec prob[2], dscore[2];
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const int64_t at = int64_t{key + i} * num_rows + column;
        dscore[i] = load(s.dscores + at);
        score_gradient(transform, load(s.scores + at), lse, delta, prob[i], dscore[i]);
        store(reinterpret_cast<BFloat16*>(s.probs) + at, prob[i]);
        store(reinterpret_cast<BFloat16*>(s.dscores_bf16) + at, dscore[i]);
      }
      store_pairs(s.dscore_pairs + 4 * (int64_t{key / 2} * num_rows + column), dscore[0], dscore[1]);
    }
#endif
  } else {
    for (int key = 0; key < keys; ++key) {
      const int64_t at = int64_t{key} * num_rows + column;
      Vec prob, dscore = load(s.dscores + at);
      score_gradient(transform, load(s.scores + at), lse, delta, prob, dscore);
      store(s.scores + at, prob);
      store(s.dscores + at, dscore);
    }
  }
}

// One element of p or ds, as stored by score_gradients.
template <class Math>
float element_at(const char* elements, int64_t at) {
  if constexpr (Math::kPairs) {
    return lane_of(load_partial(reinterpret_cast<const BFloat16*>(elements) + at, 1), 0);
  } else {
    return reinterpret_cast<const float*>(elements)[at];
  }
}

// Accumulates dq, dk and dv of a segment with non-finite elements, one (row, key) pair at a time. `first` is the index
// of the segment's first key in p and ds.
template <class T, class Math>
void accumulate_nonfinite(const AttentionBackwardParams& b, const PackedRows& packed, const Scratch& s, int32_t kv_head,
                          const Segment& segment, const char* probs, const char* dscores, int first, float* dk,
                          float* dv) {
  const AttentionParams& p = b.forward;
  const int num_rows = packed.padded_count(), padded_dim = p.padded_head_dim();
  for_each_visible(segment, packed, [&](int key, int32_t packed_row, int64_t row, int32_t head) {
    const int64_t at = int64_t{first + key} * num_rows + packed_row;
    const float prob = element_at<Math>(probs, at), dscore = element_at<Math>(dscores, at);
    add_row<T>(p.k, segment.first_key + key, kv_head, p.head_dim, dscore, s.dq + int64_t{packed_row} * padded_dim);
    add_row<T>(p.q, row, head, p.head_dim, dscore, dk + key * padded_dim);
    add_row<T>(b.grad_out, row, head, p.head_dim, prob, dv + key * padded_dim);
  });
}

template <class T, class Math>
void backward_rows(const AttentionBackwardParams& b, const BlockRange& range, int32_t block, int32_t kv_head,
                   const PackedRows& packed, const Scratch& s) {
  const AttentionParams& p = b.forward;
  const int num_rows = packed.padded_count(), padded_dim = p.padded_head_dim(), words = words_of<Math>(p.head_dim);
  constexpr int kKeysPerWord = Math::kPairs ? 2 : 1;
  constexpr Layout kCols = Math::kPairs ? Layout::bf16_pairs : Layout::padded_rows;
  constexpr int64_t kElementBytes = Math::kPairs ? 2 : 4;
  const char *queries = s.q_rows, *dout = s.dout_rows;
  if constexpr (Math::kPairs) {
    const int64_t row_bytes = (words + 15) / 16 * 64;
    pack_pairs(s.q_rows, row_bytes, num_rows, p.head_dim, s.q_pairs);
    pack_pairs(s.dout_rows, row_bytes, num_rows, p.head_dim, s.dout_pairs);
    queries = s.q_pairs;
    dout = s.dout_pairs;
  }
  std::memset(s.dq, 0, sizeof(float) * num_rows * padded_dim);
  const bool prescaled = scales_before_softmax(p);
  const ScoreTransform transform{p.scale, p.softcap, prescaled, softmax_scale(p) * kLog2e};
  const Span q_columns{s.q_columns, words}, dout_columns{s.dout_columns, words};
  // A row that attends to NaN or inf has NaN in lse or delta, and so also in its products with masked keys.
  const bool rows_are_finite = packed_rows_finite(s, packed);
  const Span q_span{queries, num_rows / kKeysPerWord}, dout_span{dout, num_rows / kKeysPerWord};

  SegmentIterator<kStepKeys> iterator(p.plan, block);
  while (const int count = iterator.next()) {
    char* local[3] = {s.local[0], s.local[1], s.local[2]};
    Span key_spans[SegmentIterator<kStepKeys>::kMaxSegments];
    int first_keys[SegmentIterator<kStepKeys>::kMaxSegments];
    bool nonfinite[SegmentIterator<kStepKeys>::kMaxSegments];
    bool any_nonfinite = false;
    int keys = 0;
    for (int i = 0; i < count; ++i) {
      const Segment& segment = iterator.segments[i];
      const char* k =
          operand_rows<T, Layout::padded_rows>(p.k_rows, p.k, p.plan, segment, p.head_dim, kv_head, local[0]);
      const char* v =
          operand_rows<T, Layout::padded_rows>(p.v_rows, p.v, p.plan, segment, p.head_dim, kv_head, local[1]);
      const char* k_cols = operand_rows<T, kCols>(p.k_cols, p.k, p.plan, segment, p.head_dim, kv_head, local[2]);
      float *scores = s.scores + int64_t{keys} * num_rows, *dscores = s.dscores + int64_t{keys} * num_rows;
      multiply<Math, Order::row_major, Epilogue::store>(
          {k, p.k_rows.row_bytes, &q_columns, 1, 4 * int64_t{num_rows}, scores, num_rows, nullptr}, segment.count,
          packed.row_tiles);
      multiply<Math, Order::row_major, Epilogue::store>(
          {v, p.v_rows.row_bytes, &dout_columns, 1, 4 * int64_t{num_rows}, dscores, num_rows, nullptr}, segment.count,
          packed.row_tiles);
      const int64_t elements = int64_t{segment.count} * num_rows;
      nonfinite[i] =
          segment.bits && !(rows_are_finite && all_finite(scores, elements) && all_finite(dscores, elements));
      any_nonfinite |= nonfinite[i];
      if (prescaled) scale_scores(scores, elements, p.scale, p.softcap);
      if (segment.bits) apply_mask(segment.bits, packed, segment.count, scores);
      first_keys[i] = keys;
      keys += segment.count;
      if (keys % kKeysPerWord) {
        for (int x = 0; x < num_rows; x += kLanes) {
          store(s.scores + int64_t{keys} * num_rows + x, broadcast(-kInfinity));
          store(s.dscores + int64_t{keys} * num_rows + x, zero_vec());
        }
        ++keys;
      }
      key_spans[i] = {k_cols, (segment.count + kKeysPerWord - 1) / kKeysPerWord};
    }
    for (int row_tile = 0; row_tile < packed.row_tiles; ++row_tile) {
      score_gradients<Math>(transform, s, row_tile, num_rows, keys);
    }
    const char* dscores_by_key = Math::kPairs ? s.dscore_pairs : reinterpret_cast<const char*>(s.dscores);
    const auto add_dq = [&](int first, const Span* spans, int num_spans) {
      multiply<Math, Order::col_major, Epilogue::accumulate>(
          {dscores_by_key + int64_t{4} * (first / kKeysPerWord) * num_rows, 4 * int64_t{num_rows}, spans, num_spans,
           kKeysPerWord * p.k_cols.row_bytes, s.dq, padded_dim, nullptr},
          num_rows, padded_dim / kLanes);
    };
    if (!any_nonfinite) add_dq(0, key_spans, count);
    const char* probs = Math::kPairs ? s.probs : reinterpret_cast<const char*>(s.scores);
    const char* dscores = Math::kPairs ? s.dscores_bf16 : reinterpret_cast<const char*>(s.dscores);
    const int64_t stride = kElementBytes * num_rows;
    for (int i = 0; i < count; ++i) {
      const Segment& segment = iterator.segments[i];
      const int32_t tile = p.plan.kv_row_block[segment.first_key] - range.first_tile;
      const int64_t accum_tile = kv_head * b.num_accum_tiles + range.first_accum_tile + range.accum_tiles[tile];
      float *dk = b.dk_accum + accum_tile * kTile * padded_dim, *dv = b.dv_accum + accum_tile * kTile * padded_dim;
      if (nonfinite[i]) {
        accumulate_nonfinite<T, Math>(b, packed, s, kv_head, segment, probs, dscores, first_keys[i], dk, dv);
        continue;
      }
      if (any_nonfinite) add_dq(first_keys[i], key_spans + i, 1);
      multiply<Math, Order::row_major, Epilogue::accumulate>(
          {probs + first_keys[i] * stride, stride, &dout_span, 1, 4 * int64_t{padded_dim}, dv, padded_dim, nullptr},
          segment.count, padded_dim / kLanes);
      multiply<Math, Order::row_major, Epilogue::accumulate>(
          {dscores + first_keys[i] * stride, stride, &q_span, 1, 4 * int64_t{padded_dim}, dk, padded_dim, nullptr},
          segment.count, padded_dim / kLanes);
    }
  }
  packed.for_each([&](int32_t packed_row, int64_t row, int32_t head) {
    T* to = reinterpret_cast<T*>(b.dq) + (row * p.heads + head) * p.head_dim;
    const float* acc = s.dq + int64_t{packed_row} * padded_dim;
    int d = 0;
    for (; d + kLanes <= p.head_dim; d += kLanes) store(to + d, load(acc + d));
    if (d < p.head_dim) store_partial(to + d, load(acc + d), p.head_dim - d);
  });
}

template <class T, class Math>
void backward(const AttentionBackwardParams& b, const BlockRange& range, int32_t kv_head, char* memory) {
  const AttentionParams& p = b.forward;
  Arena arena{memory};
  const Scratch s = Scratch::allocate(arena, p);
  const int64_t tile_floats = int64_t{kTile} * p.padded_head_dim();
  const int64_t first = (kv_head * b.num_accum_tiles + range.first_accum_tile) * tile_floats;
  std::memset(b.dk_accum + first, 0, sizeof(float) * range.num_accum_tiles * tile_floats);
  std::memset(b.dv_accum + first, 0, sizeof(float) * range.num_accum_tiles * tile_floats);
  for (int32_t block = range.first_block; block < range.last_block; ++block) {
    float* dsinks = b.dsinks ? b.dsinks + int64_t{block} * p.heads : nullptr;
    if (dsinks) std::memset(dsinks + kv_head * p.group(), 0, sizeof(float) * p.group());
    for (int32_t group = 0; group < p.row_tile_groups(); ++group) {
      const PackedRows packed = packed_rows_of(p, block, kv_head, group);
      if (packed.row_tiles == 0) continue;
      prepare<T, Math>(b, packed, s, dsinks);
      backward_rows<T, Math>(b, range, block, kv_head, packed, s);
    }
  }
}

template <class T>
void reduce_accum_tiles(const AttentionBackwardParams& b, const float* acc, int32_t tile, int32_t head,
                        char* gradient) {
  const AttentionParams& p = b.forward;
  const int32_t* kv_block = p.plan.kv_blocks + 4 * int64_t{tile};
  const int32_t *first = b.accum_lists + b.accum_offsets[tile], *last = b.accum_lists + b.accum_offsets[tile + 1];
  const int64_t padded_dim = p.padded_head_dim();
  for (int row = 0; row < kv_block[1]; ++row) {
    T* to = reinterpret_cast<T*>(gradient) + (int64_t{kv_block[0] + row} * p.kv_heads + head) * p.head_dim;
    for (int d = 0; d < p.head_dim; d += kLanes) {
      Vec sum = zero_vec();
      for (const int32_t* accum_tile = first; accum_tile < last; ++accum_tile) {
        sum = sum + load(acc + ((head * b.num_accum_tiles + *accum_tile) * kTile + row) * padded_dim + d);
      }
      if (p.head_dim - d >= kLanes) {
        store(to + d, sum);
      } else {
        store_partial(to + d, sum, p.head_dim - d);
      }
    }
  }
}

}  // namespace

int64_t attention_backward_scratch(const AttentionBackwardParams& params) {
  Arena arena{nullptr};
  Scratch::allocate(arena, params.forward);
  return arena.used;
}

void attention_backward(const AttentionBackwardParams& params, const BlockRange& range, int32_t kv_head,
                        char* scratch) {
  with_types(params.forward.element, [&](auto scalar, auto math) {
    backward<decltype(scalar), decltype(math)>(params, range, kv_head, scratch);
  });
}

void attention_backward_reduce(const AttentionBackwardParams& params, int32_t begin, int32_t end) {
  with_types(params.forward.element, [&](auto scalar, auto) {
    for (int32_t tile = begin; tile < end; ++tile) {
      for (int32_t head = 0; head < params.forward.kv_heads; ++head) {
        reduce_accum_tiles<decltype(scalar)>(params, params.dk_accum, tile, head, params.dk);
        reduce_accum_tiles<decltype(scalar)>(params, params.dv_accum, tile, head, params.dv);
      }
    }
  });
}

}  // namespace refrag::cpu::REFRAG_ISA
