// Interface between csrc/cpu/chunk_rows.cpp and its kernel, which is compiled once per instruction set.
#pragma once

#include <cstdint>

#include "cpu/element.h"
#include "cpu/isa.h"

namespace refrag::cpu {

struct ChunkKeys {
  Element element;
  const char* k;  // [T, H_kv, D]
  int64_t row_bytes, head_bytes;
  int32_t head_dim;
  const float *cos, *sin;  // [T, half]: the rotation of the keys
  int64_t cos_stride, sin_stride;
  int32_t half;  // 0: the keys are not rotated
};

// Scores rows [begin, end), which are a chunk, by minus the cosine between a key and the chunk's mean.
REFRAG_DECLARE_KERNEL(void, unlike_mean, const ChunkKeys& keys, int64_t begin, int64_t end, int64_t head,
                      float* scores);

}  // namespace refrag::cpu
