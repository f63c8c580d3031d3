// refrag_kernels._planner: Python bindings of the planner. Arrays are passed as addresses of int32 tensors on the CPU,
// which refrag_kernels/plan.py checks and keeps alive, so that neither torch's headers nor numpy are needed here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <stdexcept>

#include "planner.h"
#include "tile_lists.h"

namespace py = pybind11;
using namespace refrag;
using namespace refrag::planner;

namespace {

const int32_t* at(uintptr_t address) { return reinterpret_cast<const int32_t*>(address); }

Problem make_problem(uintptr_t chunk_offsets, int32_t num_chunks, uintptr_t sequence_chunks, int32_t num_sequences,
                     int32_t kind, uintptr_t passages, uintptr_t indptr, uintptr_t indices, int64_t num_indices) {
  Problem problem{at(chunk_offsets),
                  num_chunks,
                  at(sequence_chunks),
                  num_sequences,
                  static_cast<MaskKind>(kind),
                  at(passages),
                  at(indptr),
                  at(indices),
                  nullptr,
                  -1,
                  -1};
  if (problem.kind == MaskKind::csr) check_csr(problem, num_indices);
  return problem;
}

using Sizes = std::array<int32_t, kNumPlanSizes>;

// A field as bytes; `count` is in its rows.
struct Section {
  const void* data;
  size_t count;
  size_t words;  // int32 words per row
};

template <class T>
Section section_of(const T& values) {
  using Row = typename T::value_type;
  static_assert(sizeof(Row) % sizeof(int32_t) == 0);
  return {values.data(), values.size(), sizeof(Row) / sizeof(int32_t)};
}

PlanArray<Section> sections(const Plan& plan, const Sizes& sizes, const std::vector<int32_t>& q_row_block,
                            const std::vector<int32_t>& kv_row_block) {
  PlanArray<Section> all;
  all[kSizes] = section_of(sizes);
  all[kQRowBlock] = section_of(q_row_block);
  all[kKvRowBlock] = section_of(kv_row_block);
  all[kQBlocks] = section_of(plan.q_blocks);
  all[kFullOffsets] = section_of(plan.full_offsets);
  all[kFullRanges] = section_of(plan.full_ranges);
  all[kPartialOffsets] = section_of(plan.partial_offsets);
  all[kPartialKeys] = section_of(plan.partial_keys);
  all[kPartialBits] = section_of(plan.partial_bits);
  all[kKvBlocks] = section_of(plan.kv_blocks);
  all[kFullTOffsets] = section_of(plan.full_t_offsets);
  all[kFullTRanges] = section_of(plan.full_t_ranges);
  all[kPartialTOffsets] = section_of(plan.partial_t_offsets);
  all[kPartialTTiles] = section_of(plan.partial_t_tiles);
  return all;
}

Sizes sizes_of(const Plan& plan) {
  Sizes sizes;
  sizes[kNumQRows] = plan.query_rows;
  sizes[kNumKvRows] = plan.key_rows;
  sizes[kNumQBlocks] = static_cast<int32_t>(plan.q_blocks.size());
  sizes[kNumKvBlocks] = static_cast<int32_t>(plan.kv_blocks.size());
  sizes[kNumFullRanges] = static_cast<int32_t>(plan.full_ranges.size());
  sizes[kNumPartialTiles] = static_cast<int32_t>(plan.partial_keys.size());
  sizes[kNumFullTRanges] = static_cast<int32_t>(plan.full_t_ranges.size());
  sizes[kNumSequences] = plan.num_sequences;
  return sizes;
}

std::vector<int32_t> block_of_row(const std::vector<Block>& blocks) {
  std::vector<int32_t> rows;
  for (size_t i = 0; i < blocks.size(); ++i) rows.insert(rows.end(), blocks[i].count, static_cast<int32_t>(i));
  return rows;
}

// Writes section i to word offsets[i] of the buffer, which has room for rows[i] of its rows. The unused rest is filled
// so that kernels skip it: offsets repeat their last value, rows belong to no block, other fields are 0.
void write_plan(const Plan& plan, uintptr_t buffer, const PlanArray<int64_t>& offsets, const PlanArray<int64_t>& rows) {
  const auto sizes = sizes_of(plan);
  const auto q_row_block = block_of_row(plan.q_blocks), kv_row_block = block_of_row(plan.kv_blocks);
  const auto all = sections(plan, sizes, q_row_block, kv_row_block);
  int32_t* words = reinterpret_cast<int32_t*>(buffer);
  for (size_t field = 0; field < all.size(); ++field) {
    const Section& section = all[field];
    if (static_cast<int64_t>(section.count) > rows[field]) throw std::invalid_argument("plan buffer is too small");
    int32_t* out = words + offsets[field];
    const size_t used = section.count * section.words, room = rows[field] * section.words;
    if (used) std::memcpy(out, section.data, used * sizeof(int32_t));
    int32_t fill = 0;
    if (field == kQRowBlock || field == kKvRowBlock) fill = -1;
    const bool offset =
        field == kFullOffsets || field == kPartialOffsets || field == kFullTOffsets || field == kPartialTOffsets;
    if (offset) fill = out[used - 1];
    for (size_t word = used; word < room; ++word) out[word] = fill;
  }
}

// Returns one side of the plan whose fields are at these addresses.
Side side_of(const PlanArray<uintptr_t>& fields, bool keys) {
  const int32_t* sizes = at(fields[kSizes]);
  const auto* q_blocks = reinterpret_cast<const Block*>(fields[kQBlocks]);
  if (!keys) {
    Side side{q_blocks,
              sizes[kNumQBlocks],
              at(fields[kFullOffsets]),
              reinterpret_cast<const Interval*>(fields[kFullRanges]),
              at(fields[kPartialOffsets]),
              {}};
    side.partial_tiles.reserve(sizes[kNumPartialTiles]);
    for (int32_t tile = 0; tile < sizes[kNumPartialTiles]; ++tile)
      side.partial_tiles.push_back({at(fields[kPartialKeys])[tile], tile});
    return side;
  }
  Side side{
      reinterpret_cast<const Block*>(fields[kKvBlocks]),       sizes[kNumKvBlocks],          at(fields[kFullTOffsets]),
      reinterpret_cast<const Interval*>(fields[kFullTRanges]), at(fields[kPartialTOffsets]), {}};
  const auto* tiles = reinterpret_cast<const TransposedTile*>(fields[kPartialTTiles]);
  side.partial_tiles.reserve(sizes[kNumPartialTiles]);
  for (int32_t i = 0; i < sizes[kNumPartialTiles]; ++i)
    side.partial_tiles.push_back({q_blocks[tiles[i].block].start, tiles[i].tile});
  return side;
}

// Returns the numbers of work items, ranges, partial tiles and partials.
std::array<int64_t, 4> rows_of(const TileLists& lists) {
  return {static_cast<int64_t>(lists.work_items.size()), static_cast<int64_t>(lists.ranges.size()),
          static_cast<int64_t>(lists.partial_tiles.size() / (2 + lists.group)),
          static_cast<int64_t>(lists.partials.size())};
}

// Writes work items, ranges, partial tiles and partials at these word offsets of the buffer, with room for `rows` of
// each. Work items beyond the last one are empty, for groups beyond the last one; partials beyond the last one belong
// to no group (-1). With room for fewer tensors only the first ones are written.
void write_lists(const TileLists& lists, uintptr_t buffer, const std::vector<int64_t>& offsets,
                 const std::vector<int64_t>& rows) {
  static_assert(sizeof(WorkItem) == 5 * sizeof(int32_t));
  const auto used = rows_of(lists);
  const std::array<int64_t, 4> widths{5, 2, 2 + lists.group, 1};
  const std::array<const void*, 4> data{lists.work_items.data(), lists.ranges.data(), lists.partial_tiles.data(),
                                        lists.partials.data()};
  if (offsets.size() != rows.size() || rows.size() > used.size())
    throw std::invalid_argument("tile list buffer has the wrong number of tensors");
  for (size_t i = 0; i < rows.size(); ++i) {
    if (used[i] > rows[i]) throw std::invalid_argument("tile list buffer is too small");
    int32_t* out = reinterpret_cast<int32_t*>(buffer) + offsets[i];
    const int64_t words = used[i] * widths[i], room = rows[i] * widths[i];
    if (words) std::memcpy(out, data[i], words * sizeof(int32_t));
    std::fill(out + words, out + room, i == 3 ? -1 : 0);
  }
  WorkItem* work_items = reinterpret_cast<WorkItem*>(reinterpret_cast<int32_t*>(buffer) + offsets[0]);
  for (int64_t i = used[0]; i < rows[0]; ++i) {
    work_items[i] = work_items[i - 1];
    ++work_items[i].group;
  }
}

}  // namespace

