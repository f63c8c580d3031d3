// The forward half of a plan: for each block of query rows, its full ranges and its partial tiles.
#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "planner.h"
#include "visibility.h"

namespace refrag::planner {
using std::size_t;

namespace {

constexpr int32_t tile_floor(int32_t row) { return row / kTile; }
constexpr int32_t tile_ceil(int32_t row) { return (row + kTile - 1) / kTile; }

// Consecutive rows of a block whose chunks attend to the same keys.
struct Run {
  int32_t first, last;  // rows [first, last) within the block
  int32_t group;
};

class BlockTiles {
 public:
  BlockTiles(const Problem& problem, Plan& plan) : problem_(problem), plan_(plan) {}

  void enter_sequence(int32_t key_start, int32_t key_rows) {
    key_start_ = key_start;
    key_rows_ = key_rows;
    edge_of_tile_.assign(tile_ceil(key_rows), -1);
  }

  // Adds the keys that `run` may attend to. `position`: of the block, counted from the sequence's first key.
  void add(const Run& run, int32_t position, const std::vector<Interval>& intervals) {
    const int32_t first = position + run.first, last = position + run.last - 1;
    const Interval any{low(first), high(last)};  // keys that any row of the run attends to
    const Interval all{low(last), high(first)};  // keys that all rows of the run attend to
    const uint32_t rows = (1u << run.last) - (1u << run.first);
    auto interval =
        std::partition_point(intervals.begin(), intervals.end(), [&](const Interval& i) { return i.end <= any.start; });
    for (; interval != intervals.end() && interval->start < any.end; ++interval) {
      const int32_t touched_first = tile_floor(std::max(interval->start, any.start));
      const int32_t touched_last = tile_ceil(std::min(interval->end, any.end));
      // Tiles [inner_first, inner_last) are within the interval for every row.
      const int32_t inner_first = std::min(tile_ceil(std::max(interval->start, all.start)), touched_last);
      const int32_t inner_last = std::max(tile_floor(std::min(interval->end, all.end)), inner_first);
      if (inner_first < inner_last) {
        events_.push_back({inner_first, rows});
        events_.push_back({inner_last, rows});
      }
      for (int32_t tile = touched_first; tile < touched_last; ++tile) {
        if (tile == inner_first && inner_first < inner_last) tile = inner_last;
        if (tile < touched_last) add_edge(tile, run, position, *interval);
      }
    }
  }

  // Appends the keys added since the last call to the plan, as the tiles of a block of `rows` query rows.
  void finish(int32_t rows, bool sorted) {
    const uint32_t all_rows = (1u << rows) - 1;
    if (!sorted) std::sort(events_.begin(), events_.end(), [](Event a, Event b) { return a.tile < b.tile; });
    uint32_t current = 0;
    for (size_t at = 0; at < events_.size();) {
      const int32_t tile = events_[at].tile;
      // Rows of different runs differ and a run's intervals are disjoint, so a row's events toggle.
      for (; at < events_.size() && events_[at].tile == tile; ++at) current ^= events_[at].rows;
      if (current == 0) continue;
      const int32_t next = events_[at].tile;
      if (current == all_rows) {
        full_.push_back({tile, next});
      } else {
        for (int32_t partial = tile; partial < next; ++partial) set_rows(edge(partial), current);
      }
    }
    std::sort(edges_.begin(), edges_.end(), [](const Edge& a, const Edge& b) { return a.tile < b.tile; });
    const size_t full_before = full_.size();
    for (const Edge& edge : edges_) {
      edge_of_tile_[edge.tile] = -1;
      if (complete(edge, rows)) {
        full_.push_back({edge.tile, edge.tile + 1});
      } else {
        plan_.partial_keys.push_back(key_start_ + edge.tile * kTile);
        plan_.partial_bits.push_back(edge.bits);
      }
    }
    if (full_.size() > full_before) {
      std::sort(full_.begin(), full_.end(), [](Interval a, Interval b) { return a.start < b.start; });
    }
    int32_t end = -1;
    for (const Interval& range : full_) {
      if (range.start == end) {
        plan_.full_ranges.back().end = key_start_ + range.end * kTile;
      } else {
        plan_.full_ranges.push_back({key_start_ + range.start * kTile, key_start_ + range.end * kTile});
      }
      end = range.end;
    }
    plan_.full_offsets.push_back(static_cast<int32_t>(plan_.full_ranges.size()));
    plan_.partial_offsets.push_back(static_cast<int32_t>(plan_.partial_keys.size()));
    events_.clear();
    edges_.clear();
    full_.clear();
  }

