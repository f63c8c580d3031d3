// Copies rows of tensors into the layouts that the products read: padded, paired or transposed.
#pragma once

#include "cpu/kernels/product.h"
#include "cpu/kernels/transpose.h"

namespace refrag::cpu::REFRAG_ISA {
namespace {

// Copies one row as float32, zero-padded from `cols` to a multiple of 16.
template <class T>
REFRAG_INLINE void copy_row(const char* source, int cols, float* row) {
  const T* from = reinterpret_cast<const T*>(source);
  int d = 0;
  for (; d + kLanes <= cols; d += kLanes) store(row + d, load(from + d));
  if (d < cols) store(row + d, load_partial(from + d, cols - d));
}

template <class T>
void pack_rows(const char* source, int64_t row_bytes, int count, int cols, char* copy) {
  const int64_t stride = (cols + 15) / 16 * 64;
  for (int i = 0; i < count; ++i) {
    copy_row<T>(source + i * row_bytes, cols, reinterpret_cast<float*>(copy + i * stride));
  }
}

REFRAG_INLINE VecI load_u16_partial(const char* p, int count) {
  uint16_t elements[kLanes] = {};
  std::memcpy(elements, p, count * sizeof(uint16_t));
  return load_u16(elements);
}

// Interleaves pairs of rows of 16-bit elements: word d of pair i holds element d of row 2i in its low half, and of row
// 2i + 1 in its high half.
inline void pack_pairs(const char* source, int64_t row_bytes, int count, int cols, char* copy) {
  const int64_t stride = (cols + 15) / 16 * 64;
  for (int i = 0; i < count; i += 2) {
    const char* even = source + i * row_bytes;
    const char* odd = even + row_bytes;
    char* words = copy + i / 2 * stride;
    for (int d = 0; d < cols; d += kLanes) {
      const int elements = cols - d < kLanes ? cols - d : kLanes;
      VecI low, high = broadcast_int(0);
      if (elements == kLanes) {
        low = load_u16(reinterpret_cast<const uint16_t*>(even + 2 * d));
        if (i + 1 < count) high = load_u16(reinterpret_cast<const uint16_t*>(odd + 2 * d));
      } else {
        low = load_u16_partial(even + 2 * d, elements);
        if (i + 1 < count) high = load_u16_partial(odd + 2 * d, elements);
      }
      store_int(words + 4 * d, low | shift_left<16>(high));
    }
  }
}

// to[c * to_stride + r] = from[r * from_stride + c] for 16 x 16 words; strides in words.
REFRAG_INLINE void transpose_words(const char* from, int64_t from_stride, char* to, int64_t to_stride) {
  Vec rows[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) rows[i] = load_words(from + 4 * i * from_stride);
  transpose_tile(rows);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) store_int(to + 4 * i * to_stride, as_int(rows[i]));
}

// Stores two rows as bfloat16 pairs: the lanes of `even` in the low halves, those of `odd` in the high halves.
REFRAG_INLINE void store_pairs(char* words, const Vec even, const Vec odd) {
#if defined(__AVX512BF16__)
  // 0, 16, 1, 17, ...
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd.part[0], even.part[0]));
  store_int(words, {{reinterpret_cast<PartI>(_mm512_permutexvar_epi16(order, both))}});
#else
  store_int(words, bits_of_bf16(even) | shift_left<16>(bits_of_bf16(odd)));
#endif
}

}  // namespace
}  // namespace refrag::cpu::REFRAG_ISA