PYBIND11_MODULE(_planner, m) {
  m.doc() = "Builds attention plans from chunk lengths and chunk masks.";
  py::class_<Plan>(m, "Plan").def("sizes", &sizes_of).def("write", &write_plan);
  m.def("plan", [](uintptr_t chunk_offsets, int32_t num_chunks, uintptr_t sequence_chunks, int32_t num_sequences,
                   int32_t kind, uintptr_t passages, uintptr_t indptr, uintptr_t indices, int64_t num_indices,
                   uintptr_t query_lengths, int32_t left, int32_t right) {
    py::gil_scoped_release release;
    Problem problem = make_problem(chunk_offsets, num_chunks, sequence_chunks, num_sequences, kind, passages, indptr,
                                   indices, num_indices);
    problem.query_lengths = at(query_lengths);
    problem.left = left;
    problem.right = right;
    return make_plan(problem);
  });
  m.def("check_plan", [](const PlanArray<uintptr_t>& addresses, const PlanArray<int64_t>& rows) {
    PlanArray<const int32_t*> fields;
    std::transform(addresses.begin(), addresses.end(), fields.begin(), at);
    check_plan(fields, rows);
  });
  py::class_<TileLists>(m, "TileLists").def("rows", &rows_of).def("write", &write_lists);
  m.def("tile_lists", [](const PlanArray<uintptr_t>& fields, bool keys, int32_t group, bool split) {
    py::gil_scoped_release release;
    return make_tile_lists(side_of(fields, keys), group, split);
  });
  py::class_<Visible>(m, "Visible")
      .def("num_ranges", [](const Visible& visible) { return visible.ranges.size(); })
      .def("write", [](const Visible& visible, uintptr_t indptr, uintptr_t ranges) {
        std::memcpy(reinterpret_cast<void*>(indptr), visible.indptr.data(), visible.indptr.size() * sizeof(int32_t));
        if (!visible.ranges.empty()) {
          std::memcpy(reinterpret_cast<void*>(ranges), visible.ranges.data(), visible.ranges.size() * sizeof(Interval));
        }
      });
  m.def("visible", [](uintptr_t chunk_offsets, int32_t num_chunks, uintptr_t sequence_chunks, int32_t num_sequences,
                      int32_t kind, uintptr_t passages, uintptr_t indptr, uintptr_t indices, int64_t num_indices,
                      uintptr_t rows, int64_t num_rows) {
    py::gil_scoped_release release;
    const Problem problem = make_problem(chunk_offsets, num_chunks, sequence_chunks, num_sequences, kind, passages,
                                         indptr, indices, num_indices);
    return visible_ranges(problem, at(rows), num_rows);
  });
}
