// Micro-kernels of paged attention: scores, softmax and output accumulation of a block of keys, for the query rows that
// share a key/value head.
//
// Keys and values are given by one byte offset each, so that pages need no copy.
#pragma once

#include "cpu/kernels/transpose.h"
#include "cpu/paged_kernels.h"
#include "cpu/simd_math.h"

namespace refrag::cpu::REFRAG_ISA {
namespace {

constexpr int kTile = 16;
constexpr int kBlockKeys = 256;  // keys per online-softmax update
constexpr int kTiles = kBlockKeys / kTile;
constexpr int kScoreStride = kBlockKeys + kTile;  // not a power of two, so that rows don't share few cache sets

constexpr int kDotKeys = 4;  // keys whose horizontal sums are computed together

// Rows and vectors of a micro-tile. Accumulators take 24 of 32 registers with AVX-512, and 12 of 16 with AVX2.
constexpr int kMicroTileRows = 6;
#if defined(__AVX512F__)
constexpr int kDotRows = 4;
constexpr int kScoreVecs = 4;
constexpr int kValueVecs = 4;
#else
constexpr int kDotRows = 1;
constexpr int kScoreVecs = 1;
constexpr int kValueVecs = 1;
#endif

inline int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

// to[0..3] = the horizontal sums of a, b, c and d.
REFRAG_INLINE void store_lane_sums(float* to, const Vec a, const Vec b, const Vec c, const Vec d) {
#if defined(__AVX512F__)
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a.part[0], b.part[0]), _mm512_unpackhi_ps(a.part[0], b.part[0]));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c.part[0], d.part[0]), _mm512_unpackhi_ps(c.part[0], d.part[0]));
  const __m512 sums = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(sums), _mm512_extractf32x8_ps(sums, 1));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#elif defined(__AVX2__)
  const __m256 ab = _mm256_hadd_ps(a.part[0] + a.part[1], b.part[0] + b.part[1]);
  const __m256 cd = _mm256_hadd_ps(c.part[0] + c.part[1], d.part[0] + d.part[1]);
  const __m256 sums = _mm256_hadd_ps(ab, cd);
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
#else
  const Vec all[4] = {a, b, c, d};
  for (int i = 0; i < 4; ++i) {
    const PartF sum = (all[i].part[0] + all[i].part[1]) + (all[i].part[2] + all[i].part[3]);
    to[i] = (sum[0] + sum[2]) + (sum[1] + sum[3]);
  }
#endif
}

// sums[i] = q[i] . key[i], for four rows of q, `q_stride` apart; with kSame, all four use key[0].
template <class T, bool kSame>
REFRAG_INLINE void dot_four(const float* q, int q_stride, const T* const (&key)[4], int head_dim, float* sums) {
  Vec sum[4] = {zero_vec(), zero_vec(), zero_vec(), zero_vec()};
  int d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) {
    Vec elements = load(key[0] + d);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      if (!kSame && i > 0) elements = load(key[i] + d);
      sum[i] = fma(elements, load(q + i * q_stride + d), sum[i]);
    }
  }
  if (d < head_dim) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      sum[i] = fma(load_partial(key[kSame ? 0 : i] + d, head_dim - d), load(q + i * q_stride + d), sum[i]);
    }
  }
  store_lane_sums(sums, sum[0], sum[1], sum[2], sum[3]);
}

// scores[r][c] = q[r] . key c, for kDotKeys keys.
template <class T, int kRows>
void dot_rows(const float* q, int q_stride, const char* k, const int64_t* at, int head_dim, float* scores) {
  const T* keys[kDotKeys];
#pragma GCC unroll 4
  for (int i = 0; i < kDotKeys; ++i) keys[i] = reinterpret_cast<const T*>(k + at[i]);
  Vec sum[kRows][kDotKeys];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < kDotKeys; ++i) sum[r][i] = zero_vec();
  }
  int d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) {
    Vec key[kDotKeys];
#pragma GCC unroll 4
    for (int i = 0; i < kDotKeys; ++i) key[i] = load(keys[i] + d);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Vec row = load(q + r * q_stride + d);
#pragma GCC unroll 4
      for (int i = 0; i < kDotKeys; ++i) sum[r][i] = fma(row, key[i], sum[r][i]);
    }
  }
  if (d < head_dim) {
#pragma GCC unroll 4
    for (int i = 0; i < kDotKeys; ++i) {
      const Vec key = load_partial(keys[i] + d, head_dim - d);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) sum[r][i] = fma(load(q + r * q_stride + d), key, sum[r][i]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    store_lane_sums(scores + r * kScoreStride, sum[r][0], sum[r][1], sum[r][2], sum[r][3]);
  }
}