 private:
  struct Event {
    int32_t tile;
    uint32_t rows;
  };
  struct Edge {
    int32_t tile;
    Bits bits;
  };

  int32_t low(int32_t position) const {
    return problem_.left < 0 || position < problem_.left ? 0 : position - problem_.left;
  }
  int32_t high(int32_t position) const {
    return problem_.right < 0 || problem_.right >= key_rows_ - position ? key_rows_ : position + problem_.right + 1;
  }

  Bits& edge(int32_t tile) {
    if (edge_of_tile_[tile] < 0) {
      edge_of_tile_[tile] = static_cast<int32_t>(edges_.size());
      edges_.push_back({tile, {}});
    }
    return edges_[edge_of_tile_[tile]].bits;
  }

  static void set(Bits& bits, int32_t row, uint32_t keys) { bits.words[row / 2] |= keys << (kTile * (row % 2)); }

  static void set_rows(Bits& bits, uint32_t rows) {
    for (int32_t row = 0; row < kTile; ++row) {
      if (rows >> row & 1) set(bits, row, 0xFFFF);
    }
  }

  void add_edge(int32_t tile, const Run& run, int32_t position, const Interval& interval) {
    Bits* bits = nullptr;
    for (int32_t row = run.first; row < run.last; ++row) {
      const int32_t start = std::max({interval.start, low(position + row), tile * kTile}) - tile * kTile;
      const int32_t end = std::min({interval.end, high(position + row), (tile + 1) * kTile}) - tile * kTile;
      if (start >= end) continue;
      if (!bits) bits = &edge(tile);
      set(*bits, row, (1u << end) - (1u << start));
    }
  }

  // Whether every row attends to the whole tile, which adjacent intervals and different runs can add up to. A last tile
  // with fewer than 16 keys is never complete, as no row attends to the missing keys.
  static bool complete(const Edge& edge, int32_t rows) {
    for (int32_t row = 0; row < rows; ++row) {
      if ((edge.bits.words[row / 2] >> (kTile * (row % 2)) & 0xFFFF) != 0xFFFF) return false;
    }
    return true;
  }

  const Problem& problem_;
  Plan& plan_;
  int32_t key_start_ = 0, key_rows_ = 0;
  std::vector<Event> events_;
  std::vector<Edge> edges_;
  std::vector<int32_t> edge_of_tile_;  // index into edges_, -1: none
  std::vector<Interval> full_;         // in tiles
};

void check_size(size_t elements, const char* what) {
  if (elements > static_cast<size_t>(std::numeric_limits<int32_t>::max())) {
    throw std::length_error(std::string("plan_attention: the plan needs more ") + what + " than int32 can count");
  }
}

}  // namespace

Plan make_plan(const Problem& problem) {
  Plan plan;
  plan.num_sequences = problem.num_sequences;
  plan.key_rows = problem.first_row(problem.num_sequences);
  Visibility visibility(problem);
  BlockTiles tiles(problem, plan);
  std::vector<Run> runs;
  for (int32_t sequence = 0; sequence < problem.num_sequences; ++sequence) {
    const int32_t key_start = problem.first_row(sequence), key_rows = problem.key_rows(sequence);
    const int32_t query_rows = problem.query_rows(sequence);
    visibility.enter_sequence(sequence);
    tiles.enter_sequence(key_start, key_rows);
    int32_t chunk = problem.sequence_chunks[sequence];
    for (int32_t begin = 0; begin < query_rows; begin += kTile) {
      const int32_t rows = std::min(kTile, query_rows - begin);
      const int32_t position = key_rows - query_rows + begin;
      runs.clear();
      for (int32_t row = 0; row < rows;) {
        while (problem.chunk_offsets[chunk + 1] - key_start <= position + row) ++chunk;
        const int32_t chunk_end = problem.chunk_offsets[chunk + 1] - key_start - position;
        const int32_t last = std::min(rows, chunk_end);
        const int32_t group = visibility.group_of(chunk);
        if (!runs.empty() && runs.back().group == group) {
          runs.back().last = last;
        } else {
          runs.push_back({row, last, group});
        }
        row = last;
      }
      for (const Run& run : runs) tiles.add(run, position, visibility.intervals(run.group));
      tiles.finish(rows, runs.size() == 1);
      plan.q_blocks.push_back({plan.query_rows + begin, rows, key_start, key_rows});
    }
    plan.query_rows += query_rows;
  }
  check_size(plan.partial_keys.size() * (kTile / 2), "mask words");
  check_size(plan.full_ranges.size() * 2, "full ranges");
  transpose(problem, plan);
  return plan;
}

}  // namespace refrag::planner
