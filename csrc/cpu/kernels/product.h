// Products of small matrices, kept in registers: C [rows, panels * 16] = A B.
//
// A is read one number at a time and broadcast, B and C a panel of 16 columns at a time. Numbers are 32 bits wide:
// floats, or pairs of bfloat16 whose products are summed (vdpbf16ps), which halves the inner length.
#pragma once

#include "cpu/simd.h"

namespace refrag::cpu::REFRAG_ISA {
namespace {

struct Floats {
  static constexpr bool kPairs = false;
  static REFRAG_INLINE Vec multiply_add(const Vec a, const Vec b, const Vec c) { return fma(a, b, c); }
};

#if defined(__AVX512BF16__)
struct Pairs {
  static constexpr bool kPairs = true;
  static REFRAG_INLINE Vec multiply_add(const Vec a, const Vec b, const Vec c) {
    return {
        {_mm512_dpbf16_ps(c.part[0], reinterpret_cast<__m512bh>(a.part[0]), reinterpret_cast<__m512bh>(b.part[0]))}};
  }
};
#endif

// Words of a row that is the first factor of a product, or the inner length of that product.
template <class Math>
REFRAG_INLINE int words_of(int width) {
  return Math::kPairs ? width / 2 : width;
}

// 32-bit numbers of either kind, of any alignment.
REFRAG_INLINE Vec load_words(const char* p) { return as_float(load_int(p)); }

REFRAG_INLINE Vec broadcast_word(const char* p) {
  float word;
  std::memcpy(&word, p, sizeof(word));
  return broadcast(word);
}

enum class Into {
  set,    // C = A B
  add,    // C = C + A B
  scale,  // C = factor[row] * C + A B
};

// How the rows of A lie.
enum class Lie {
  apart,     // row i starts `a_stride` bytes after row i - 1, its numbers adjacent; the inner length is a multiple of 4
  adjacent,  // number i of a column is next to number i - 1, columns are `a_stride` bytes apart
};

// Rows of B that are equally far apart.
struct Span {
  const char* b;
  int32_t length;
};

struct Product {
  const char* a;
  int64_t a_stride;
  const Span* spans;
  int32_t num_spans;
  int64_t b_stride;
  float* c;
  int64_t c_stride;     // in floats
  const float* factor;  // for Into::scale
};

// Registers: AVX-512 has 32, of which 24 hold C; AVX2 16 halves, of which 12; SSE 16 quarters.
#if defined(__AVX512F__)
inline constexpr int kRegisterPanels = 4;
inline constexpr int kRegisterRows[] = {0, 16, 8, 8, 6};
#elif defined(__AVX2__)
inline constexpr int kRegisterPanels = 1;
inline constexpr int kRegisterRows[] = {0, 6};
#else
inline constexpr int kRegisterPanels = 1;
inline constexpr int kRegisterRows[] = {0, 2};
#endif

template <class Math, int kRows, int kPanels, Lie kLie, Into kInto>
__attribute__((noinline)) void register_tile(const Product& product, const char* a, float* c, const float* factor,
                                             int64_t column_bytes) {
  Vec sum[kRows][kPanels];
  const int64_t c_stride = product.c_stride;
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kPanels; ++j) {
      if constexpr (kInto == Into::set) sum[i][j] = zero_vec();
      if constexpr (kInto == Into::add) sum[i][j] = load(c + i * c_stride + 16 * j);
      if constexpr (kInto == Into::scale) sum[i][j] = load(c + i * c_stride + 16 * j) * broadcast(factor[i]);
    }
  }
  const int64_t a_stride = product.a_stride, b_stride = product.b_stride;
  // Every third row has a pointer of its own; the others are within reach of an index register.
  const char* rows[(kRows + 2) / 3];
#pragma GCC unroll 6
  for (int i = 0; i < (kRows + 2) / 3; ++i) rows[i] = a + 3 * i * a_stride;
  for (int s = 0; s < product.num_spans; ++s) {
    const char* b = product.spans[s].b + column_bytes;
    const int32_t length = product.spans[s].length;
    if constexpr (kLie == Lie::adjacent) {
      for (int32_t k = 0; k < length; ++k) {
        Vec right[kPanels];
#pragma GCC unroll 4
        for (int j = 0; j < kPanels; ++j) right[j] = load_words(b + 64 * j);
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) {
          const Vec left = broadcast_word(a + 4 * i);
#pragma GCC unroll 4
          for (int j = 0; j < kPanels; ++j) sum[i][j] = Math::multiply_add(left, right[j], sum[i][j]);
        }
        a += a_stride;
        b += b_stride;
      }
    } else {
      for (int32_t k = 0; k < length; k += 4) {
#pragma GCC unroll 4
        for (int step = 0; step < 4; ++step) {
          Vec right[kPanels];
#pragma GCC unroll 4
          for (int j = 0; j < kPanels; ++j) right[j] = load_words(b + 64 * j);
#pragma GCC unroll 16
          for (int i = 0; i < kRows; ++i) {
            const Vec left = broadcast_word(rows[i / 3] + (i % 3) * a_stride + 4 * step);
#pragma GCC unroll 4
            for (int j = 0; j < kPanels; ++j) sum[i][j] = Math::multiply_add(left, right[j], sum[i][j]);
          }
          b += b_stride;
        }
#pragma GCC unroll 6
        for (int i = 0; i < (kRows + 2) / 3; ++i) rows[i] += 16;
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kPanels; ++j) store(c + i * c_stride + 16 * j, sum[i][j]);
  }
}