template <class T>
void score_small_m(const float* q, int q_stride, int rows, const char* k, const int64_t* at, int head_dim,
                   float* scores) {
  int r = 0;
  for (; r + kDotRows <= rows; r += kDotRows) {
    dot_rows<T, kDotRows>(q + r * q_stride, q_stride, k, at, head_dim, scores + r * kScoreStride);
  }
  q += r * q_stride;
  scores += r * kScoreStride;
  if constexpr (kDotRows > 1) {
    switch (rows - r) {
      case 3: return dot_rows<T, 3>(q, q_stride, k, at, head_dim, scores);
      case 2: return dot_rows<T, 2>(q, q_stride, k, at, head_dim, scores);
      case 1: return dot_rows<T, 1>(q, q_stride, k, at, head_dim, scores);
    }
  }
}

// Transposes tiles of keys to [tiles, stride, 16] float32.
template <class T>
void pack_keys(const char* k, const int64_t* at, int tiles, int head_dim, int stride, float* packed) {
  for (int tile = 0; tile < tiles; ++tile, at += kTile, packed += kTile * stride) {
    for (int d = 0; d < head_dim; d += kLanes) {
      Vec rows[kTile];
#pragma GCC unroll 16
      for (int i = 0; i < kTile; ++i) {
        const T* key = reinterpret_cast<const T*>(k + at[i]) + d;
        rows[i] = d + kLanes <= head_dim ? load(key) : load_partial(key, head_dim - d);
      }
      transpose_tile(rows);
#pragma GCC unroll 16
      for (int i = 0; i < kTile; ++i) store(packed + kTile * (d + i), rows[i]);
    }
  }
}

// scores[r][16 t + c] = q[r] . key c of packed tile t, for kMicroTileRows rows.
template <int kCount>
void score_packed(const float* q, int q_stride, const float* packed, int stride, int head_dim, float* scores) {
  Vec sum[kMicroTileRows][kCount];
#pragma GCC unroll 6
  for (int r = 0; r < kMicroTileRows; ++r) {
#pragma GCC unroll 4
    for (int t = 0; t < kCount; ++t) sum[r][t] = zero_vec();
  }
  for (int d = 0; d < head_dim; ++d) {
    Vec key[kCount];
#pragma GCC unroll 4
    for (int t = 0; t < kCount; ++t) key[t] = load(packed + kTile * (t * stride + d));
#pragma GCC unroll 6
    for (int r = 0; r < kMicroTileRows; ++r) {
      const Vec row = broadcast(q[r * q_stride + d]);
#pragma GCC unroll 4
      for (int t = 0; t < kCount; ++t) sum[r][t] = fma(row, key[t], sum[r][t]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kMicroTileRows; ++r) {
#pragma GCC unroll 4
    for (int t = 0; t < kCount; ++t) store(scores + r * kScoreStride + kTile * t, sum[r][t]);
  }
}

// `rows` is a multiple of kMicroTileRows, `tiles` at most kScoreVecs.
inline void score_large_m(const float* q, int q_stride, int rows, const float* packed, int tiles, int head_dim,
                          float* scores) {
  for (int r = 0; r < rows;
       r += kMicroTileRows, q += kMicroTileRows * q_stride, scores += kMicroTileRows * kScoreStride) {
    if constexpr (kScoreVecs > 1) {
      switch (tiles) {
        case 4: score_packed<4>(q, q_stride, packed, q_stride, head_dim, scores); continue;
        case 3: score_packed<3>(q, q_stride, packed, q_stride, head_dim, scores); continue;
        case 2: score_packed<2>(q, q_stride, packed, q_stride, head_dim, scores); continue;
      }
    }
    score_packed<1>(q, q_stride, packed, q_stride, head_dim, scores);
  }
}

// acc[r][16 i ...] += probs[r][c] * value c, over `keys` keys and kVecs vectors; with kPartial, the last vector has 8
// elements.
template <class T, int kRows, int kVecs, bool kPartial>
void accumulate_micro_tile(const float* probs, const char* v, const int64_t* at, int keys, float* acc, int stride) {
  Vec sum[kRows][kVecs];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < kVecs; ++i) sum[r][i] = load(acc + r * stride + kLanes * i);
  }
  for (int c = 0; c < keys; ++c) {
    const T* key = reinterpret_cast<const T*>(v + at[c]);
    Vec value[kVecs];
#pragma GCC unroll 4
    for (int i = 0; i < kVecs; ++i) {
      value[i] = kPartial && i == kVecs - 1 ? load_partial(key + kLanes * i, 8) : load(key + kLanes * i);
    }
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const Vec prob = broadcast(probs[r * kScoreStride + c]);
#pragma GCC unroll 4
      for (int i = 0; i < kVecs; ++i) sum[r][i] = fma(prob, value[i], sum[r][i]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < kVecs; ++i) store(acc + r * stride + kLanes * i, sum[r][i]);
  }
}

