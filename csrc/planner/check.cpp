// Checks that kernels stay within the tensors of a plan that was assembled by hand.
#include <array>
#include <stdexcept>
#include <string>

#include "planner.h"

namespace refrag::planner {
namespace {

[[noreturn]] void fail(const char* field, int64_t at, const std::string& needs) {
  throw std::invalid_argument(std::string(field) + ": got a wrong entry at " + std::to_string(at) + ", needs " + needs);
}

// Checks that blocks of 1 to 16 rows cover the rows in order, that rows refer to their blocks, and that the rows of the
// other side are in bounds.
void check_blocks(const char* field, const char* rows_field, const Block* blocks, int32_t count,
                  const int32_t* block_of, int32_t rows, int32_t other_rows) {
  int64_t row = 0;
  for (int32_t b = 0; b < count; ++b) {
    const Block& block = blocks[b];
    if (block.start != row || block.count < 1 || block.count > kTile || row + block.count > rows) {
      fail(field, b, "blocks of 1 to 16 rows, one after another");
    }
    if (block.other_start < 0 || block.other_count < 0 || int64_t{block.other_start} + block.other_count > other_rows) {
      fail(field, b, "rows of the other side, of which there are " + std::to_string(other_rows));
    }
    for (int32_t r = 0; r < block.count; ++r, ++row) {
      if (block_of[row] != b) fail(rows_field, row, "the row's block, " + std::to_string(b));
    }
  }
  if (row != rows) fail(field, count, "blocks for all of the " + std::to_string(rows) + " rows");
}

void check_offsets(const char* field, const int32_t* offsets, int32_t blocks, int32_t entries) {
  if (offsets[0] != 0) fail(field, 0, "0");
  for (int32_t b = 0; b < blocks; ++b) {
    if (offsets[b + 1] < offsets[b]) fail(field, b + 1, "ascending values");
  }
  if (offsets[blocks] != entries) fail(field, blocks, std::to_string(entries) + ", as sizes says");
}

// One side's view of the tiles of the other side.
struct Tiles {
  const Block* tiles;
  const int32_t* tile_of;
  const Block* blocks;
  int32_t num_blocks;

  // Whether rows [start, start + count) are whole tiles within a block's rows of the other side. Tiles have at most 16
  // rows, so all of them are full if there are 16 times as many rows as tiles.
  bool whole(const Block& block, int64_t start, int64_t count) const {
    if (start < block.other_start || count < 1 || start + count > int64_t{block.other_start} + block.other_count) {
      return false;
    }
    const int32_t first = tile_of[start], last = tile_of[start + count - 1];
    return tiles[first].start == start && count == int64_t{kTile} * (last - first + 1);
  }

  // Checks that a block's rows of the other side are tiles of 16 rows, except the last one, and the same for all blocks
  // of a sequence.
  void check_sequences(const char* field) const {
    for (int32_t b = 0; b < num_blocks; ++b) {
      const Block& block = blocks[b];
      if (block.other_count == 0) continue;
      const int32_t first = tile_of[block.other_start], last = tile_of[block.other_start + block.other_count - 1];
      const bool fits = tiles[first].start == block.other_start &&
                        tiles[last].start + tiles[last].count == block.other_start + block.other_count &&
                        last - first == (block.other_count - 1) / kTile;
      const bool same = b == 0 || blocks[b - 1].other_count == 0 || blocks[b - 1].other_start != block.other_start ||
                        blocks[b - 1].other_count == block.other_count;
      if (!fits || !same) fail(field, b, "the rows of the other side of its sequence");
    }
  }

