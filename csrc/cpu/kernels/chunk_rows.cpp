// How unlike the mean of its chunk's keys each key is. Two passes over the chunk's rows, which stay in the cache.
#include "cpu/chunk_rows_kernels.h"

#include "cpu/kernels/rows.h"
#include "cpu/kernels/types.h"

namespace refrag::cpu::REFRAG_ISA {
namespace {

inline constexpr int kMaxHeadDim = 256;

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

// Copies a key as float32, zero-padded to a multiple of 16, as it was before its rotation.
template <class T>
REFRAG_INLINE void load_key(const ChunkKeys& keys, int64_t row, int64_t head, float* key) {
  copy_row<T>(keys.k + row * keys.row_bytes + head * keys.head_bytes, keys.head_dim, key);
  if (keys.half) unrotate(key, keys.cos + row * keys.cos_stride, keys.sin + row * keys.sin_stride, keys.half);
}

REFRAG_INLINE float square_root(float x) { return lane_of(sqrt(broadcast(x)), 0); }

template <class T>
void score_rows(const ChunkKeys& keys, int64_t begin, int64_t end, int64_t head, float* scores) {
  const int vecs = (keys.head_dim + kLanes - 1) / kLanes;
  alignas(64) float key[kMaxHeadDim + kLanes], mean[kMaxHeadDim];
  for (int i = 0; i < vecs; ++i) store(mean + kLanes * i, zero_vec());
  for (int64_t row = begin; row < end; ++row) {
    load_key<T>(keys, row, head, key);
    for (int i = 0; i < vecs; ++i) store(mean + kLanes * i, load(mean + kLanes * i) + load(key + kLanes * i));
  }
  const Vec share = broadcast(1.0f / static_cast<float>(end - begin));
  Vec square = zero_vec();
  for (int i = 0; i < vecs; ++i) {
    const Vec part = load(mean + kLanes * i) * share;
    store(mean + kLanes * i, part);
    square = fma(part, part, square);
  }
  const float mean_norm = square_root(reduce_add(square));
  for (int64_t row = begin; row < end; ++row) {
    load_key<T>(keys, row, head, key);
    Vec dot = zero_vec();
    square = zero_vec();
    for (int i = 0; i < vecs; ++i) {
      const Vec part = load(key + kLanes * i);
      dot = fma(part, load(mean + kLanes * i), dot);
      square = fma(part, part, square);
    }
    const float norms = square_root(reduce_add(square)) * mean_norm;
    scores[row - begin] = norms == 0 ? 0 : -reduce_add(dot) / norms;
  }
}

}  // namespace

void unlike_mean(const ChunkKeys& keys, int64_t begin, int64_t end, int64_t head, float* scores) {
  with_types(keys.element, [&](auto scalar, auto) { score_rows<decltype(scalar)>(keys, begin, end, head, scores); });
}

}  // namespace refrag::cpu::REFRAG_ISA