// The same, over all `head_dim` elements of a value.
template <class T, int kRows>
void accumulate_rows(const float* probs, const char* v, const int64_t* at, int keys, int head_dim, float* acc,
                     int stride) {
  int d = 0;
  for (; d + kValueVecs * kLanes <= head_dim; d += kValueVecs * kLanes) {
    accumulate_micro_tile<T, kRows, kValueVecs, false>(probs, v + sizeof(T) * d, at, keys, acc + d, stride);
  }
  if constexpr (kValueVecs > 2) {
    if (d + 2 * kLanes <= head_dim) {
      accumulate_micro_tile<T, kRows, 2, false>(probs, v + sizeof(T) * d, at, keys, acc + d, stride);
      d += 2 * kLanes;
    }
  }
  if constexpr (kValueVecs > 1) {
    if (d + kLanes <= head_dim) {
      accumulate_micro_tile<T, kRows, 1, false>(probs, v + sizeof(T) * d, at, keys, acc + d, stride);
      d += kLanes;
    }
  }
  if (d < head_dim) accumulate_micro_tile<T, kRows, 1, true>(probs, v + sizeof(T) * d, at, keys, acc + d, stride);
}

template <class T>
void accumulate_values(const float* probs, int rows, const char* v, const int64_t* at, int keys, int head_dim,
                       float* acc, int stride) {
  for (; rows >= kMicroTileRows;
       rows -= kMicroTileRows, probs += kMicroTileRows * kScoreStride, acc += kMicroTileRows * stride) {
    accumulate_rows<T, kMicroTileRows>(probs, v, at, keys, head_dim, acc, stride);
  }
  switch (rows) {
    case 5: return accumulate_rows<T, 5>(probs, v, at, keys, head_dim, acc, stride);
    case 4: return accumulate_rows<T, 4>(probs, v, at, keys, head_dim, acc, stride);
    case 3: return accumulate_rows<T, 3>(probs, v, at, keys, head_dim, acc, stride);
    case 2: return accumulate_rows<T, 2>(probs, v, at, keys, head_dim, acc, stride);
    case 1: return accumulate_rows<T, 1>(probs, v, at, keys, head_dim, acc, stride);
  }
}

// Converts values to float32 [keys, stride], once for all rows of large M.
template <class T>
void unpack_values(const char* v, const int64_t* at, int keys, int head_dim, int stride, float* values) {
  for (int c = 0; c < keys; ++c, values += stride) {
    const T* key = reinterpret_cast<const T*>(v + at[c]);
    for (int d = 0; d < head_dim; d += kLanes) {
      store(values + d, d + kLanes <= head_dim ? load(key + d) : load_partial(key + d, head_dim - d));
    }
  }
}

// Online-softmax state of one row: the maximum, and the sum of exp(score - max).
struct RowSoftmax {
  float max, sum;
};

inline bool has_nan(const float* scores, int tiles) {
  for (int i = 0; i < kTile * tiles; ++i) {
    if (scores[i] != scores[i]) return true;
  }
  return false;
}

// Replaces the scores of one row by exp(score - max), and by 0 where `bits` (one word per 16 keys) mask a key. Returns
// the factor by which to rescale the accumulator.
inline float softmax_row(float* scores, int tiles, const uint16_t* bits, float softcap, RowSoftmax& softmax) {
  const Vec minus_infinity = broadcast(-__builtin_inff());
  static constexpr int32_t kLaneBits[kLanes] = {1 << 0, 1 << 1, 1 << 2,  1 << 3,  1 << 4,  1 << 5,  1 << 6,  1 << 7,
                                                1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15};
  const VecI lane_bits = load_int(kLaneBits);
  Vec lane_max = minus_infinity;
  for (int tile = 0; tile < tiles; ++tile) {
    Vec score = load(scores + kTile * tile);
    if (softcap != 0) score = broadcast(softcap) * tanh(score / broadcast(softcap));
    if (bits[tile] != 0xffff) score = select(any_bit(broadcast_int(bits[tile]), lane_bits), score, minus_infinity);
    if (softcap != 0 || bits[tile] != 0xffff) store(scores + kTile * tile, score);
    lane_max = max(lane_max, score);
  }
  float block_max = reduce_max(lane_max);
  if (block_max == -__builtin_inff()) {
    if (!has_nan(scores, tiles)) {
      for (int tile = 0; tile < tiles; ++tile) store(scores + kTile * tile, zero_vec());
      return 1.0f;
    }
    // max() may drop a NaN; -inf would make the row look fully masked.
    block_max = __builtin_nanf("");
  }
  const float maximum = softmax.max > block_max ? softmax.max : block_max;
  Vec sum = zero_vec();
  for (int tile = 0; tile < tiles; ++tile) {
    const Vec prob = exp(load(scores + kTile * tile) - broadcast(maximum));
    sum = sum + prob;
    store(scores + kTile * tile, prob);
  }
  const float factor = __builtin_expf(softmax.max - maximum);
  softmax.sum = softmax.sum * factor + reduce_add(sum);
  softmax.max = maximum;
  return factor;
}

}  // namespace
}  // namespace refrag::cpu::REFRAG_ISA
