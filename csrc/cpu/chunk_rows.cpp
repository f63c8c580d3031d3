// select_chunk_rows on the CPU: scores a chunk's keys by csrc/cpu/kernels/chunk_rows.cpp unless there are scores, ranks
// them and copies the rows that are kept, chunk by chunk, while the keys are in the cache.
#include "cpu/chunk_rows_kernels.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/tasks.h"
#include "cpu/tensors.h"

namespace refrag::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kChunkGrain = 32;  // chunks per task

constexpr uint32_t kLastRow = std::numeric_limits<uint32_t>::max();

// A number that is larger for a better row: by score, NaN below all others, then by the first row.
uint64_t rank_of(float score, uint32_t row) {
  const uint32_t bits = std::bit_cast<uint32_t>(score + 0.0f);  // -0 and 0 are equal
  const uint32_t ascending = score != score ? 0 : bits >> 31 ? ~bits : bits | 0x80000000u;
  return uint64_t{ascending} << 32 | (kLastRow - row);
}

struct Scratch {
  std::vector<float> scores;    // of one chunk and head
  std::vector<uint64_t> ranks;  // likewise
  std::vector<int32_t> rows;    // the rows of a chunk that are kept, [heads][count]
};

thread_local Scratch scratch;

// Writes the `count` best of scratch.scores in their order, counted from `first`.
void choose(int32_t first, int32_t length, int32_t count, int32_t* rows) {
  scratch.ranks.resize(length);
  for (int32_t row = 0; row < length; ++row) scratch.ranks[row] = rank_of(scratch.scores[row], row);
  const auto begin = scratch.ranks.begin(), end = scratch.ranks.end();
  if (count == 1) {
    std::iter_swap(begin, std::max_element(begin, end));
  } else {
    std::nth_element(begin, begin + count, end, std::greater<>());
  }
  for (int32_t i = 0; i < count; ++i) {
    rows[i] = first + static_cast<int32_t>(kLastRow - static_cast<uint32_t>(scratch.ranks[i]));
  }
  std::sort(rows, rows + count);
}

struct Rows {
  const char* data;
  int64_t row_bytes, head_bytes;

  Rows(const char* name, const Tensor& tensor, const Tensor& like) {
    STD_TORCH_CHECK(tensor.dim() == 3 && tensor.scalar_type() == like.scalar_type() && tensor.size(0) == like.size(0) &&
                        tensor.size(1) == like.size(1) && tensor.size(2) == like.size(2),
                    name, ": needs 3 dimensions, and the shape and dtype of k");
    STD_TORCH_CHECK(tensor.stride(2) == 1 || tensor.numel() == 0, name, ": needs a contiguous last dimension");
    const int64_t bytes = bytes_of(element_of(tensor));
    data = static_cast<const char*>(tensor.const_data_ptr());
    row_bytes = tensor.stride(0) * bytes;
    head_bytes = tensor.stride(1) * bytes;
  }
};

const float* table_data(const char* name, const Tensor& table, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(table.dim() == 2 && table.scalar_type() == ScalarType::Float && table.size(0) == rows &&
                      table.size(1) == columns && (table.stride(1) == 1 || columns <= 1),
                  name, ": needs contiguous rows of float32, one for each row of k");
  return static_cast<const float*>(table.const_data_ptr());
}

const int32_t* offsets_data(const char* name, const Tensor& offsets, int64_t count) {
  STD_TORCH_CHECK(offsets.dim() == 1 && offsets.size(0) == count && count > 0 &&
                      offsets.scalar_type() == ScalarType::Int && offsets.is_contiguous(),
                  name, ": needs a contiguous int32 tensor [C + 1]");
  return static_cast<const int32_t*>(offsets.const_data_ptr());
}

