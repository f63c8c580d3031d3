// Groups consecutive blocks of a plan, by one sweep over the sorted lists of a group's blocks.
#include "tile_lists.h"

#include <algorithm>
#include <limits>

namespace refrag::planner {

namespace {

constexpr int32_t kNever = std::numeric_limits<int32_t>::max();

// The position of the sweep in the lists of one block.
struct Cursor {
  const Interval *full, *full_end;
  const TransposedTile *partial, *partial_end;

  void advance(int32_t row) {
    while (full != full_end && full->end <= row) ++full;
    while (partial != partial_end && partial->block < row) ++partial;
  }
  // Returns the first row at or after `row` in the block's lists.
  int32_t next(int32_t row) const {
    const int32_t in_full = full == full_end ? kNever : std::max(full->start, row);
    return partial == partial_end ? in_full : std::min(in_full, partial->block);
  }
  int32_t code(int32_t row) const {
    if (full != full_end && full->start <= row) return kFull;
    return partial != partial_end && partial->block == row ? partial->tile : kSkipped;
  }
};

TileLists list_groups(const Side& side, int32_t group) {
  TileLists lists{group, {}, {}, {}, {}};
  int32_t steps = 0;
  const auto mark = [&] {
    const int32_t number = static_cast<int32_t>(lists.work_items.size());
    lists.work_items.push_back({static_cast<int32_t>(lists.ranges.size()),
                                static_cast<int32_t>(lists.partial_tiles.size() / (2 + group)), steps, number, -1});
  };
  std::vector<Cursor> cursors;
  std::vector<int32_t> codes(group);
  mark();
  for (int32_t first = 0; first < side.num_blocks; first += group) {
    const int32_t last = std::min(first + group, side.num_blocks);
    // Blocks of two sequences may share a group, but have no rows in common: process one sequence after the other.
    for (int32_t begin = first, end; begin < last; begin = end) {
      const int32_t other_start = side.blocks[begin].other_start;
      int32_t other_end = other_start;
      end = begin;
      cursors.clear();
      // A sequence without rows on the other side has the same start as the next one; its blocks have empty lists.
      for (; end < last && side.blocks[end].other_start == other_start; ++end) {
        other_end = std::max(other_end, other_start + side.blocks[end].other_count);
        cursors.push_back({side.full_ranges + side.full_offsets[end], side.full_ranges + side.full_offsets[end + 1],
                           side.partial_tiles.data() + side.partial_offsets[end],
                           side.partial_tiles.data() + side.partial_offsets[end + 1]});
      }
      const bool whole_group = begin == first && end == last;
      const auto emit = [&](int32_t row) {
        lists.partial_tiles.push_back(row);
        lists.partial_tiles.push_back(std::min(kTile, other_end - row));
        lists.partial_tiles.insert(lists.partial_tiles.end(), codes.begin(), codes.end());
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
          steps += (steps_end - row) / kStep;
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

// Returns the steps of a work item: those of its ranges, and one for every four partial tiles.
int32_t work_of(const WorkItem& item, const WorkItem& next) {
  constexpr int32_t kTilesPerStep = kStep / kTile;
  return next.steps - item.steps + (next.partial_tile - item.partial_tile + kTilesPerStep - 1) / kTilesPerStep;
}

// Cuts groups into parts of up to `most` steps: ranges at multiples of a step, partial tiles at multiples of four.
void split_groups(TileLists& lists, int32_t most) {
  const std::vector<WorkItem> groups = std::move(lists.work_items);
  const std::vector<Interval> ranges = std::move(lists.ranges);
  lists.work_items.clear();
  lists.ranges.clear();
  int32_t steps = 0;
  for (size_t i = 0; i + 1 < groups.size(); ++i) {
    const WorkItem &group = groups[i], &next = groups[i + 1];
    const bool cut = work_of(group, next) > most;
    int32_t left = 0, tile = group.partial_tile;  // left: steps that still fit in the current part
    const auto start = [&] {
      const int32_t partial = cut ? static_cast<int32_t>(lists.partials.size()) : -1;
      if (cut) lists.partials.push_back(group.group);
      lists.work_items.push_back({static_cast<int32_t>(lists.ranges.size()), tile, steps, group.group, partial});
      left = cut ? most : kNever;
    };
    start();
    for (int32_t range = group.range; range < next.range; ++range) {
      for (int32_t row = ranges[range].start; row < ranges[range].end;) {
        if (left == 0) start();
        const int32_t taken = std::min(left, (ranges[range].end - row) / kStep);
        lists.ranges.push_back({row, row + taken * kStep});
        row += taken * kStep;
        steps += taken;
        left -= taken;
      }
    }
    for (; cut && tile < next.partial_tile; --left) {
      if (left == 0) start();
      tile = std::min(tile + kStep / kTile, next.partial_tile);
    }
  }
  lists.work_items.push_back(groups.back());
  lists.work_items.back().range = static_cast<int32_t>(lists.ranges.size());
}

}  // namespace

TileLists make_tile_lists(const Side& side, int32_t group, bool split) {
  TileLists lists = list_groups(side, group);
  const int64_t groups = static_cast<int64_t>(lists.work_items.size()) - 1;
  if (!split || groups == 0) return lists;
  int64_t work = 0;
  for (int64_t i = 0; i < groups; ++i) work += work_of(lists.work_items[i], lists.work_items[i + 1]);
  split_groups(lists, static_cast<int32_t>(std::max<int64_t>(kLeastSplit, 2 * work / groups)));
  return lists;
}

}  // namespace refrag::planner
