// Matrix products C [rows, vecs * 16] = A B, computed in micro-tiles of C that stay in registers.
//
// Elements of A are broadcast one at a time; B and C are read in vectors of 16 columns. Elements are words of 32 bits:
// floats, or pairs of bfloat16 whose products are summed (vdpbf16ps), which halves the inner dimension.
#pragma once

#include "cpu/simd.h"

namespace refrag::cpu::REFRAG_ISA {
namespace {

struct Float32Math {
  static constexpr bool kPairs = false;
  static REFRAG_INLINE Vec multiply_add(const Vec a, const Vec b, const Vec c) { return fma(a, b, c); }
};

#if defined(__AVX512BF16__)
struct Bf16PairMath {
  static constexpr bool kPairs = true;
  static REFRAG_INLINE Vec multiply_add(const Vec a, const Vec b, const Vec c) {
    return {
        {_mm512_dpbf16_ps(c.part[0], reinterpret_cast<__m512bh>(a.part[0]), reinterpret_cast<__m512bh>(b.part[0]))}};
  }
};
#endif

// Words of a row of A, which is the inner dimension of the product.
template <class Math>
REFRAG_INLINE int words_of(int cols) {
  return Math::kPairs ? cols / 2 : cols;
}

// 32-bit words of either kind, of any alignment.
REFRAG_INLINE Vec load_words(const char* p) { return as_float(load_int(p)); }

REFRAG_INLINE Vec broadcast_word(const char* p) {
  float word;
  std::memcpy(&word, p, sizeof(word));
  return broadcast(word);
}

enum class Epilogue {
  store,       // C = A B
  accumulate,  // C = C + A B
  rescale,     // C = factor[row] * C + A B
};

// Memory order of A.
enum class Order {
  row_major,  // rows are `a_stride` bytes apart; the inner dimension is a multiple of 4
  col_major,  // columns are `a_stride` bytes apart
};

// Equally spaced rows of B.
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
  const float* factor;  // for Epilogue::rescale
};

// Size of the micro-tile. AVX-512 has 32 registers, of which C takes 24; AVX2 has 16, of which C takes 12 (a vector is
// two of them); SSE has 16, of which C takes 8 (a vector is four).
#if defined(__AVX512F__)
inline constexpr int kMicroTileVecs = 4;
inline constexpr int kMicroTileRows[] = {0, 16, 8, 8, 6};
#elif defined(__AVX2__)
inline constexpr int kMicroTileVecs = 1;
inline constexpr int kMicroTileRows[] = {0, 6};
#else
inline constexpr int kMicroTileVecs = 1;
inline constexpr int kMicroTileRows[] = {0, 2};
#endif

template <class Math, int kRows, int kVecs, Order kOrder, Epilogue kEpilogue>
__attribute__((noinline)) void micro_kernel(const Product& product, const char* a, float* c, const float* factor,
                                            int64_t column_bytes) {
  Vec sum[kRows][kVecs];
  const int64_t c_stride = product.c_stride;
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) {
      if constexpr (kEpilogue == Epilogue::store) sum[i][j] = zero_vec();
      if constexpr (kEpilogue == Epilogue::accumulate) sum[i][j] = load(c + i * c_stride + 16 * j);
      if constexpr (kEpilogue == Epilogue::rescale) sum[i][j] = load(c + i * c_stride + 16 * j) * broadcast(factor[i]);
    }
  }
  const int64_t a_stride = product.a_stride, b_stride = product.b_stride;
  // One pointer for every three rows; the others are reached by an index register.
  const char* rows[(kRows + 2) / 3];