std::tuple<Tensor, Tensor, Tensor> select_chunk_rows(const Tensor& k, const Tensor& v, const Tensor& chunk_offsets,
                                                     const Tensor& kept_offsets, int64_t num_kept,
                                                     const std::optional<Tensor>& scores,
                                                     const std::optional<Tensor>& cos,
                                                     const std::optional<Tensor>& sin) {
  const Rows from_k("k", k, k), from_v("v", v, k);
  const int64_t chunks = chunk_offsets.size(0) - 1, heads = k.size(1), row_bytes = k.size(2) * bytes_of(element_of(k));
  ChunkKeys keys{};
  keys.element = element_of(k);
  keys.k = from_k.data;
  keys.row_bytes = from_k.row_bytes;
  keys.head_bytes = from_k.head_bytes;
  STD_TORCH_CHECK(k.size(2) <= 256, "k: got head_dim ", k.size(2), ", needs at most 256");
  keys.head_dim = static_cast<int32_t>(k.size(2));
  if (cos && sin) {
    STD_TORCH_CHECK(cos->dim() == 2 && 2 * cos->size(1) <= k.size(2), "cos: needs at most head_dim / 2 columns");
    keys.half = static_cast<int32_t>(cos->size(1));
    keys.cos = table_data("cos", *cos, k.size(0), keys.half);
    keys.sin = table_data("sin", *sin, k.size(0), keys.half);
    keys.cos_stride = cos->stride(0);
    keys.sin_stride = sin->stride(0);
  }
  STD_TORCH_CHECK(!scores || (scores->dim() == 2 && scores->size(0) == k.size(0) && scores->size(1) == heads &&
                              scores->scalar_type() == ScalarType::Float),
                  "scores: needs a float32 tensor [T, H_kv]");
  const int32_t* starts = offsets_data("chunk_offsets", chunk_offsets, chunks + 1);
  const int32_t* kept = offsets_data("kept_offsets", kept_offsets, chunks + 1);
  // The error message that names the bad value is made in Python.
  bool fits = starts[0] == 0 && starts[chunks] <= k.size(0) && kept[0] == 0 && kept[chunks] <= num_kept;
  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t length = int64_t{starts[c + 1]} - starts[c], count = int64_t{kept[c + 1]} - kept[c];
    fits = fits && length > 0 && count >= 0 && count <= length;
  }
  STD_TORCH_CHECK(fits,
                  "chunk_offsets, kept_offsets: need to ascend from 0, and at most as many rows kept as there are");

  Tensor k_kept = torch::stable::new_empty(k, {num_kept, heads, k.size(2)});
  Tensor v_kept = torch::stable::new_empty(v, {num_kept, heads, k.size(2)});
  Tensor rows = torch::stable::new_empty(chunk_offsets, {num_kept, heads});
  char *to_k = static_cast<char*>(k_kept.mutable_data_ptr()), *to_v = static_cast<char*>(v_kept.mutable_data_ptr());
  int32_t* to_rows = static_cast<int32_t*>(rows.mutable_data_ptr());
  const auto kernel = REFRAG_KERNEL(unlike_mean);
  const auto choose_rows = [&](int64_t c, int64_t head, int32_t* chosen) {
    const int32_t first = starts[c], length = starts[c + 1] - first, count = kept[c + 1] - kept[c];
    if (count == length) return std::iota(chosen, chosen + count, first);
    scratch.scores.resize(length);
    if (scores) {
      const float* score = static_cast<const float*>(scores->const_data_ptr()) + head * scores->stride(1);
      for (int32_t row = 0; row < length; ++row) scratch.scores[row] = score[(first + row) * scores->stride(0)];
    } else {
      kernel(keys, first, first + length, head, scratch.scores.data());
    }
    choose(first, length, count, chosen);
  };
  const auto copy_chunk = [&](int64_t c) {
    const int64_t count = kept[c + 1] - kept[c];
    if (count == 0) return;
    scratch.rows.resize(heads * count);
    for (int64_t head = 0; head < heads; ++head) choose_rows(c, head, scratch.rows.data() + head * count);
    // A loop of its own, without branches that depend on scores, so that the cache misses of several rows overlap.
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t head = 0; head < heads; ++head) {
        const int64_t row = scratch.rows[head * count + i], to = (kept[c] + i) * heads + head;
        to_rows[to] = static_cast<int32_t>(row);
        std::memcpy(to_k + to * row_bytes, from_k.data + row * from_k.row_bytes + head * from_k.head_bytes, row_bytes);
        std::memcpy(to_v + to * row_bytes, from_v.data + row * from_v.row_bytes + head * from_v.head_bytes, row_bytes);
      }
    }
  };
  run_tasks((chunks + kChunkGrain - 1) / kChunkGrain, 1, [&](int64_t task) {
    const int64_t end = std::min(chunks, (task + 1) * kChunkGrain);
    for (int64_t c = task * kChunkGrain; c < end; ++c) copy_chunk(c);
  });
  const int64_t used = kept[chunks] * heads, unused = num_kept * heads - used;
  if (unused > 0) {  // otherwise the results may be empty, and the pointers null
    std::memset(to_k + used * row_bytes, 0, unused * row_bytes);
    std::memset(to_v + used * row_bytes, 0, unused * row_bytes);
    std::fill(to_rows + used, to_rows + used + unused, -1);
  }
  return {k_kept, v_kept, rows};
}

}  // namespace
}  // namespace refrag::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(refrag_cpu, m) {
  m.def(
      "select_chunk_rows(Tensor k, Tensor v, Tensor chunk_offsets, Tensor kept_offsets, int num_kept, Tensor? scores, "
      "Tensor? cos, Tensor? sin) -> (Tensor k_kept, Tensor v_kept, Tensor rows)");
}

STABLE_TORCH_LIBRARY_IMPL(refrag_cpu, CPU, m) {
  m.impl("select_chunk_rows", TORCH_BOX(&refrag::cpu::select_chunk_rows));
}
