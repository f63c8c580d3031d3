// Tile lists: a plan's 16-row blocks in groups that fill a GPU's tile, with the work that is common to a group apart.
// Derived from the fields of a finished plan, so that a plan can be given to a GPU after it was made.
#pragma once

#include "planner.h"

namespace refrag::planner {

// A GPU kernel takes 64 rows of the other side per step: ranges are made of whole steps, partial tiles fill a step by
// fours.
inline constexpr int32_t kStep = 64;

// What a partial tile says about one block of its group, where it is not an index into Plan::partial_bits.
inline constexpr int32_t kSkipped = -1, kFull = -2;

// One side of a plan: its blocks, and the rows of the other side that they see (or are seen by).
struct Side {
  const Block* blocks;
  int32_t num_blocks;
  const int32_t* full_offsets;
  const Interval* full_ranges;
  const int32_t* partial_offsets;
  std::vector<TransposedTile> partial_tiles;  // first row on the other side, index into partial_bits
};

// What one program of a kernel does: a group, or a part of a group that has much more work than others.
struct WorkItem {
  int32_t range, partial_tile;  // the first ones
  int32_t steps;                // of ranges, in all work items before this one
  int32_t group;
  int32_t partial;  // where a part's sums are stored until they are added up; -1: the item is its whole group
};

struct TileLists {
  int32_t group;                       // blocks per group
  std::vector<WorkItem> work_items;    // [work_items + 1]
  std::vector<Interval> ranges;        // rows that every block of the group sees whole; multiples of kStep long
  std::vector<int32_t> partial_tiles;  // [E, 2 + group]: first row, number of rows, one code per block
  std::vector<int32_t> partials;       // the group of each partial, ascending
};

// With `split`, groups with more than twice the mean work, and at least kLeastSplit steps, are cut into parts.
inline constexpr int32_t kLeastSplit = 8;
TileLists make_tile_lists(const Side& side, int32_t group, bool split);

}  // namespace refrag::planner
