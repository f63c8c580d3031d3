// paged_attention, append_kv and merge_states on the CPU: checks, memory and threads around the kernels of
// csrc/cpu/kernels/paged_*.cpp.
//
// The values of page tables, lengths, offsets and ranges are checked here, before any work, because a wrong one would
// read or write outside the cache. An error says no more than that: refrag_kernels/paged_values.py finds the culprit.
#include "cpu/paged_kernels.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <memory>

#include "cpu/ops.h"
#include "cpu/tasks.h"
#include "cpu/tensors.h"

namespace refrag::cpu {
namespace {

using torch::headeronly::ScalarType;

// States up to this size are kept for the next call.
constexpr int64_t kKeptBytes = int64_t{64} << 20;

// Work that is worth a trip to another thread and back: key and value numbers times the rows that they meet.
constexpr int64_t kTaskWork = int64_t{1} << 17;

// Tasks for each thread, so that the last ones to finish are short.
constexpr int64_t kTasksPerThread = 4;

const int32_t* indices(const char* name, const Tensor& tensor, int64_t dim) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Int && tensor.dim() == dim, name, ": needs ", dim,
                  "-dimensional int32");
  STD_TORCH_CHECK(tensor.size(dim - 1) <= 1 || tensor.stride(dim - 1) == 1, name,
                  ": needs a contiguous last dimension");
  return static_cast<const int32_t*>(tensor.const_data_ptr());
}

void check_rows(const char* name, const Tensor& tensor, int64_t dim, Element element) {
  STD_TORCH_CHECK(tensor.dim() == dim && element_of(tensor) == element, name, ": needs ", dim,
                  " dimensions and the others' dtype");
  STD_TORCH_CHECK(tensor.size(dim - 1) <= 1 || tensor.stride(dim - 1) == 1, name,
                  ": needs a contiguous last dimension");
}

// The cache and its tables, as both ops take them.
struct Cache {
  Element element;
  PagedPages k, v;
  int64_t num_pages, page, heads, dim, sequences, max_pages;
  const int32_t *table, *lengths, *offsets;  // offsets: null for one row a sequence
  int64_t table_stride;

  Cache(const Tensor& k_pages, const Tensor& v_pages, const Tensor& page_table, const Tensor& kv_lengths,
        const std::optional<Tensor>& q_offsets)
      : element(element_of(k_pages)) {
    check_rows("k_pages", k_pages, 4, element);
    check_rows("v_pages", v_pages, 4, element);
    for (int i = 0; i < 4; ++i) STD_TORCH_CHECK(k_pages.size(i) == v_pages.size(i), "v_pages: needs k_pages' shape");
    num_pages = k_pages.size(0);
    page = k_pages.size(1);
    heads = k_pages.size(2);
    dim = k_pages.size(3);
    STD_TORCH_CHECK(page > 0 && heads > 0 && dim > 0 && dim % 8 == 0 && dim <= 256, "k_pages: shape not supported");
    k = pages(k_pages);
    v = pages(v_pages);
    table = indices("page_table", page_table, 2);
    lengths = indices("kv_lengths", kv_lengths, 1);
    sequences = kv_lengths.size(0);
    max_pages = page_table.size(1);
    table_stride = page_table.stride(0);
    STD_TORCH_CHECK(page_table.size(0) == sequences, "page_table: needs one row a sequence");
    offsets = q_offsets ? indices("q_offsets", *q_offsets, 1) : nullptr;
    STD_TORCH_CHECK(!q_offsets || q_offsets->size(0) == sequences + 1, "q_offsets: needs one value a sequence, and one");
  }

  int64_t first_row(int64_t sequence) const { return offsets == nullptr ? sequence : offsets[sequence]; }
  int64_t rows(int64_t sequence) const { return first_row(sequence + 1) - first_row(sequence); }

