// One block of keys against the query rows that share a key/value head: scores, and weighted sums of values.
//
// Keys and values are given as one offset a key, in bytes, so that pages need no copy.
#pragma once

#include "cpu/kernels/transpose.h"
#include "cpu/paged_kernels.h"
#include "cpu/simd_math.h"

namespace refrag::cpu::REFRAG_ISA {
namespace {

constexpr int kTile = 16;
constexpr int kBlockKeys = 256;                 // scored at a time: one maximum and one rescaling for all of them
constexpr int kTiles = kBlockKeys / kTile;
constexpr int kScoreStride = kBlockKeys + kTile;  // not a power of two: rows would share few cache sets

constexpr int kDotKeys = 4;  // whose products with a row are summed over the lanes together

// Rows and registers of a register tile: 24 sums of 32 registers with AVX-512, 12 of 16 with AVX2.
constexpr int kRowTile = 6;
#if defined(__AVX512F__)
constexpr int kDotRows = 4;
constexpr int kTilesAtOnce = 4;
constexpr int kVecsAtOnce = 4;
#else
constexpr int kDotRows = 1;
constexpr int kTilesAtOnce = 1;
constexpr int kVecsAtOnce = 1;
#endif

inline int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

// to[0..3] = the sums of the lanes of a, b, c and d.
REFRAG_INLINE void store_sums(float* to, const Vec a, const Vec b, const Vec c, const Vec d) {
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

// sums[i] = q[i] . key[i], for four rows of q that lie `q_stride` apart; kSame: all four meet key[0].
template <class T, bool kSame>
REFRAG_INLINE void dot_four(const float* q, int q_stride, const T* const (&key)[4], int dim, float* sums) {
  Vec sum[4] = {zero_vec(), zero_vec(), zero_vec(), zero_vec()};
  int d = 0;
  for (; d + kLanes <= dim; d += kLanes) {
    Vec numbers = load(key[0] + d);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      if (!kSame && i > 0) numbers = load(key[i] + d);
      sum[i] = fma(numbers, load(q + i * q_stride + d), sum[i]);
    }
  }
  if (d < dim) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      sum[i] = fma(load_partial(key[kSame ? 0 : i] + d, dim - d), load(q + i * q_stride + d), sum[i]);
    }
  }
  store_sums(sums, sum[0], sum[1], sum[2], sum[3]);
}

