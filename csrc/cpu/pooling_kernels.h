// What csrc/cpu/pooling.cpp asks of the pooling kernel, which is compiled once per instruction set.
#pragma once

#include <cstdint>

#include "cpu/element.h"
#include "cpu/isa.h"

namespace refrag::cpu {

struct PoolParams {
  Element element;
  const char* hidden;
  int64_t row_bytes;
  int32_t width;
  const int32_t* offsets;
  char* out;  // [C, width]
};

// The mean of the rows of chunks [begin, end).
REFRAG_DECLARE_KERNEL(void, pool_mean, const PoolParams& params, int32_t begin, int32_t end);

}  // namespace refrag::cpu