  // In an `append` only the new rows' pages are needed; else those of all keys, and rows without keys are allowed.
  void check_values(int64_t num_rows, bool append) const {
    STD_TORCH_CHECK(first_row(0) == 0 && first_row(sequences) == num_rows, "q_offsets: not from 0 to the number of rows");
    for (int64_t b = 0; b < sequences; ++b) {
      const int64_t length = lengths[b], count = rows(b);
      STD_TORCH_CHECK(length >= 0 && length <= max_pages * page, "kv_lengths: out of range");
      STD_TORCH_CHECK(count >= 0, "q_offsets: not ascending");
      STD_TORCH_CHECK(count <= length || (!append && (length == 0 || offsets == nullptr)),
                      "kv_lengths: fewer keys than rows");
      const int64_t used = (length + page - 1) / page;
      bool fits = true;
      for (int64_t slot = append ? (length - count) / page : 0; slot < used; ++slot) {
        fits &= static_cast<uint32_t>(table[b * table_stride + slot]) < static_cast<uint64_t>(num_pages);
      }
      STD_TORCH_CHECK(fits, "page_table: a page outside k_pages");
    }
  }

 private:
  PagedPages pages(const Tensor& tensor) const {
    const int64_t bytes = bytes_of(element);
    return {static_cast<const char*>(tensor.const_data_ptr()), tensor.stride(0) * bytes, tensor.stride(1) * bytes,
            tensor.stride(2) * bytes};
  }
};

void check_ranges(const int32_t* indptr, int64_t rows, const int32_t* ranges, int64_t stride, int64_t count) {
  STD_TORCH_CHECK(indptr[0] == 0 && indptr[rows] <= count, "visible.indptr: not from 0 to the number of ranges");
  for (int64_t row = 0; row < rows; ++row) {
    STD_TORCH_CHECK(indptr[row] <= indptr[row + 1] && indptr[row + 1] <= count, "visible.indptr: not ascending");
    int32_t end = 0;
    bool sorted = true;
    for (int64_t i = indptr[row]; i < indptr[row + 1]; ++i) {
      sorted &= ranges[i * stride] >= end && ranges[i * stride + 1] >= ranges[i * stride];
      end = ranges[i * stride + 1];
    }
    STD_TORCH_CHECK(sorted, "visible.ranges: out of order");
  }
}

// The keys of one block, and the states that they are taken in.
struct Unit {
  PagedBlock block;
  int first_key, last_key;  // the first is the start of a split
  int splits;
  bool walked;      // by one task, which keeps one state; otherwise a task and a state for each split
  int64_t states;   // where the unit's states are, in floats; unused when walked
  int64_t remaining;  // index of the counter of splits that are still to be done
};

struct Task {
  int64_t unit;
  int split;  // -1: all of them
  int64_t work;
};

class Attention {
 public:
  Attention(const PagedParams& params, const Cache& cache, int64_t num_rows)
      : params_(params), cache_(cache), threads_(std::max<int64_t>(1, torch::stable::get_num_threads())) {
    make_units(num_rows);
    make_tasks();
  }

