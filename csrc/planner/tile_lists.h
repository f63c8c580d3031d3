// Tile lists: group a plan's 16-row blocks to fill a GPU's tile, and separate the work that all blocks of a group
// share. They are derived from the fields of a finished plan, so that a plan can be moved to a GPU.
#pragma once

#include "planner.h"

namespace refrag::planner {

// A GPU kernel processes 64 rows of the other side per step: ranges consist of whole steps, and four partial tiles fill
// a step.
inline constexpr int32_t kStep = 64;

// Codes of a partial tile for one block of its group; other codes are indices into Plan::partial_bits.
inline constexpr int32_t kSkipped = -1, kFull = -2;

// One side of a plan: its blocks, and the rows of the other side that they attend to (or that attend to them).
struct Side {
  const Block* blocks;
  int32_t num_blocks;
  const int32_t* full_offsets;
  const Interval* full_ranges;
  const int32_t* partial_offsets;
  std::vector<TransposedTile> partial_tiles;  // first row on the other side, index into partial_bits
};

// The work of one program of a kernel: a group, or a part of a group that has much more work than others.
struct WorkItem {
  int32_t range, partial_tile;  // index of the first one
  int32_t steps;                // in the ranges of all previous work items
  int32_t group;
  int32_t partial;  // the split-KV partial that a part writes its sums to; -1: the item is its whole group
};

struct TileLists {
  int32_t group;                       // blocks per group
  std::vector<WorkItem> work_items;    // [work_items + 1]
  std::vector<Interval> ranges;        // rows that all blocks of the group fully attend to; multiples of kStep long
  std::vector<int32_t> partial_tiles;  // [E, 2 + group]: first row, number of rows, one code per block
  std::vector<int32_t> partials;       // the group of each partial, ascending
};

// With `split`, groups with more than twice the mean work, and at least kLeastSplit steps, are cut into parts.
inline constexpr int32_t kLeastSplit = 8;
TileLists make_tile_lists(const Side& side, int32_t group, bool split);

}  // namespace refrag::planner
