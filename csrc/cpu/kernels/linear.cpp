// Linear layer for small M: the weights are read once, in memory order, and each element is used for all rows of x
// while it is in a register.
#include "cpu/linear_kernels.h"

#include "cpu/kernels/rows.h"
#include "cpu/kernels/types.h"

namespace refrag::cpu::REFRAG_ISA {
namespace {

// The micro-tile: rows of the weights times rows of x. Its accumulators fill 16 registers.
constexpr int kWeightRows = 4;
constexpr int kMaxRows = 4;

// Elements of a row per register.
template <class Math>
inline constexpr int kStep = Math::kPairs ? 2 * kLanes : kLanes;

template <class T, class Math>
REFRAG_INLINE Vec load_step(const char* row, int col) {
  if constexpr (Math::kPairs) {
    return load_words(row + 2 * col);
  } else {
    return load(reinterpret_cast<const T*>(row) + col);
  }
}

// Loads the last `count` elements of a row, fewer than a register holds, padded with zeros.
template <class T, class Math>
REFRAG_INLINE Vec load_last(const char* row, int col, int count) {
  if constexpr (Math::kPairs) {
    alignas(64) char words[64] = {};
    std::memcpy(words, row + 2 * col, 2 * count);
    return load_words(words);
  } else {
    return load_partial(reinterpret_cast<const T*>(row) + col, count);
  }
}

// acc[row][w_row]: lanes whose sum is the dot product of row `w_row` of w and row `row` of x.
template <class T, class Math, int kCount>
REFRAG_INLINE void multiply_rows(const char* const w[kWeightRows], const char* prefetch, const char* x,
                                 int64_t x_row_bytes, int in_features, Vec acc[kCount][kWeightRows]) {
  for (int row = 0; row < kCount; ++row) {
    for (int w_row = 0; w_row < kWeightRows; ++w_row) acc[row][w_row] = zero_vec();
  }
  int col = 0;
  for (; col + kStep<Math> <= in_features; col += kStep<Math>) {
    // The rows are too short for the hardware prefetcher, so prefetch the next ones explicitly.
    for (int w_row = 0; w_row < kWeightRows; ++w_row) {
      __builtin_prefetch(prefetch + int64_t{w_row} * in_features * sizeof(T) + col * sizeof(T));
    }
    Vec w_vecs[kWeightRows];
    for (int w_row = 0; w_row < kWeightRows; ++w_row) w_vecs[w_row] = load_step<T, Math>(w[w_row], col);
    for (int row = 0; row < kCount; ++row) {
      const Vec x_row = load_step<T, Math>(x + row * x_row_bytes, col);
      for (int w_row = 0; w_row < kWeightRows; ++w_row) {
        acc[row][w_row] = Math::multiply_add(x_row, w_vecs[w_row], acc[row][w_row]);
      }
    }
  }
  if (col == in_features) return;
  for (int row = 0; row < kCount; ++row) {
    const Vec x_row = load_last<T, Math>(x + row * x_row_bytes, col, in_features - col);
    for (int w_row = 0; w_row < kWeightRows; ++w_row) {
      acc[row][w_row] =
          Math::multiply_add(x_row, load_last<T, Math>(w[w_row], col, in_features - col), acc[row][w_row]);
    }
  }
}

template <class T, class Math, int kCount>
void multiply_tile(const LinearParams& p, int first_row, int begin, int end) {
  alignas(64) float partial_sums[kCount][kLinearTile * kLanes], transposed[kLinearTile * kLanes];
  const char* x = p.x + first_row * p.x_row_bytes;
  for (int tile = begin; tile < end; tile += kLinearTile) {
    const int tile_outputs = end - tile < kLinearTile ? end - tile : kLinearTile;
    for (int first = 0; first < kLinearTile; first += kWeightRows) {
      // Beyond the last row, repeat it: those sums are not stored.
      const char* w[kWeightRows];
      for (int w_row = 0; w_row < kWeightRows; ++w_row) {
        const int row = first + w_row < tile_outputs ? first + w_row : tile_outputs - 1;
        w[w_row] = p.weight + (tile + row) * p.weight_row_bytes;
      }
      Vec acc[kCount][kWeightRows];
      multiply_rows<T, Math, kCount>(w, w[0] + kWeightRows * p.weight_row_bytes, x, p.x_row_bytes, p.in_features, acc);
      for (int row = 0; row < kCount; ++row) {
        for (int w_row = 0; w_row < kWeightRows; ++w_row) {
          store(partial_sums[row] + (first + w_row) * kLanes, acc[row][w_row]);
        }
      }
    }
    Vec bias = zero_vec();
    if (p.bias) {
      const T* from = reinterpret_cast<const T*>(p.bias) + tile;
      bias = tile_outputs == kLanes ? load(from) : load_partial(from, tile_outputs);
    }
    for (int row = 0; row < kCount; ++row) {
      transpose_words(reinterpret_cast<const char*>(partial_sums[row]), kLanes, reinterpret_cast<char*>(transposed),
                      kLanes);
      // Pairwise sum over the lanes, in an order that does not depend on the number of rows.
      for (int half = kLanes / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) {
          store(transposed + i * kLanes, load(transposed + i * kLanes) + load(transposed + (i + half) * kLanes));
        }
      }
      T* out = reinterpret_cast<T*>(p.out) + int64_t{first_row + row} * p.out_features + tile;
      const Vec result = load(transposed) + bias;
      if (tile_outputs == kLanes) {
        store(out, result);
      } else {
        store_partial(out, result, tile_outputs);
      }
    }
  }
}

}  // namespace

void linear_rows(const LinearParams& p, int32_t begin, int32_t end) {
  with_types(p.element, [&](auto scalar, auto math) {
    using T = decltype(scalar);
    using Math = decltype(math);
    int row = 0;
    for (; row + kMaxRows <= p.num_rows; row += kMaxRows) multiply_tile<T, Math, kMaxRows>(p, row, begin, end);
    switch (p.num_rows - row) {
      case 3: multiply_tile<T, Math, 3>(p, row, begin, end); break;
      case 2: multiply_tile<T, Math, 2>(p, row, begin, end); break;
      case 1: multiply_tile<T, Math, 1>(p, row, begin, end); break;
      default: break;
    }
  });
}

}  // namespace refrag::cpu::REFRAG_ISA