  void run() {
    thread_local Workspace kept_states;
    float* states = reinterpret_cast<float*>(kept_states.at_least(state_floats_ * 4));
    const auto split = REFRAG_KERNEL(paged_split);
    const auto empty = REFRAG_KERNEL(paged_empty);
    const auto merge = REFRAG_KERNEL(paged_merge);
    const auto finish = REFRAG_KERNEL(paged_finish);
    const auto floats = REFRAG_KERNEL(paged_state_floats);
    const auto scratch_bytes = REFRAG_KERNEL(paged_scratch_bytes);
    std::unique_ptr<std::atomic<int>[]> remaining(new std::atomic<int>[counters_.size()]);
    for (size_t i = 0; i < counters_.size(); ++i) remaining[i].store(counters_[i], std::memory_order_relaxed);
    run_tasks(static_cast<int64_t>(tasks_.size()), grain_, [&](int64_t index) {
      thread_local Workspace kept_scratch;
      const Task task = tasks_[index];
      const Unit& unit = units_[task.unit];
      const int64_t size = floats(params_, unit.block);
      // For the kernel, and for two states.
      const int64_t bytes = scratch_bytes(params_, unit.block);
      char* scratch = kept_scratch.at_least(bytes + 2 * size * 4);
      float* total = reinterpret_cast<float*>(scratch + bytes);
      if (task.split >= 0) {
        float* part = states + unit.states + task.split * size;
        split(params_, unit.block, key_of(unit, task.split), key_of(unit, task.split + 1), part, scratch);
        // Whoever does a unit's last split merges them all.
        if (remaining[unit.remaining].fetch_sub(1, std::memory_order_acq_rel) > 1) return;
      }
      empty(params_, unit.block, total);
      for (int i = 0; i < unit.splits; ++i) {
        float* part = unit.walked ? total + size : states + unit.states + i * size;
        if (unit.walked) split(params_, unit.block, key_of(unit, i), key_of(unit, i + 1), part, scratch);
        merge(params_, unit.block, total, part);
      }
      finish(params_, unit.block, total);
    });
    kept_states.trim(kKeptBytes);
  }

 private:
  int split_keys(const PagedBlock& block) const {
    return block.rows * params_.group > kPagedFewRows ? kPagedManyRowsSplit : kPagedFewRowsSplit;
  }

  int key_of(const Unit& unit, int split) const {
    return static_cast<int>(std::min<int64_t>(unit.first_key + int64_t{split} * split_keys(unit.block), unit.last_key));
  }

  // Keys times the rows that they meet, with a little for what every key costs.
  int64_t work(const Unit& unit, int64_t keys) const {
    return keys * unit.block.heads * params_.dim * (2 + int64_t{unit.block.rows} * params_.group);
  }

  void add_blocks(int64_t sequence, int heads) {
    const int64_t rows = cache_.rows(sequence), most = std::max(1, kPagedMaxRows / params_.group);
    const int64_t blocks = (rows + most - 1) / most;
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t first = rows * i / blocks, last = rows * (i + 1) / blocks;
      Unit unit{};
      unit.block.table = cache_.table + sequence * cache_.table_stride;
      unit.block.first_row = cache_.first_row(sequence) + first;
      unit.block.rows = static_cast<int>(last - first);
      unit.block.position = static_cast<int>(cache_.lengths[sequence] - rows + first);
      unit.block.heads = heads;
      const int split = split_keys(unit.block);
      unit.last_key = std::max(0, unit.block.position + unit.block.rows);
      if (params_.window_left >= 0) {
        unit.first_key = static_cast<int>(std::max<int64_t>(0, int64_t{unit.block.position} - params_.window_left));
        unit.first_key = unit.first_key / split * split;
      }
      unit.splits = (unit.last_key - unit.first_key + split - 1) / split;
      units_.push_back(unit);
    }
  }

  void make_units(int64_t num_rows) {
    units_.reserve(std::max<int64_t>(cache_.sequences, num_rows * params_.group / kPagedMaxRows));
    const int heads = static_cast<int>(cache_.heads);
    for (int64_t b = 0; b < cache_.sequences; ++b) add_blocks(b, heads);
    // One task takes all heads of its keys, for they are neighbours in memory. It takes fewer where there are too few
    // tasks, and one where arithmetic is the limit. A head's result doesn't depend on its company.
    int64_t splits = 0;
    for (const Unit& unit : units_) splits += std::max(1, unit.splits);
    int fewer = heads;
    while (fewer > 1 && splits * ((heads + fewer - 1) / fewer) < kTasksPerThread * threads_) fewer = (fewer + 1) / 2;
    const size_t whole = units_.size();
    for (size_t i = 0; i < whole; ++i) {
      const int each = units_[i].block.rows * params_.group > kPagedFewRows ? 1 : fewer;
      units_[i].block.heads = std::min(each, heads);
      for (int head = each; head < heads; head += each) {
        Unit unit = units_[i];
        unit.block.first_head = head;
        unit.block.heads = std::min(each, heads - head);
        units_.push_back(unit);
      }
    }
  }

  void make_tasks() {
    int64_t all = 0;
    for (const Unit& unit : units_) all += work(unit, unit.last_key - unit.first_key);
    const auto floats = REFRAG_KERNEL(paged_state_floats);
    for (size_t i = 0; i < units_.size(); ++i) {
      Unit& unit = units_[i];
      const int64_t mine = work(unit, unit.last_key - unit.first_key);
      unit.walked = unit.splits <= 1 || threads_ == 1 || mine * kTasksPerThread * threads_ <= all;
      if (unit.walked) {
        tasks_.push_back({static_cast<int64_t>(i), -1, mine});
        continue;
      }
      unit.states = state_floats_;
      state_floats_ += unit.splits * floats(params_, unit.block);
      unit.remaining = static_cast<int64_t>(counters_.size());
      counters_.push_back(unit.splits);
      for (int split = 0; split < unit.splits; ++split) {
        tasks_.push_back({static_cast<int64_t>(i), split, work(unit, key_of(unit, split + 1) - key_of(unit, split))});
      }
    }
    const auto costlier = [](const Task& a, const Task& b) { return a.work > b.work; };
    if (!std::is_sorted(tasks_.begin(), tasks_.end(), costlier)) {
      std::stable_sort(tasks_.begin(), tasks_.end(), costlier);
    }
    const int64_t count = std::max<int64_t>(1, static_cast<int64_t>(tasks_.size()));
    grain_ = std::clamp<int64_t>(kTaskWork / (all / count + 1), 1, count);
  }

  PagedParams params_;
  const Cache& cache_;
  int64_t threads_, grain_ = 1, state_floats_ = 0;
  std::vector<Unit> units_;
  std::vector<Task> tasks_;
  std::vector<int> counters_;
};

