// Transposition of 16 x 16 words in registers.
#pragma once

#include <cstring>

#include "cpu/simd.h"

namespace refrag::cpu::REFRAG_ISA {
namespace {

// Transposes the rows in place. Words may hold anything, such as pairs of 16-bit elements.
REFRAG_INLINE void transpose_tile(Vec (&rows)[16]) {
#if defined(__AVX512F__)
  __m512 a[16], b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(rows[i].part[0], rows[i + 1].part[0]);
    b[i + 1] = _mm512_unpackhi_ps(rows[i].part[0], rows[i + 1].part[0]);
  }
  // a[i + j] holds column j of each 4 x 4 block of rows i to i + 3.
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_shuffle_ps(b[i], b[i + 2], 0x44);
    a[i + 1] = _mm512_shuffle_ps(b[i], b[i + 2], 0xee);
    a[i + 2] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    a[i + 3] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512 left_top = _mm512_shuffle_f32x4(a[j], a[4 + j], 0x44);
    const __m512 right_top = _mm512_shuffle_f32x4(a[j], a[4 + j], 0xee);
    const __m512 left_low = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0x44);
    const __m512 right_low = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0xee);
    rows[j] = {{_mm512_shuffle_f32x4(left_top, left_low, 0x88)}};
    rows[4 + j] = {{_mm512_shuffle_f32x4(left_top, left_low, 0xdd)}};
    rows[8 + j] = {{_mm512_shuffle_f32x4(right_top, right_low, 0x88)}};
    rows[12 + j] = {{_mm512_shuffle_f32x4(right_top, right_low, 0xdd)}};
  }
#else
  uint32_t from[16][16], to[16][16];
  std::memcpy(from, rows, sizeof(from));
  for (int c = 0; c < 16; ++c) {
    for (int r = 0; r < 16; ++r) to[c][r] = from[r][c];
  }
  std::memcpy(rows, to, sizeof(to));
#endif
}

}  // namespace
}  // namespace refrag::cpu::REFRAG_ISA
