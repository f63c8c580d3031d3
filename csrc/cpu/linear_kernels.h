// Interface between csrc/cpu/linear.cpp and the small-M linear kernel, which is compiled once per instruction set.
#pragma once

#include <cstdint>

#include "cpu/element.h"
#include "cpu/isa.h"

namespace refrag::cpu {

// Output features per tile: one for each lane of a vector.
inline constexpr int kLinearTile = 16;

struct LinearParams {
  Element element;
  const char* x;
  int64_t x_row_bytes;
  int32_t num_rows;  // rows of x
  const char* weight;
  int64_t weight_row_bytes;
  int32_t in_features;
  int32_t out_features;
  const char* bias;  // null: none
  char* out;         // [num_rows, out_features]
};

// Outputs [begin, end) of every row; `begin` is a multiple of kLinearTile.
REFRAG_DECLARE_KERNEL(void, linear_rows, const LinearParams& params, int32_t begin, int32_t end);

}  // namespace refrag::cpu