StatesRows states_of(const Tensor& out, const Tensor& lse, const Tensor& like) {
  check_rows("out", out, 3, element_of(like));
  STD_TORCH_CHECK(lse.scalar_type() == ScalarType::Float && lse.dim() == 2, "lse: needs float32 [T, H]");
  for (int i = 0; i < 3; ++i) STD_TORCH_CHECK(out.size(i) == like.size(i), "out: needs the shape of out_a");
  for (int i = 0; i < 2; ++i) STD_TORCH_CHECK(lse.size(i) == like.size(i), "lse: needs the shape of lse_a");
  const int64_t bytes = bytes_of(element_of(like));
  return {static_cast<const char*>(out.const_data_ptr()), out.stride(0) * bytes, out.stride(1) * bytes,
          static_cast<const char*>(lse.const_data_ptr()), lse.stride(0) * 4, lse.stride(1) * 4};
}

Tensor empty_out(const Tensor& like) {
  return torch::stable::new_empty(like, {like.size(0), like.size(1), like.size(2)});
}

Tensor empty_lse(const Tensor& like) {
  return torch::stable::new_empty(like, {like.size(0), like.size(1)}, ScalarType::Float);
}

// Calls rows(first, last) for all rows of [T, H, D], in pieces.
template <class F>
void run_rows(const Tensor& like, const F& rows) {
  const int64_t count = like.size(0);
  const int64_t each = std::max<int64_t>(1, kTaskWork / std::max<int64_t>(1, like.size(1) * like.size(2)));
  run_tasks((count + each - 1) / each, 1,
            [&](int64_t piece) { rows(piece * each, std::min(count, (piece + 1) * each)); });
}

}  // namespace

