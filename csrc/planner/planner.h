// The planner: turns chunk lengths and a chunk mask into the tiles that attention kernels iterate over. Plain C++, no
// torch.
//
// Rows of each sequence are cut into blocks of 16 query rows and tiles of 16 key rows, both counted from the sequence's
// own first row. A pair of block and tile is skipped, full (every row attends to every key) or partial (16 x 16 mask
// bits).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "plan_fields.h"

namespace refrag::planner {

// Rows in a query block and keys in a tile: the granularity at which every backend follows chunk boundaries (the
// smallest matrix instructions on CPUs and GPUs have 16 rows or keys).
inline constexpr int32_t kTile = 16;

enum class MaskKind : int32_t { full = 0, passages = 1, diagonal = 2, csr = 3 };

struct Problem {
  const int32_t* chunk_offsets;  // [num_chunks + 1], rows of the key layout
  int32_t num_chunks;
  const int32_t* sequence_chunks;  // [num_sequences + 1]
  int32_t num_sequences;
  MaskKind kind;
  const int32_t* passage_of_chunk;  // [num_chunks] for passages
  const int32_t* indptr;            // [num_chunks + 1] for csr
  const int32_t* indices;
  // Number of query rows of each sequence, which are its last rows; null: as many as keys.
  const int32_t* query_lengths;
  // Row i may attend to row j only if i - left <= j <= i + right; negative: no bound. Causal is right = 0.
  int32_t left;
  int32_t right;

  int32_t first_row(int32_t sequence) const { return chunk_offsets[sequence_chunks[sequence]]; }
  int32_t key_rows(int32_t sequence) const { return first_row(sequence + 1) - first_row(sequence); }
  int32_t query_rows(int32_t sequence) const { return query_lengths ? query_lengths[sequence] : key_rows(sequence); }
};

// Throws std::invalid_argument when a CSR mask is malformed or crosses sequences.
void check_csr(const Problem& problem, int64_t num_indices);

struct Interval {
  int32_t start, end;
};

// A block of query rows or a tile of key rows, with its sequence's packed rows on the other side.
struct Block {
  int32_t start, count, other_start, other_count;
};

struct Bits {
  uint32_t words[kTile / 2];  // bit 16 * (r % 2) + c of word r / 2: row r attends to key c
};

struct TransposedTile {
  int32_t block, tile;
};

// The fields are documented in refrag_kernels/plan.py.
struct Plan {
  int32_t query_rows = 0, key_rows = 0, num_sequences = 0;
  std::vector<Block> q_blocks, kv_blocks;
  std::vector<int32_t> full_offsets{0}, partial_offsets{0}, full_t_offsets, partial_t_offsets;
  std::vector<Interval> full_ranges, full_t_ranges;
  std::vector<int32_t> partial_keys;
  std::vector<Bits> partial_bits;
  std::vector<TransposedTile> partial_t_tiles;
};

Plan make_plan(const Problem& problem);

// A value for each field of a plan, by PlanField.
template <class T>
using PlanArray = std::array<T, kNumPlanFields>;

// Throws std::invalid_argument, which names the field, unless the fields of a plan stay within each other's bounds.
// `rows`: the number of rows of each field.
void check_plan(const PlanArray<const int32_t*>& fields, const PlanArray<int64_t>& rows);

// Fills the transposed fields (kv_blocks and *_t_*) from the others.
void transpose(const Problem& problem, Plan& plan);

// The mask's row for some query rows, as intervals counted from the first row of the query's sequence.
struct Visible {
  std::vector<int32_t> indptr{0};
  std::vector<Interval> ranges;
};
Visible visible_ranges(const Problem& problem, const int32_t* rows, int64_t num_rows);

}  // namespace refrag::planner