#pragma GCC unroll 6
  for (int i = 0; i < (kRows + 2) / 3; ++i) rows[i] = a + 3 * i * a_stride;
  for (int s = 0; s < product.num_spans; ++s) {
    const char* b = product.spans[s].b + column_bytes;
    const int32_t length = product.spans[s].length;
    if constexpr (kOrder == Order::col_major) {
      for (int32_t k = 0; k < length; ++k) {
        Vec right[kVecs];
#pragma GCC unroll 4
        for (int j = 0; j < kVecs; ++j) right[j] = load_words(b + 64 * j);
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) {
          const Vec left = broadcast_word(a + 4 * i);
#pragma GCC unroll 4
          for (int j = 0; j < kVecs; ++j) sum[i][j] = Math::multiply_add(left, right[j], sum[i][j]);
        }
        a += a_stride;
        b += b_stride;
      }
    } else {
      for (int32_t k = 0; k < length; k += 4) {
#pragma GCC unroll 4
        for (int step = 0; step < 4; ++step) {
          Vec right[kVecs];
#pragma GCC unroll 4
          for (int j = 0; j < kVecs; ++j) right[j] = load_words(b + 64 * j);
#pragma GCC unroll 16
          for (int i = 0; i < kRows; ++i) {
            const Vec left = broadcast_word(rows[i / 3] + (i % 3) * a_stride + 4 * step);
#pragma GCC unroll 4
            for (int j = 0; j < kVecs; ++j) sum[i][j] = Math::multiply_add(left, right[j], sum[i][j]);
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
    for (int j = 0; j < kVecs; ++j) store(c + i * c_stride + 16 * j, sum[i][j]);
  }
}

// Calls the micro-kernel for `rows` rows, 1 to kMaxRows.
template <class Math, int kMaxRows, int kVecs, Order kOrder, Epilogue kEpilogue>
REFRAG_INLINE void dispatch_rows(const Product& product, int rows, const char* a, float* c, const float* factor,
                                 int64_t column_bytes) {
  if constexpr (kMaxRows > 1) {
    if (rows < kMaxRows) {
      return dispatch_rows<Math, kMaxRows - 1, kVecs, kOrder, kEpilogue>(product, rows, a, c, factor, column_bytes);
    }
  }
  micro_kernel<Math, kMaxRows, kVecs, kOrder, kEpilogue>(product, a, c, factor, column_bytes);
}

template <class Math, int kVecs, Order kOrder, Epilogue kEpilogue>
void multiply_vecs(const Product& product, int rows, int first_vec) {
  // Micro-tiles of nearly equal height: in a low one, FMAs would wait for their own results.
  const int tiles = (rows + kMicroTileRows[kVecs] - 1) / kMicroTileRows[kVecs];
  for (int tile = 0, row = 0; tile < tiles; ++tile) {
    const int height = (rows - row) / (tiles - tile);
    const char* a = product.a + row * (kOrder == Order::col_major ? int64_t{4} : product.a_stride);
    float* c = product.c + row * product.c_stride + 16 * first_vec;
    dispatch_rows<Math, kMicroTileRows[kVecs], kVecs, kOrder, kEpilogue>(product, height, a, c, product.factor + row,
                                                                         int64_t{64} * first_vec);
    row += height;
  }
}

template <class Math, Order kOrder, Epilogue kEpilogue>
void multiply(const Product& product, int rows, int vecs) {
  const int groups = (vecs + kMicroTileVecs - 1) / kMicroTileVecs;
  for (int group = 0, vec = 0; group < groups; ++group) {
    const int count = (vecs - vec) / (groups - group);
    switch (count) {
      case 1: multiply_vecs<Math, 1, kOrder, kEpilogue>(product, rows, vec); break;
#if defined(__AVX512F__)
      case 2: multiply_vecs<Math, 2, kOrder, kEpilogue>(product, rows, vec); break;
      case 3: multiply_vecs<Math, 3, kOrder, kEpilogue>(product, rows, vec); break;
      default: multiply_vecs<Math, 4, kOrder, kEpilogue>(product, rows, vec); break;
#else
      default: break;
#endif
    }
    vec += count;
  }
}

}  // namespace
}  // namespace refrag::cpu::REFRAG_ISA