std::tuple<Tensor, Tensor> paged_attention(const Tensor& q, const Tensor& k_pages, const Tensor& v_pages,
                                           const Tensor& page_table, const Tensor& kv_lengths,
                                           std::optional<Tensor> q_offsets, std::optional<Tensor> visible_indptr,
                                           std::optional<Tensor> visible_ranges, double scale, double softcap,
                                           int64_t window_left, int64_t /*window_right: causality is tighter*/,
                                           std::optional<Tensor> sinks) {
  const Cache cache(k_pages, v_pages, page_table, kv_lengths, q_offsets);
  check_rows("q", q, 3, cache.element);
  const int64_t rows = q.size(0), heads = q.size(1), bytes = bytes_of(cache.element);
  STD_TORCH_CHECK(q.size(2) == cache.dim && heads % cache.heads == 0, "q: doesn't fit k_pages");
  cache.check_values(rows, false);
  PagedParams p{};
  p.element = cache.element;
  p.q = static_cast<const char*>(q.const_data_ptr());
  p.q_row_bytes = q.stride(0) * bytes;
  p.q_head_bytes = q.stride(1) * bytes;
  p.k = cache.k;
  p.v = cache.v;
  p.page = static_cast<int>(std::min<int64_t>(cache.page, std::numeric_limits<int>::max()));
  p.group = static_cast<int>(heads / cache.heads);
  p.dim = static_cast<int>(cache.dim);
  if (visible_indptr) {
    STD_TORCH_CHECK(visible_ranges && visible_indptr->size(0) == rows + 1, "visible: needs indptr [T_q + 1] and ranges");
    p.visible_indptr = indices("visible.indptr", *visible_indptr, 1);
    p.visible_ranges = indices("visible.ranges", *visible_ranges, 2);
    STD_TORCH_CHECK(visible_ranges->size(1) == 2, "visible.ranges: needs [R, 2]");
    p.range_stride = visible_ranges->stride(0);
    check_ranges(p.visible_indptr, rows, p.visible_ranges, p.range_stride, visible_ranges->size(0));
  }
  p.window_left = static_cast<int>(std::clamp<int64_t>(window_left, -1, std::numeric_limits<int>::max()));
  p.scale = static_cast<float>(scale);
  p.softcap = static_cast<float>(softcap);
  if (sinks) {
    STD_TORCH_CHECK(sinks->scalar_type() == ScalarType::Float && sinks->dim() == 1 && sinks->size(0) == heads &&
                        (heads <= 1 || sinks->stride(0) == 1),
                    "sinks: needs float32 [H_q]");
    p.sinks = static_cast<const float*>(sinks->const_data_ptr());
  }
  p.q_heads = static_cast<int>(heads);
  Tensor out = empty_out(q);
  Tensor lse = empty_lse(q);
  p.out = static_cast<char*>(out.mutable_data_ptr());
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  if (rows > 0 && heads > 0) Attention(p, cache, rows).run();
  return {out, lse};
}

