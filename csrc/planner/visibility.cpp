#include "visibility.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace refrag::planner {
namespace {

void append(std::vector<Interval>& intervals, Interval next) {
  if (!intervals.empty() && intervals.back().end == next.start) {
    intervals.back().end = next.end;
  } else {
    intervals.push_back(next);
  }
}

}  // namespace

void check_csr(const Problem& problem, int64_t num_indices) {
  auto fail = [](const std::string& text) { throw std::invalid_argument(text); };
  const int32_t chunks = problem.num_chunks;
  if (problem.indptr[0] != 0 || problem.indptr[chunks] != num_indices) {
    fail("indptr: got first " + std::to_string(problem.indptr[0]) + " and last " +
         std::to_string(problem.indptr[chunks]) + ", needs 0 and the number of indices, " +
         std::to_string(num_indices));
  }
  for (int32_t chunk = 0; chunk < chunks; ++chunk) {
    if (problem.indptr[chunk + 1] < problem.indptr[chunk]) {
      fail("indptr: got " + std::to_string(problem.indptr[chunk + 1]) + " after " +
           std::to_string(problem.indptr[chunk]) + " at chunk " + std::to_string(chunk) + ", needs ascending values");
    }
  }
  for (int32_t sequence = 0; sequence < problem.num_sequences; ++sequence) {
    const int32_t first = problem.sequence_chunks[sequence], last = problem.sequence_chunks[sequence + 1];
    for (int32_t chunk = first; chunk < last; ++chunk) {
      for (int32_t at = problem.indptr[chunk]; at < problem.indptr[chunk + 1]; ++at) {
        const int32_t index = problem.indices[at];
        const bool ascending = at == problem.indptr[chunk] || problem.indices[at - 1] < index;
        if (index >= first && index < last && ascending) continue;
        const std::string where = "indices: got " + std::to_string(index) + " for chunk " + std::to_string(chunk);
        if (index < 0 || index >= chunks) fail(where + ", needs a chunk in [0, " + std::to_string(chunks) + ")");
        if (index < first || index >= last) {
          fail(where + ", needs a chunk of its own sequence " + std::to_string(sequence) + ", in [" +
               std::to_string(first) + ", " + std::to_string(last) + "): a mask can't cross sequences");
        }
        fail(where + " after " + std::to_string(problem.indices[at - 1]) + ", needs ascending values");
      }
    }
  }
}

void Visibility::enter_sequence(int32_t sequence) {
  if (sequence == sequence_) return;
  sequence_ = sequence;
  first_chunk_ = problem_.sequence_chunks[sequence];
  first_row_ = problem_.chunk_offsets[first_chunk_];
  current_group_ = -1;
  if (problem_.kind == MaskKind::passages) enter_passages(first_chunk_, problem_.sequence_chunks[sequence + 1]);
}

void Visibility::enter_passages(int32_t first_chunk, int32_t last_chunk) {
  std::unordered_map<int32_t, int32_t> group_of_passage;
  group_of_chunk_.clear();
  own_.assign(1, {});
  for (int32_t chunk = first_chunk; chunk < last_chunk; ++chunk) {
    const int32_t passage = problem_.passage_of_chunk[chunk];
    int32_t group = 0;
    if (passage >= 0) {
      group = group_of_passage.try_emplace(passage, static_cast<int32_t>(own_.size())).first->second;
      if (group == static_cast<int32_t>(own_.size())) own_.emplace_back();
    }
    group_of_chunk_.push_back(group);
    append(own_[group], rows_of(chunk));
  }
}

int32_t Visibility::group_of(int32_t chunk) const {
  switch (problem_.kind) {
    case MaskKind::full: return 0;
    case MaskKind::passages: return group_of_chunk_[chunk - first_chunk_];
    default: return chunk;
  }
}

const std::vector<Interval>& Visibility::intervals(int32_t group) {
  if (group == current_group_) return current_;
  current_group_ = group;
  current_.clear();
  const int32_t key_rows = problem_.key_rows(sequence_);
  switch (problem_.kind) {
    case MaskKind::full: current_.push_back({0, key_rows}); break;
    case MaskKind::diagonal: current_.push_back(rows_of(group)); break;
    case MaskKind::csr:
      for (int32_t at = problem_.indptr[group]; at < problem_.indptr[group + 1]; ++at) {
        append(current_, rows_of(problem_.indices[at]));
      }
      break;
    case MaskKind::passages:
      if (group == 0) {  // shared text attends to everything
        current_.push_back({0, key_rows});
        break;
      }
      // Shared text and the passage's own rows, merged in row order.
      auto shared = own_[0].begin();
      for (const Interval& own : own_[group]) {
        for (; shared != own_[0].end() && shared->start < own.start; ++shared) append(current_, *shared);
        append(current_, own);
      }
      for (; shared != own_[0].end(); ++shared) append(current_, *shared);
      break;
  }
  return current_;
}

Visible visible_ranges(const Problem& problem, const int32_t* rows, int64_t num_rows) {
  Visible visible;
  Visibility visibility(problem);
  const int32_t* chunks_end = problem.chunk_offsets + problem.num_chunks + 1;
  const int32_t* sequences_end = problem.sequence_chunks + problem.num_sequences + 1;
  for (int64_t i = 0; i < num_rows; ++i) {
    const int32_t chunk =
        static_cast<int32_t>(std::upper_bound(problem.chunk_offsets, chunks_end, rows[i]) - problem.chunk_offsets) - 1;
    const int32_t sequence = static_cast<int32_t>(std::upper_bound(problem.sequence_chunks, sequences_end, chunk) -
                                                  problem.sequence_chunks) -
                             1;
    visibility.enter_sequence(sequence);
    const auto& intervals = visibility.intervals(visibility.group_of(chunk));
    visible.ranges.insert(visible.ranges.end(), intervals.begin(), intervals.end());
    visible.indptr.push_back(static_cast<int32_t>(visible.ranges.size()));
  }
  return visible;
}

}  // namespace refrag::planner