// scores[r][c] = q[r] . key c for kDotKeys keys.
template <class T, int kRows>
void dot_rows(const float* q, int q_stride, const char* k, const int64_t* at, int dim, float* scores) {
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
  for (; d + kLanes <= dim; d += kLanes) {
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
  if (d < dim) {
#pragma GCC unroll 4
    for (int i = 0; i < kDotKeys; ++i) {
      const Vec key = load_partial(keys[i] + d, dim - d);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) sum[r][i] = fma(load(q + r * q_stride + d), key, sum[r][i]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) store_sums(scores + r * kScoreStride, sum[r][0], sum[r][1], sum[r][2], sum[r][3]);
}

template <class T>
void score_few_rows(const float* q, int q_stride, int rows, const char* k, const int64_t* at, int dim, float* scores) {
  int r = 0;
  for (; r + kDotRows <= rows; r += kDotRows) {
    dot_rows<T, kDotRows>(q + r * q_stride, q_stride, k, at, dim, scores + r * kScoreStride);
  }
  q += r * q_stride;
  scores += r * kScoreStride;
  if constexpr (kDotRows > 1) {
    switch (rows - r) {
      case 3: return dot_rows<T, 3>(q, q_stride, k, at, dim, scores);
      case 2: return dot_rows<T, 2>(q, q_stride, k, at, dim, scores);
      case 1: return dot_rows<T, 1>(q, q_stride, k, at, dim, scores);
    }
  }
}

// Transposes tiles of keys to [tiles, stride, 16] float32.
template <class T>
void pack_keys(const char* k, const int64_t* at, int tiles, int dim, int stride, float* packed) {
  for (int tile = 0; tile < tiles; ++tile, at += kTile, packed += kTile * stride) {
    for (int d = 0; d < dim; d += kLanes) {
      Vec rows[kTile];
#pragma GCC unroll 16
      for (int i = 0; i < kTile; ++i) {
        const T* key = reinterpret_cast<const T*>(k + at[i]) + d;
        rows[i] = d + kLanes <= dim ? load(key) : load_partial(key, dim - d);
      }
      transpose_tile(rows);
#pragma GCC unroll 16
      for (int i = 0; i < kTile; ++i) store(packed + kTile * (d + i), rows[i]);
    }
  }
}

// scores[r][16 t + c] = q[r] . key c of packed tile t, for kRowTile rows.
template <int kCount>
void score_packed(const float* q, int q_stride, const float* packed, int stride, int dim, float* scores) {
  Vec sum[kRowTile][kCount];
#pragma GCC unroll 6
  for (int r = 0; r < kRowTile; ++r) {
#pragma GCC unroll 4
    for (int t = 0; t < kCount; ++t) sum[r][t] = zero_vec();
  }
  for (int d = 0; d < dim; ++d) {
    Vec key[kCount];
#pragma GCC unroll 4
    for (int t = 0; t < kCount; ++t) key[t] = load(packed + kTile * (t * stride + d));
#pragma GCC unroll 6
    for (int r = 0; r < kRowTile; ++r) {
      const Vec row = broadcast(q[r * q_stride + d]);
#pragma GCC unroll 4
      for (int t = 0; t < kCount; ++t) sum[r][t] = fma(row, key[t], sum[r][t]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRowTile; ++r) {
#pragma GCC unroll 4
    for (int t = 0; t < kCount; ++t) store(scores + r * kScoreStride + kTile * t, sum[r][t]);
  }
}

// `rows` is a multiple of kRowTile, `tiles` at most kTilesAtOnce.
inline void score_many_rows(const float* q, int q_stride, int rows, const float* packed, int tiles, int dim,
                            float* scores) {
  for (int r = 0; r < rows; r += kRowTile, q += kRowTile * q_stride, scores += kRowTile * kScoreStride) {
    if constexpr (kTilesAtOnce > 1) {
      switch (tiles) {
        case 4: score_packed<4>(q, q_stride, packed, q_stride, dim, scores); continue;
        case 3: score_packed<3>(q, q_stride, packed, q_stride, dim, scores); continue;
        case 2: score_packed<2>(q, q_stride, packed, q_stride, dim, scores); continue;
      }
    }
    score_packed<1>(q, q_stride, packed, q_stride, dim, scores);
  }
}

// sums[r][16 i .. ] += weights[r][c] * value c, over `keys` keys and kVecs registers; kPartial: only 8 numbers of the last.
template <class T, int kRows, int kVecs, bool kPartial>
void add_values(const float* weights, const char* v, const int64_t* at, int keys, float* sums, int stride) {
  Vec sum[kRows][kVecs];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < kVecs; ++i) sum[r][i] = load(sums + r * stride + kLanes * i);
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
      const Vec weight = broadcast(weights[r * kScoreStride + c]);
#pragma GCC unroll 4
      for (int i = 0; i < kVecs; ++i) sum[r][i] = fma(weight, value[i], sum[r][i]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < kVecs; ++i) store(sums + r * stride + kLanes * i, sum[r][i]);
  }
}

// The same over all of a value's `dim` numbers.
template <class T, int kRows>
void add_values_rows(const float* weights, const char* v, const int64_t* at, int keys, int dim, float* sums,
                     int stride) {
  int d = 0;
  for (; d + kVecsAtOnce * kLanes <= dim; d += kVecsAtOnce * kLanes) {
    add_values<T, kRows, kVecsAtOnce, false>(weights, v + sizeof(T) * d, at, keys, sums + d, stride);
  }
  if constexpr (kVecsAtOnce > 2) {
    if (d + 2 * kLanes <= dim) {
      add_values<T, kRows, 2, false>(weights, v + sizeof(T) * d, at, keys, sums + d, stride);
      d += 2 * kLanes;
    }
  }
  if constexpr (kVecsAtOnce > 1) {
    if (d + kLanes <= dim) {
      add_values<T, kRows, 1, false>(weights, v + sizeof(T) * d, at, keys, sums + d, stride);
      d += kLanes;
    }
  }
  if (d < dim) add_values<T, kRows, 1, true>(weights, v + sizeof(T) * d, at, keys, sums + d, stride);
}

template <class T>
void add_values_all(const float* weights, int rows, const char* v, const int64_t* at, int keys, int dim, float* sums,
                    int stride) {
  for (; rows >= kRowTile; rows -= kRowTile, weights += kRowTile * kScoreStride, sums += kRowTile * stride) {
    add_values_rows<T, kRowTile>(weights, v, at, keys, dim, sums, stride);
  }
  switch (rows) {
    case 5: return add_values_rows<T, 5>(weights, v, at, keys, dim, sums, stride);
    case 4: return add_values_rows<T, 4>(weights, v, at, keys, dim, sums, stride);
    case 3: return add_values_rows<T, 3>(weights, v, at, keys, dim, sums, stride);
    case 2: return add_values_rows<T, 2>(weights, v, at, keys, dim, sums, stride);
    case 1: return add_values_rows<T, 1>(weights, v, at, keys, dim, sums, stride);
  }
}

// Values as float32 [keys, stride], for where many rows would convert them again and again.
template <class T>
void unpack_values(const char* v, const int64_t* at, int keys, int dim, int stride, float* values) {
  for (int c = 0; c < keys; ++c, values += stride) {
    const T* key = reinterpret_cast<const T*>(v + at[c]);
    for (int d = 0; d < dim; d += kLanes) {
      store(values + d, d + kLanes <= dim ? load(key + d) : load_partial(key + d, dim - d));
    }
  }
}

// The maximum and the sum of exp(score - maximum) so far of one row.
struct Running {
  float maximum, total;
};

inline bool has_nan(const float* scores, int tiles) {
  for (int i = 0; i < kTile * tiles; ++i) {
    if (scores[i] != scores[i]) return true;
  }
  return false;
}

// Scores of one row become weights exp(score - maximum); 0 where `bits` (16 keys each) hide a key. Returns the factor that
// earlier sums are to be multiplied by.
inline float softmax_row(float* scores, int tiles, const uint16_t* bits, float softcap, Running& running) {
  const Vec low = broadcast(-__builtin_inff());
  static constexpr int32_t kLaneBits[kLanes] = {1 << 0, 1 << 1, 1 << 2,  1 << 3,  1 << 4,  1 << 5,  1 << 6,  1 << 7,
                                                1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15};
  const VecI lanes = load_int(kLaneBits);
  Vec maxima = low;
  for (int tile = 0; tile < tiles; ++tile) {
    Vec score = load(scores + kTile * tile);
    if (softcap != 0) score = broadcast(softcap) * tanh(score / broadcast(softcap));
    if (bits[tile] != 0xffff) score = select(any_bit(broadcast_int(bits[tile]), lanes), score, low);
    if (softcap != 0 || bits[tile] != 0xffff) store(scores + kTile * tile, score);
    maxima = max(maxima, score);
  }
  float block_maximum = reduce_max(maxima);
  if (block_maximum == -__builtin_inff()) {
    if (!has_nan(scores, tiles)) {
      for (int tile = 0; tile < tiles; ++tile) store(scores + kTile * tile, zero_vec());
      return 1.0f;
    }
    // The maximum passed over a NaN; -inf would say that the row has seen nothing.
    block_maximum = __builtin_nanf("");
  }
  const float maximum = running.maximum > block_maximum ? running.maximum : block_maximum;
  Vec sum = zero_vec();
  for (int tile = 0; tile < tiles; ++tile) {
    const Vec weight = exp(load(scores + kTile * tile) - broadcast(maximum));
    sum = sum + weight;
    store(scores + kTile * tile, weight);
  }
  const float factor = __builtin_expf(running.maximum - maximum);
  running.total = running.total * factor + reduce_add(sum);
  running.maximum = maximum;
  return factor;
}

}  // namespace
}  // namespace refrag::cpu::REFRAG_ISA
