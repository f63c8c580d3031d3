// A linear layer on few rows: the weights are read once, as they lie, and every number is used while it is in a register.
#include "cpu/linear_kernels.h"

#include "cpu/kernels/rows.h"
#include "cpu/kernels/types.h"

namespace refrag::cpu::REFRAG_ISA {
namespace {

// Rows of the weights that are read side by side, and rows of x that meet them there: their sums fill 16 registers.
constexpr int kSide = 4;
constexpr int kMost = 4;

// Numbers of a row that one register holds.
template <class Math>
inline constexpr int kStep = Math::kPairs ? 2 * kLanes : kLanes;

template <class T, class Math>
REFRAG_INLINE Vec load_step(const char* row, int at) {
  if constexpr (Math::kPairs) {
    return load_words(row + 2 * at);
  } else {
    return load(reinterpret_cast<const T*>(row) + at);
  }
}

// The last `count` numbers of a row, fewer than a register holds, and zeros.
template <class T, class Math>
REFRAG_INLINE Vec load_last(const char* row, int at, int count) {
  if constexpr (Math::kPairs) {
    alignas(64) char words[64] = {};
    std::memcpy(words, row + 2 * at, 2 * count);
    return load_words(words);
  } else {
    return load_partial(reinterpret_cast<const T*>(row) + at, count);
  }
}

// sums[row][side] = lanes that add up to the product of row `side` of w and row `x` of x.
template <class T, class Math, int kCount>
REFRAG_INLINE void multiply_rows(const char* const w[kSide], const char* ahead, const char* x, int64_t x_row_bytes,
                                 int width, Vec sums[kCount][kSide]) {
  for (int row = 0; row < kCount; ++row) {
    for (int side = 0; side < kSide; ++side) sums[row][side] = zero_vec();
  }
  int at = 0;
  for (; at + kStep<Math> <= width; at += kStep<Math>) {
    // Rows are too short for the hardware to see far ahead: the next ones are asked for here.
    for (int side = 0; side < kSide; ++side) {
      __builtin_prefetch(ahead + int64_t{side} * width * sizeof(T) + at * sizeof(T));
    }
    Vec factors[kSide];
    for (int side = 0; side < kSide; ++side) factors[side] = load_step<T, Math>(w[side], at);
    for (int row = 0; row < kCount; ++row) {
      const Vec number = load_step<T, Math>(x + row * x_row_bytes, at);
      for (int side = 0; side < kSide; ++side) {
        sums[row][side] = Math::multiply_add(number, factors[side], sums[row][side]);
      }
    }
  }
  if (at == width) return;
  for (int row = 0; row < kCount; ++row) {
    const Vec number = load_last<T, Math>(x + row * x_row_bytes, at, width - at);
    for (int side = 0; side < kSide; ++side) {
      sums[row][side] = Math::multiply_add(number, load_last<T, Math>(w[side], at, width - at), sums[row][side]);
    }
  }
}

template <class T, class Math, int kCount>
void multiply_panel(const LinearParams& p, int first_row, int begin, int end) {
  alignas(64) float lanes[kCount][kLinearPanel * kLanes], turned[kLinearPanel * kLanes];
  const char* x = p.x + first_row * p.x_row_bytes;
  for (int panel = begin; panel < end; panel += kLinearPanel) {
    const int outputs = end - panel < kLinearPanel ? end - panel : kLinearPanel;
    for (int first = 0; first < kLinearPanel; first += kSide) {
      // Beyond the last row stands that row again: its sums are not stored.
      const char* w[kSide];
      for (int side = 0; side < kSide; ++side) {
        const int row = first + side < outputs ? first + side : outputs - 1;
        w[side] = p.weight + (panel + row) * p.weight_row_bytes;
      }
      Vec sums[kCount][kSide];
      multiply_rows<T, Math, kCount>(w, w[0] + kSide * p.weight_row_bytes, x, p.x_row_bytes, p.width, sums);
      for (int row = 0; row < kCount; ++row) {
        for (int side = 0; side < kSide; ++side) store(lanes[row] + (first + side) * kLanes, sums[row][side]);
      }
    }
    Vec bias = zero_vec();
    if (p.bias) {
      const T* from = reinterpret_cast<const T*>(p.bias) + panel;
      bias = outputs == kLanes ? load(from) : load_partial(from, outputs);
    }
    for (int row = 0; row < kCount; ++row) {
      transpose_words(reinterpret_cast<const char*>(lanes[row]), kLanes, reinterpret_cast<char*>(turned), kLanes);
      // Lanes are added pairwise, in one order whatever the number of rows.
      for (int half = kLanes / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) {
          store(turned + i * kLanes, load(turned + i * kLanes) + load(turned + (i + half) * kLanes));
        }
      }
      T* out = reinterpret_cast<T*>(p.out) + int64_t{first_row + row} * p.outputs + panel;
      const Vec result = load(turned) + bias;
      if (outputs == kLanes) {
        store(out, result);
      } else {
        store_partial(out, result, outputs);
      }
    }
  }
}

}  // namespace

void linear_rows(const LinearParams& p, int32_t begin, int32_t end) {
  with_types(p.element, [&](auto number, auto math) {
    using T = decltype(number);
    using Math = decltype(math);
    int row = 0;
    for (; row + kMost <= p.count; row += kMost) multiply_panel<T, Math, kMost>(p, row, begin, end);
    switch (p.count - row) {
      case 3: multiply_panel<T, Math, 3>(p, row, begin, end); break;
      case 2: multiply_panel<T, Math, 2>(p, row, begin, end); break;
      case 1: multiply_panel<T, Math, 1>(p, row, begin, end); break;
      default: break;
    }
  });
}

}  // namespace refrag::cpu::REFRAG_ISA
