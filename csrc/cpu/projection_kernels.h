// What csrc/cpu/projection.cpp asks of the projection kernels, which are compiled once per instruction set.
//
// A kernel works on a few panels of 16 chunks. Everything is kept transposed, [number][chunk]: then the rows of the weights
// are read as they lie in memory, each number broadcast, and the hidden layer comes out in the form in which the second
// layer reads it.
#pragma once

#include <cstdint>

#include "cpu/element.h"
#include "cpu/isa.h"

namespace refrag::cpu {

enum class Activation : int32_t { gelu, gelu_tanh, silu, relu, tanh, none };

struct Matrix {
  const char* data;
  int64_t row_bytes;
};

// Where projected chunks go. Null pointers: chunk i to row i.
struct Targets {
  const int32_t* chunks;   // [count] which row of `chunks`
  const int32_t* offsets;  // [count + 1] into rows
  const int32_t* rows;     // rows of the output
};

struct ProjectionParams {
  Element element;
  Activation activation;
  int32_t d_enc, hidden, d_dec;
  Matrix chunks;
  Matrix w1, w2;  // as projection_copies_weights tells: the tensors, or copies made by projection_copy
  const char *b1, *b2;  // of the element's type; null: none
  Targets targets;
  char* out;
  int64_t out_row_bytes;
};

// Chunks that one call takes: more don't fit in the caches beside the weights.
inline constexpr int kProjectionPanels = 4;

// Whether the kernels need a copy of a weight matrix with rows of `width` elements, and the bytes of a copied row.
REFRAG_DECLARE_KERNEL(bool, projection_copies_weights, Element element, int32_t width);
REFRAG_DECLARE_KERNEL(int64_t, projection_row_bytes, Element element, int32_t width);

REFRAG_DECLARE_KERNEL(void, projection_copy, Element element, const Matrix& source, int32_t width, int32_t begin,
                      int32_t end, char* copy);

REFRAG_DECLARE_KERNEL(int64_t, projection_scratch, const ProjectionParams& params);

// Projects entries [first, first + count) of the targets, at most 16 * kProjectionPanels.
REFRAG_DECLARE_KERNEL(void, project, const ProjectionParams& params, int32_t first, int32_t count, char* scratch);

// out row = table row * scale, for rows [begin, end) without a slot.
struct GatherParams {
  Element element;
  const int64_t* token_ids;
  const int32_t* slot_of_row;
  Matrix table;
  int32_t width;
  float scale;
  char* out;
  int64_t out_row_bytes;
};

REFRAG_DECLARE_KERNEL(void, gather_text, const GatherParams& params, int32_t begin, int32_t end);

}  // namespace refrag::cpu
