// Groups consecutive blocks of a plan: one sweep over the sorted lists of the blocks of a group.
#include "tile_lists.h"

#include <algorithm>
#include <limits>

namespace refrag::planner {

namespace {

constexpr int32_t kNever = std::numeric_limits<int32_t>::max();

// Where the sweep is in the lists of one block.
struct Cursor {
  const Interval *full, *full_end;
  const TransposedTile *partial, *partial_end;

  void advance(int32_t row) {
    while (full != full_end && full->end <= row) ++full;
    while (partial != partial_end && partial->block < row) ++partial;
  }
  // The first row at or after `row` that the block has to do with.
  int32_t next(int32_t row) const {
    const int32_t in_full = full == full_end ? kNever : std::max(full->start, row);
    return partial == partial_end ? in_full : std::min(in_full, partial->block);
  }
  int32_t code(int32_t row) const {
    if (full != full_end && full->start <= row) return kFull;
    return partial != partial_end && partial->block == row ? partial->tile : kSkipped;
  }
};

}  // namespace

TileLists make_tile_lists(const Side& side, int32_t group) {
  TileLists lists{group, {}, {}, {}};
  const auto mark = [&] {
    lists.offsets.push_back({static_cast<int32_t>(lists.ranges.size()),
                             static_cast<int32_t>(lists.entries.size() / (2 + group))});
  };
  std::vector<Cursor> cursors;
  std::vector<int32_t> codes(group);
  mark();
  for (int32_t first = 0; first < side.num_blocks; first += group) {
    const int32_t last = std::min(first + group, side.num_blocks);
    // Blocks of two sequences may share a group, but they see no row in common: one sequence after the other.
    for (int32_t begin = first, end; begin < last; begin = end) {
      const int32_t other_start = side.blocks[begin].other_start;
      int32_t other_end = other_start;
      end = begin;
      cursors.clear();
      // A sequence without rows on the other side starts where the next one does; it sees nothing either way.
      for (; end < last && side.blocks[end].other_start == other_start; ++end) {
        other_end = std::max(other_end, other_start + side.blocks[end].other_count);
        cursors.push_back({side.full_ranges + side.full_offsets[end], side.full_ranges + side.full_offsets[end + 1],
                           side.partial_tiles.data() + side.partial_offsets[end],
                           side.partial_tiles.data() + side.partial_offsets[end + 1]});
      }
      const bool whole_group = begin == first && end == last;
      const auto emit = [&](int32_t row) {
        lists.entries.push_back(row);
        lists.entries.push_back(std::min(kTile, other_end - row));
        lists.entries.insert(lists.entries.end(), codes.begin(), codes.end());
      };
      int32_t row = other_start;
      for (;;) {
        int32_t next = kNever;
        for (Cursor& cursor : cursors) {
          cursor.advance(row);
          next = std::min(next, cursor.next(row));
        }
        if (next == kNever) break;
        row = next;
        std::fill(codes.begin(), codes.end(), kSkipped);
        bool all_full = whole_group;
        int32_t run_end = kNever;
        for (size_t i = 0; i < cursors.size(); ++i) {
          cursors[i].advance(row);
          const int32_t code = codes[begin - first + i] = cursors[i].code(row);
          all_full = all_full && code == kFull;
          if (code == kFull) run_end = std::min(run_end, cursors[i].full->end);
        }
        if (all_full) {
          const int32_t steps_end = row + (run_end - row) / kStep * kStep;
          if (steps_end > row) lists.ranges.push_back({row, steps_end});
          for (row = steps_end; row < run_end; row += kTile) emit(row);
          row = run_end;
        } else {
          emit(row);
          row += kTile;
        }
      }
    }
    mark();
  }
  return lists;
}

}  // namespace refrag::planner
