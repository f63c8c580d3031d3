// The backward half of a plan: for each tile of keys, the query blocks that attend to it.
#include "planner.h"

namespace refrag::planner {
using std::size_t;

namespace {

// A key tile that all query rows [start, end) fully attend to.
struct Stretch {
  int32_t tile;
  Interval rows;
};

// Calls visit(row) with the first row of each tile that is in a range of `a` but in none of `b`. Both lists are sorted
// and disjoint.
template <class Visit>
void for_each_missing(const Interval* a, const Interval* a_end, const Interval* b, const Interval* b_end, Visit visit) {
  for (; a != a_end; ++a) {
    int32_t row = a->start;
    while (row < a->end) {
      while (b != b_end && b->end <= row) ++b;
      const int32_t stop = b != b_end && b->start < a->end ? b->start : a->end;
      for (; row < stop; row += kTile) visit(row);
      if (b != b_end && b->start < a->end) row = b->end;
    }
  }
}

}  // namespace

void transpose(const Problem& problem, Plan& plan) {
  std::vector<Stretch> stretches;
  std::vector<int32_t> open;  // per tile of the sequence: first query row of the current stretch
  size_t block = 0;
  int32_t query_start = 0;
  // Partial tiles are stored by their first key; these map a block to the number of its sequence's first tile.
  std::vector<int32_t> first_tile_of_sequence, sequence_of_block(plan.q_blocks.size());

  for (int32_t sequence = 0; sequence < problem.num_sequences; ++sequence) {
    const int32_t key_start = problem.first_row(sequence), key_rows = problem.key_rows(sequence);
    const int32_t query_rows = problem.query_rows(sequence);
    const int32_t first_tile = static_cast<int32_t>(plan.kv_blocks.size());
    first_tile_of_sequence.push_back(first_tile);
    for (int32_t row = 0; row < key_rows; row += kTile) {
      const int32_t count = key_rows - row < kTile ? key_rows - row : kTile;
      plan.kv_blocks.push_back({key_start + row, count, query_start, query_rows});
    }
    open.assign(plan.kv_blocks.size() - first_tile, 0);

    // Compare each block's full ranges with those of the previous block: the cost is proportional to the number of
    // tiles that differ.
    const Interval* ranges = plan.full_ranges.data();
    const Interval *before = nullptr, *before_end = nullptr;
    const int32_t query_end = query_start + query_rows;
    auto tile_of = [&](int32_t row) { return (row - key_start) / kTile; };
    for (; block < plan.q_blocks.size() && plan.q_blocks[block].start < query_end; ++block) {
      sequence_of_block[block] = sequence;
      const Interval* now = ranges + plan.full_offsets[block];
      const Interval* now_end = ranges + plan.full_offsets[block + 1];
      const int32_t start = plan.q_blocks[block].start;
      for_each_missing(before, before_end, now, now_end, [&](int32_t row) {
        stretches.push_back({first_tile + tile_of(row), {open[tile_of(row)], start}});
      });
      for_each_missing(now, now_end, before, before_end, [&](int32_t row) { open[tile_of(row)] = start; });
      before = now;
      before_end = now_end;
    }
    for_each_missing(before, before_end, nullptr, nullptr, [&](int32_t row) {
      stretches.push_back({first_tile + tile_of(row), {open[tile_of(row)], query_end}});
    });
    query_start = query_end;
  }

  // Counting sort by key tile; stable, so a tile's entries stay in the order of their query rows.
  const size_t num_tiles = plan.kv_blocks.size();
  plan.full_t_offsets.assign(num_tiles + 1, 0);
  for (const Stretch& stretch : stretches) ++plan.full_t_offsets[stretch.tile + 1];
  for (size_t i = 0; i < num_tiles; ++i) plan.full_t_offsets[i + 1] += plan.full_t_offsets[i];
  plan.full_t_ranges.resize(stretches.size());
  std::vector<int32_t> next(plan.full_t_offsets.begin(), plan.full_t_offsets.end() - 1);
  for (const Stretch& stretch : stretches) plan.full_t_ranges[next[stretch.tile]++] = stretch.rows;

  auto tile_of_partial = [&](size_t block_index, int32_t tile) {
    return first_tile_of_sequence[sequence_of_block[block_index]] +
           (plan.partial_keys[tile] - plan.q_blocks[block_index].other_start) / kTile;
  };
  plan.partial_t_offsets.assign(num_tiles + 1, 0);
  for (size_t b = 0; b < plan.q_blocks.size(); ++b) {
    for (int32_t tile = plan.partial_offsets[b]; tile < plan.partial_offsets[b + 1]; ++tile) {
      ++plan.partial_t_offsets[tile_of_partial(b, tile) + 1];
    }
  }
  for (size_t i = 0; i < num_tiles; ++i) plan.partial_t_offsets[i + 1] += plan.partial_t_offsets[i];
  plan.partial_t_tiles.resize(plan.partial_keys.size());
  next.assign(plan.partial_t_offsets.begin(), plan.partial_t_offsets.end() - 1);
  for (size_t b = 0; b < plan.q_blocks.size(); ++b) {
    for (int32_t tile = plan.partial_offsets[b]; tile < plan.partial_offsets[b + 1]; ++tile) {
      plan.partial_t_tiles[next[tile_of_partial(b, tile)]++] = {static_cast<int32_t>(b), tile};
    }
  }
}

}  // namespace refrag::planner