void append_kv(const Tensor& k, const Tensor& v, Tensor k_pages, Tensor v_pages, const Tensor& page_table,
               const Tensor& kv_lengths, const Tensor& q_offsets) {
  const Cache cache(k_pages, v_pages, page_table, kv_lengths, q_offsets);
  const Tensor* sources[] = {&k, &v};
  for (const Tensor* source : sources) {
    check_rows("k, v", *source, 3, cache.element);
    STD_TORCH_CHECK(source->size(0) == k.size(0) && source->size(1) == cache.heads && source->size(2) == cache.dim,
                    "k, v: don't fit the pages");
  }
  cache.check_values(k.size(0), true);
  const PagedPages* targets[] = {&cache.k, &cache.v};
  char* to_data[] = {static_cast<char*>(k_pages.mutable_data_ptr()), static_cast<char*>(v_pages.mutable_data_ptr())};
  const int64_t bytes = bytes_of(cache.element), head_bytes = cache.dim * bytes;
  // A sequence at a time where there are many, else its rows in pieces: new rows go to different places, except where
  // sequences share a page, which the caller must not write to.
  constexpr int64_t kRows = 64;
  std::vector<std::pair<int64_t, int64_t>> pieces;  // sequence, row of its new rows
  for (int64_t b = 0; b < cache.sequences; ++b) {
    for (int64_t row = 0; row < cache.rows(b); row += kRows) pieces.emplace_back(b, row);
  }
  const int64_t work = std::max<int64_t>(1, std::min(kRows, k.size(0)) * cache.heads * cache.dim);
  run_tasks(static_cast<int64_t>(pieces.size()), std::max<int64_t>(1, kTaskWork / work), [&](int64_t index) {
    const auto [b, first] = pieces[index];
    const int64_t last = std::min(first + kRows, cache.rows(b));
    for (int which = 0; which < 2; ++which) {
      const Tensor& source = *sources[which];
      const PagedPages& target = *targets[which];
      const char* from_data = static_cast<const char*>(source.const_data_ptr());
      const int64_t from_head = source.stride(1) * bytes, from_row = source.stride(0) * bytes;
      const bool whole = cache.heads == 1 || (from_head == head_bytes && target.head_bytes == head_bytes);
      for (int64_t row = first; row < last; ++row) {
        const int64_t position = cache.lengths[b] - cache.rows(b) + row;
        const int64_t page = cache.table[b * cache.table_stride + position / cache.page];
        const char* from = from_data + (cache.first_row(b) + row) * from_row;
        char* to = to_data[which] + page * target.page_bytes + position % cache.page * target.row_bytes;
        if (whole) {
          std::memcpy(to, from, cache.heads * head_bytes);
          continue;
        }
        for (int64_t head = 0; head < cache.heads; ++head) {
          std::memcpy(to + head * target.head_bytes, from + head * from_head, head_bytes);
        }
      }
    }
  });
}

std::tuple<Tensor, Tensor> merge_states(const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b,
                                        const Tensor& lse_b) {
  StatesParams p{};
  p.element = element_of(out_a);
  p.a = states_of(out_a, lse_a, out_a);
  p.b = states_of(out_b, lse_b, out_a);
  p.heads = static_cast<int>(out_a.size(1));
  p.dim = static_cast<int>(out_a.size(2));
  Tensor out = empty_out(out_a);
  Tensor lse = empty_lse(out_a);
  p.out = static_cast<char*>(out.mutable_data_ptr());
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  run_rows(out_a, [&, merge = REFRAG_KERNEL(merge_states_rows)](int64_t first, int64_t last) { merge(p, first, last); });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> merge_states_backward(const Tensor& grad_out, const Tensor& grad_lse,
                                                                 const Tensor& out_a, const Tensor& lse_a,
                                                                 const Tensor& out_b, const Tensor& lse_b) {
  StatesBackwardParams p{};
  p.element = element_of(out_a);
  states_of(grad_out, grad_lse, out_a);
  STD_TORCH_CHECK(grad_out.is_contiguous() && grad_lse.is_contiguous(), "grad_out, grad_lse: need to be contiguous");
  p.grad_out = static_cast<const char*>(grad_out.const_data_ptr());
  p.grad_lse = static_cast<const float*>(grad_lse.const_data_ptr());
  p.a = states_of(out_a, lse_a, out_a);
  p.b = states_of(out_b, lse_b, out_a);
  p.heads = static_cast<int>(out_a.size(1));
  p.dim = static_cast<int>(out_a.size(2));
  Tensor grad_out_a = empty_out(out_a), grad_out_b = empty_out(out_a);
  Tensor grad_lse_a = empty_lse(out_a), grad_lse_b = empty_lse(out_a);
  p.grad_out_a = static_cast<char*>(grad_out_a.mutable_data_ptr());
  p.grad_out_b = static_cast<char*>(grad_out_b.mutable_data_ptr());
  p.grad_lse_a = static_cast<float*>(grad_lse_a.mutable_data_ptr());
  p.grad_lse_b = static_cast<float*>(grad_lse_b.mutable_data_ptr());
  run_rows(out_a, [&, merge = REFRAG_KERNEL(merge_states_backward_rows)](int64_t first, int64_t last) {
    merge(p, first, last);
  });
  return {grad_out_a, grad_lse_a, grad_out_b, grad_lse_b};
}

}  // namespace refrag::cpu
