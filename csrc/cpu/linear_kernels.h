// What csrc/cpu/linear.cpp asks of the kernel of a linear layer on few rows, which is compiled once per instruction set.
#pragma once

#include <cstdint>

#include "cpu/element.h"
#include "cpu/isa.h"

namespace refrag::cpu {

// Rows of the weights that are summed together: the lanes of a register.
inline constexpr int kLinearPanel = 16;

struct LinearParams {
  Element element;
  const char* x;
  int64_t x_row_bytes;
  int32_t count;  // rows of x
  const char* weight;
  int64_t weight_row_bytes;
  int32_t width;  // of the rows of both
  int32_t outputs;
  const char* bias;  // null: none
  char* out;         // [count, outputs]
};

// Outputs [begin, end) of every row; `begin` is a multiple of kLinearPanel.
REFRAG_DECLARE_KERNEL(void, linear_rows, const LinearParams& params, int32_t begin, int32_t end);

}  // namespace refrag::cpu