  void check_ranges(const char* field, const int32_t* offsets, const Interval* ranges) const {
    for (int32_t b = 0; b < num_blocks; ++b) {
      for (int32_t r = offsets[b]; r < offsets[b + 1]; ++r) {
        if (!whole(blocks[b], ranges[r].start, int64_t{ranges[r].end} - ranges[r].start)) {
          fail(field, r, "whole tiles of rows that the block's sequence has");
        }
      }
    }
  }
};

// Checks the unused rows under a capacity: kernels that don't know the sizes read the planner's fill values there.
void check_rest(const char* field, const int32_t* words, int64_t used, int64_t room, int32_t fill) {
  for (int64_t word = used; word < room; ++word) {
    if (words[word] != fill) fail(field, word, std::to_string(fill) + " beyond what sizes counts");
  }
}

}  // namespace

void check_plan(const PlanArray<const int32_t*>& fields, const PlanArray<int64_t>& rows) {
  const int32_t* sizes = fields[kSizes];
  // Each entry of sizes, and the field whose rows it counts.
  struct Count {
    PlanSize entry;
    PlanField field;
  };
  for (const Count count : {Count{kNumQRows, kQRowBlock},
                            {kNumKvRows, kKvRowBlock},
                            {kNumQBlocks, kQBlocks},
                            {kNumKvBlocks, kKvBlocks},
                            {kNumFullRanges, kFullRanges},
                            {kNumPartialTiles, kPartialKeys},
                            {kNumFullTRanges, kFullTRanges}}) {
    if (sizes[count.entry] < 0 || sizes[count.entry] > rows[count.field]) {
      throw std::invalid_argument("sizes: got " + std::to_string(sizes[count.entry]) + " at " +
                                  std::to_string(count.entry) + ", needs 0 to " + std::to_string(rows[count.field]) +
                                  ", the rows of what it counts");
    }
  }
  const int32_t query_rows = sizes[kNumQRows], key_rows = sizes[kNumKvRows], partial = sizes[kNumPartialTiles];
  const auto* q_blocks = reinterpret_cast<const Block*>(fields[kQBlocks]);
  const auto* kv_blocks = reinterpret_cast<const Block*>(fields[kKvBlocks]);
  check_blocks("q_blocks", "q_row_block", q_blocks, sizes[kNumQBlocks], fields[kQRowBlock], query_rows, key_rows);
  check_blocks("kv_blocks", "kv_row_block", kv_blocks, sizes[kNumKvBlocks], fields[kKvRowBlock], key_rows, query_rows);
  check_offsets("full_offsets", fields[kFullOffsets], sizes[kNumQBlocks], sizes[kNumFullRanges]);
  check_offsets("partial_offsets", fields[kPartialOffsets], sizes[kNumQBlocks], partial);
  check_offsets("full_t_offsets", fields[kFullTOffsets], sizes[kNumKvBlocks], sizes[kNumFullTRanges]);
  check_offsets("partial_t_offsets", fields[kPartialTOffsets], sizes[kNumKvBlocks], partial);

  check_rest("q_row_block", fields[kQRowBlock], query_rows, rows[kQRowBlock], -1);
  check_rest("kv_row_block", fields[kKvRowBlock], key_rows, rows[kKvRowBlock], -1);
  check_rest("q_blocks", fields[kQBlocks], 4 * int64_t{sizes[kNumQBlocks]}, 4 * rows[kQBlocks], 0);
  check_rest("full_offsets", fields[kFullOffsets], sizes[kNumQBlocks] + 1, rows[kFullOffsets], sizes[kNumFullRanges]);
  check_rest("full_ranges", fields[kFullRanges], 2 * int64_t{sizes[kNumFullRanges]}, 2 * rows[kFullRanges], 0);
  check_rest("partial_offsets", fields[kPartialOffsets], sizes[kNumQBlocks] + 1, rows[kPartialOffsets], partial);
  check_rest("partial_keys", fields[kPartialKeys], partial, rows[kPartialKeys], 0);
  check_rest("kv_blocks", fields[kKvBlocks], 4 * int64_t{sizes[kNumKvBlocks]}, 4 * rows[kKvBlocks], 0);
  check_rest("full_t_offsets", fields[kFullTOffsets], sizes[kNumKvBlocks] + 1, rows[kFullTOffsets],
             sizes[kNumFullTRanges]);
  check_rest("full_t_ranges", fields[kFullTRanges], 2 * int64_t{sizes[kNumFullTRanges]}, 2 * rows[kFullTRanges], 0);
  check_rest("partial_t_offsets", fields[kPartialTOffsets], sizes[kNumKvBlocks] + 1, rows[kPartialTOffsets], partial);
  check_rest("partial_t_tiles", fields[kPartialTTiles], 2 * int64_t{partial}, 2 * rows[kPartialTTiles], 0);

  const Tiles keys{kv_blocks, fields[kKvRowBlock], q_blocks, sizes[kNumQBlocks]},
      queries{q_blocks, fields[kQRowBlock], kv_blocks, sizes[kNumKvBlocks]};
  keys.check_sequences("q_blocks");
  queries.check_sequences("kv_blocks");
  keys.check_ranges("full_ranges", fields[kFullOffsets], reinterpret_cast<const Interval*>(fields[kFullRanges]));
  for (int32_t b = 0; b < sizes[kNumQBlocks]; ++b) {
    const Block& block = q_blocks[b];
    for (int32_t i = fields[kPartialOffsets][b]; i < fields[kPartialOffsets][b + 1]; ++i) {
      const int32_t key = fields[kPartialKeys][i];
      const bool in_sequence = key >= block.other_start && key < block.other_start + block.other_count;
      if (!in_sequence || kv_blocks[fields[kKvRowBlock][key]].start != key) {
        fail("partial_keys", i, "the first key of a tile");
      }
    }
  }
  // A range of rows may end with a block of fewer than 16 rows, so only its start has to be aligned.
  const auto* ranges = reinterpret_cast<const Interval*>(fields[kFullTRanges]);
  const auto* tiles = reinterpret_cast<const TransposedTile*>(fields[kPartialTTiles]);
  for (int32_t b = 0; b < sizes[kNumKvBlocks]; ++b) {
    const Block& block = kv_blocks[b];
    const int64_t end = int64_t{block.other_start} + block.other_count;
    for (int32_t r = fields[kFullTOffsets][b]; r < fields[kFullTOffsets][b + 1]; ++r) {
      const bool inside =
          ranges[r].start >= block.other_start && ranges[r].start < ranges[r].end && ranges[r].end <= end;
      if (!inside || q_blocks[fields[kQRowBlock][ranges[r].start]].start != ranges[r].start) {
        fail("full_t_ranges", r, "rows of the tile's sequence, from the first one of a block");
      }
    }
    for (int32_t i = fields[kPartialTOffsets][b]; i < fields[kPartialTOffsets][b + 1]; ++i) {
      if (tiles[i].block < 0 || tiles[i].block >= sizes[kNumQBlocks] || tiles[i].tile < 0 || tiles[i].tile >= partial) {
        fail("partial_t_tiles", i, "a block of rows and an index into partial_keys");
      }
    }
  }
}

}  // namespace refrag::planner
