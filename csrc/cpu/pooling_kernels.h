// Interface between csrc/cpu/pooling.cpp and the pooling kernel, which is compiled once per instruction set.
#pragma once

#include <cstdint>

#include "cpu/element.h"
#include "cpu/isa.h"

namespace refrag::cpu {

struct PoolParams {
  Element element;
  const char* hidden;
  int64_t row_bytes;
  int32_t hidden_size;
  const int32_t* offsets;
  char* out;  // [C, hidden_size]
};

// Computes the means of chunks [begin, end).
REFRAG_DECLARE_KERNEL(void, pool_mean, const PoolParams& params, int32_t begin, int32_t end);

}  // namespace refrag::cpu
