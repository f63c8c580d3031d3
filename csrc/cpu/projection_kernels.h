// Interface between csrc/cpu/projection.cpp and the projection kernels, which are compiled once per instruction set.
//
// A kernel works on a few tiles of 16 chunks. All operands are stored transposed, as [feature][chunk]: the rows of the
// weights are then read in memory order, with each element broadcast, and the hidden layer is produced in the layout
// that the second layer reads.
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

// Destinations of the projected chunks. With null pointers, chunk i goes to row i.
struct Targets {
  const int32_t* chunks;   // [count] rows of `chunks`
  const int32_t* offsets;  // [count + 1] into `rows`
  const int32_t* rows;     // rows of the output
};

struct ProjectionParams {
  Element element;
  Activation activation;
  int32_t d_enc, hidden, d_dec;
  Matrix chunks;
  Matrix w1, w2;        // the tensors, or copies made by projection_copy; see projection_copies_weights
  const char *b1, *b2;  // in the element type; null: no bias
  Targets targets;
  char* out;
  int64_t out_row_bytes;
};

// Tiles of 16 chunks per call: more don't fit in the caches beside the weights.
inline constexpr int kProjectionChunkTiles = 4;

// Whether the kernels need a packed copy of a weight matrix with `cols` columns, and the bytes of a packed row.
REFRAG_DECLARE_KERNEL(bool, projection_copies_weights, Element element, int32_t cols);
REFRAG_DECLARE_KERNEL(int64_t, projection_row_bytes, Element element, int32_t cols);

REFRAG_DECLARE_KERNEL(void, projection_copy, Element element, const Matrix& source, int32_t cols, int32_t begin,
                      int32_t end, char* copy);

REFRAG_DECLARE_KERNEL(int64_t, projection_scratch, const ProjectionParams& params);

// Projects targets [first, first + count), at most 16 * kProjectionChunkTiles.
REFRAG_DECLARE_KERNEL(void, project, const ProjectionParams& params, int32_t first, int32_t count, char* scratch);

// out[row] = table[token_ids[row]] * scale, for rows [begin, end) without a slot.
struct GatherParams {
  Element element;
  const int64_t* token_ids;
  const int32_t* slot_of_row;
  Matrix table;
  int32_t hidden_size;
  float scale;
  char* out;
  int64_t out_row_bytes;
};

REFRAG_DECLARE_KERNEL(void, gather_text, const GatherParams& params, int32_t begin, int32_t end);

}  // namespace refrag::cpu
