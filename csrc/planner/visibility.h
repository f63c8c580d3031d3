// The keys that the chunks of a sequence may attend to, as sorted disjoint intervals of rows.
#pragma once

#include <unordered_map>
#include <vector>

#include "planner.h"

namespace refrag::planner {

// Chunks of a group attend to the same keys. Intervals are computed on demand, so that a plan for a few query rows does
// not pay for every chunk of a long context.
class Visibility {
 public:
  explicit Visibility(const Problem& problem) : problem_(problem) {}

  void enter_sequence(int32_t sequence);

  // Returns the group of a chunk of the current sequence.
  int32_t group_of(int32_t chunk) const;

  // Returns the keys of a group, as rows counted from the sequence's first row. Valid until the next call.
  const std::vector<Interval>& intervals(int32_t group);

 private:
  Interval rows_of(int32_t chunk) const {
    return {problem_.chunk_offsets[chunk] - first_row_, problem_.chunk_offsets[chunk + 1] - first_row_};
  }
  void enter_passages(int32_t first_chunk, int32_t last_chunk);

  const Problem& problem_;
  int32_t sequence_ = -1, first_row_ = 0, first_chunk_ = 0;
  int32_t current_group_ = -1;
  std::vector<Interval> current_;
  // Passage masks only: the group of each chunk (0: shared text) and each group's own rows.
  std::vector<int32_t> group_of_chunk_;
  std::vector<std::vector<Interval>> own_;
};

}  // namespace refrag::planner
