// How unlike the mean of its chunk's keys each key is. Two passes over the chunk's rows, which stay in the cache.
#include "cpu/chunk_rows_kernels.h"

#include "cpu/kernels/rows.h"
#include "cpu/kernels/types.h"

namespace refrag::cpu::REFRAG_ISA {
namespace {

inline constexpr int kMaxHeadDim = 256;
inline constexpr int kBlock = kLanes;  // rows at a time; a chunk that has no more is loaded once

// Turns the pairs d and d + half back.
inline void unrotate(float* key, const float* cos, const float* sin, int half) {
  int d = 0;
  for (; d + kLanes <= half; d += kLanes) {
    const Vec first = load(key + d), second = load(key + half + d), c = load(cos + d), s = load(sin + d);
    store(key + d, fma(first, c, second * s));
    store(key + half + d, second * c - first * s);
  }
  for (; d < half; ++d) {
    const float first = key[d], second = key[half + d];
    key[d] = first * cos[d] + second * sin[d];
    key[half + d] = second * cos[d] - first * sin[d];
  }
}

// Copies `count` keys as float32, zero-padded to a multiple of 16 elements, as they were before their rotation.
template <class T>
void load_keys(const ChunkKeys& keys, int64_t first, int count, int64_t head, float* block) {
  const int stride = (keys.head_dim + kLanes - 1) / kLanes * kLanes;
  for (int i = 0; i < count; ++i) {
    const int64_t row = first + i;
    copy_row<T>(keys.k + row * keys.row_bytes + head * keys.head_bytes, keys.head_dim, block + i * stride);
    if (keys.half) {
      unrotate(block + i * stride, keys.cos + row * keys.cos_stride, keys.sin + row * keys.sin_stride, keys.half);
    }
  }
}

// The sum of the lanes of each of 16 vectors.
REFRAG_INLINE Vec reduce_each(Vec (&rows)[kBlock]) {
  transpose_tile(rows);
  for (int width = kBlock / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) rows[i] = rows[i] + rows[i + width];
  }
  return rows[0];
}

template <class T>
void score_rows(const ChunkKeys& keys, int64_t begin, int64_t end, int64_t head, float* scores) {
  const int vecs = (keys.head_dim + kLanes - 1) / kLanes, stride = vecs * kLanes;
  alignas(64) float block[kBlock * kMaxHeadDim], mean[kMaxHeadDim];
  for (int d = 0; d < stride; d += kLanes) store(mean + d, zero_vec());
  for (int64_t first = begin; first < end; first += kBlock) {
    const int count = end - first < kBlock ? static_cast<int>(end - first) : kBlock;
    load_keys<T>(keys, first, count, head, block);
    for (int d = 0; d < stride; d += kLanes) {
      Vec sum = load(mean + d);
      for (int i = 0; i < count; ++i) sum = sum + load(block + i * stride + d);
      store(mean + d, sum);
    }
  }
  const Vec share = broadcast(1.0f / static_cast<float>(end - begin));
  Vec mean_square = zero_vec();
  for (int d = 0; d < stride; d += kLanes) {
    const Vec part = load(mean + d) * share;
    store(mean + d, part);
    mean_square = fma(part, part, mean_square);
  }
  const Vec mean_norm = sqrt(broadcast(reduce_add(mean_square)));
  for (int64_t first = begin; first < end; first += kBlock) {
    const int count = end - first < kBlock ? static_cast<int>(end - first) : kBlock;
    if (end - begin > kBlock) load_keys<T>(keys, first, count, head, block);
    Vec dot[kBlock], square[kBlock];
    for (int i = 0; i < kBlock; ++i) {
      dot[i] = zero_vec();
      square[i] = zero_vec();
    }
    for (int i = 0; i < count; ++i) {
      for (int d = 0; d < stride; d += kLanes) {
        const Vec part = load(block + i * stride + d);
        dot[i] = fma(part, load(mean + d), dot[i]);
        square[i] = fma(part, part, square[i]);
      }
    }
    const Vec norms = sqrt(reduce_each(square)) * mean_norm;
    const Vec cosine = select(equal(norms, zero_vec()), zero_vec(), reduce_each(dot) / norms);
    store_partial(scores + (first - begin), zero_vec() - cosine, count);
  }
}

}  // namespace

void unlike_mean(const ChunkKeys& keys, int64_t begin, int64_t end, int64_t head, float* scores) {
  with_types(keys.element, [&](auto scalar, auto) { score_rows<decltype(scalar)>(keys, begin, end, head, scores); });
}

}  // namespace refrag::cpu::REFRAG_ISA