// Calls the register tile for `rows`, 1 to kMost.
template <class Math, int kMost, int kPanels, Lie kLie, Into kInto>
REFRAG_INLINE void register_rows(const Product& product, int rows, const char* a, float* c, const float* factor,
                                 int64_t column_bytes) {
  if constexpr (kMost > 1) {
    if (rows < kMost) {
      return register_rows<Math, kMost - 1, kPanels, kLie, kInto>(product, rows, a, c, factor, column_bytes);
    }
  }
  register_tile<Math, kMost, kPanels, kLie, kInto>(product, a, c, factor, column_bytes);
}

template <class Math, int kPanels, Lie kLie, Into kInto>
void multiply_panels(const Product& product, int rows, int first_panel) {
  // Tiles of nearly the same height: a low one would leave the multipliers waiting for their own results.
  const int tiles = (rows + kRegisterRows[kPanels] - 1) / kRegisterRows[kPanels];
  for (int tile = 0, row = 0; tile < tiles; ++tile) {
    const int height = (rows - row) / (tiles - tile);
    const char* a = product.a + row * (kLie == Lie::adjacent ? int64_t{4} : product.a_stride);
    float* c = product.c + row * product.c_stride + 16 * first_panel;
    register_rows<Math, kRegisterRows[kPanels], kPanels, kLie, kInto>(product, height, a, c, product.factor + row,
                                                                      int64_t{64} * first_panel);
    row += height;
  }
}

template <class Math, Lie kLie, Into kInto>
void multiply(const Product& product, int rows, int panels) {
  const int groups = (panels + kRegisterPanels - 1) / kRegisterPanels;
  for (int group = 0, panel = 0; group < groups; ++group) {
    const int count = (panels - panel) / (groups - group);
    switch (count) {
      case 1: multiply_panels<Math, 1, kLie, kInto>(product, rows, panel); break;
#if defined(__AVX512F__)
      case 2: multiply_panels<Math, 2, kLie, kInto>(product, rows, panel); break;
      case 3: multiply_panels<Math, 3, kLie, kInto>(product, rows, panel); break;
      default: multiply_panels<Math, 4, kLie, kInto>(product, rows, panel); break;
#else
      default: break;
#endif
    }
    panel += count;
  }
}

}  // namespace
}  // namespace refrag::cpu::REFRAG_ISA
