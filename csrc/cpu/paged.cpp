// paged_attention, append_kv and merge_states on the CPU: checks arguments, allocates memory and runs the kernels of
// csrc/cpu/kernels/paged_*.cpp on torch's threads.
//
// The values of page tables, lengths, offsets and ranges are checked here before any work starts, because a wrong one
// would read or write outside the cache. The error only names the argument; refrag_kernels/paged_values.py finds the
// value.
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

// Split states up to this size are kept for the next call.
constexpr int64_t kMaxRetainedBytes = int64_t{64} << 20;

// Least work per task, in elements of keys and values times the rows that attend to them: less is not worth handing to
// another thread.
constexpr int64_t kMinTaskWork = int64_t{1} << 17;

// Tasks per thread: enough that the last ones to finish are short.
constexpr int64_t kTasksPerThread = 4;

const int32_t* indices(const char* name, const Tensor& tensor, int64_t num_dims) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Int && tensor.dim() == num_dims, name, ": needs ", num_dims,
                  "-dimensional int32");
  STD_TORCH_CHECK(tensor.size(num_dims - 1) <= 1 || tensor.stride(num_dims - 1) == 1, name,
                  ": needs a contiguous last dimension");
  return static_cast<const int32_t*>(tensor.const_data_ptr());
}

void check_rows(const char* name, const Tensor& tensor, int64_t num_dims, Element element) {
  STD_TORCH_CHECK(tensor.dim() == num_dims && element_of(tensor) == element, name, ": needs ", num_dims,
                  " dimensions and the same dtype as the other tensors");
  STD_TORCH_CHECK(tensor.size(num_dims - 1) <= 1 || tensor.stride(num_dims - 1) == 1, name,
                  ": needs a contiguous last dimension");
}

// The paged cache and its tables, as both ops take them.
struct Cache {
  Element element;
  PagedPages k, v;
  int64_t num_pages, page_size, heads, head_dim, sequences, max_pages;
  const int32_t *table, *lengths, *offsets;  // offsets: null if each sequence has one row
  int64_t table_stride;

  Cache(const Tensor& k_pages, const Tensor& v_pages, const Tensor& page_table, const Tensor& kv_lengths,
        const std::optional<Tensor>& q_offsets)
      : element(element_of(k_pages)) {
    check_rows("k_pages", k_pages, 4, element);
    check_rows("v_pages", v_pages, 4, element);
    for (int i = 0; i < 4; ++i) {
      STD_TORCH_CHECK(k_pages.size(i) == v_pages.size(i), "v_pages: needs the shape of k_pages");
    }
    num_pages = k_pages.size(0);
    page_size = k_pages.size(1);
    heads = k_pages.size(2);
    head_dim = k_pages.size(3);
    STD_TORCH_CHECK(
        page_size > 0 && heads > 0 && head_dim > 0 && head_dim % 8 == 0 && head_dim <= 256,
        "k_pages: needs pages and heads that are not empty, and a head_dim that is a multiple of 8 up to 256");
    k = page_view(k_pages);
    v = page_view(v_pages);
    table = indices("page_table", page_table, 2);
    lengths = indices("kv_lengths", kv_lengths, 1);
    sequences = kv_lengths.size(0);
    max_pages = page_table.size(1);
    table_stride = page_table.stride(0);
    STD_TORCH_CHECK(page_table.size(0) == sequences, "page_table: needs one row per sequence");
    offsets = q_offsets ? indices("q_offsets", *q_offsets, 1) : nullptr;
    STD_TORCH_CHECK(!q_offsets || q_offsets->size(0) == sequences + 1,
                    "q_offsets: needs one more value than there are sequences");
  }

  int64_t first_row(int64_t sequence) const { return offsets == nullptr ? sequence : offsets[sequence]; }
  int64_t rows(int64_t sequence) const { return first_row(sequence + 1) - first_row(sequence); }

  // An `append` needs only the pages of the new rows; attention needs those of all keys, and allows rows without keys.
  void check_values(int64_t num_rows, bool append) const {
    STD_TORCH_CHECK(first_row(0) == 0 && first_row(sequences) == num_rows,
                    "q_offsets: needs to go from 0 to the number of rows");
    for (int64_t b = 0; b < sequences; ++b) {
      const int64_t length = lengths[b], count = rows(b);
      STD_TORCH_CHECK(length >= 0 && length <= max_pages * page_size,
                      "kv_lengths: needs 0 to max_pages * page_size keys");
      STD_TORCH_CHECK(count >= 0, "q_offsets: needs to be ascending");
      STD_TORCH_CHECK(count <= length || (!append && (length == 0 || offsets == nullptr)),
                      "kv_lengths: needs at least as many keys as rows");
      const int64_t pages = (length + page_size - 1) / page_size;
      bool fits = true;
      for (int64_t page_index = append ? (length - count) / page_size : 0; page_index < pages; ++page_index) {
        fits &= static_cast<uint32_t>(table[b * table_stride + page_index]) < static_cast<uint64_t>(num_pages);
      }
      STD_TORCH_CHECK(fits, "page_table: needs pages within k_pages");
    }
  }

 private:
  PagedPages page_view(const Tensor& tensor) const {
    const int64_t bytes = bytes_of(element);
    return {static_cast<const char*>(tensor.const_data_ptr()), tensor.stride(0) * bytes, tensor.stride(1) * bytes,
            tensor.stride(2) * bytes};
  }
};

void check_ranges(const int32_t* indptr, int64_t rows, const int32_t* ranges, int64_t stride, int64_t count) {
  STD_TORCH_CHECK(indptr[0] == 0 && indptr[rows] <= count,
                  "visible.indptr: needs to start at 0 and stay within the ranges");
  for (int64_t row = 0; row < rows; ++row) {
    STD_TORCH_CHECK(indptr[row] <= indptr[row + 1] && indptr[row + 1] <= count,
                    "visible.indptr: needs to be ascending");
    int32_t end = 0;
    bool sorted = true;
    for (int64_t i = indptr[row]; i < indptr[row + 1]; ++i) {
      sorted &= ranges[i * stride] >= end && ranges[i * stride + 1] >= ranges[i * stride];
      end = ranges[i * stride + 1];
    }
    STD_TORCH_CHECK(sorted, "visible.ranges: needs sorted and disjoint ranges in each row");
  }
}

// A block of query rows and heads with its keys. The unit of scheduling: one task runs all of its splits in order, or
// each split is a task of its own.
struct WorkItem {
  PagedBlock block;
  int first_key, last_key;  // first_key is the start of a split
  int splits;
  bool sequential;    // whether one task runs all splits
  int64_t states;     // otherwise: offset of the splits' states, in floats,
  int64_t remaining;  // and index of the counter of splits that are not done yet
};

struct Task {
  int64_t item;
  int split;  // -1: all splits
  int64_t work;
};

class Attention {
 public:
  Attention(const PagedParams& params, const Cache& cache, int64_t num_rows)
      : params_(params), cache_(cache), threads_(std::max<int64_t>(1, torch::stable::get_num_threads())) {
    make_work_items(num_rows);
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
      const WorkItem& item = work_items_[task.item];
      const int64_t size = floats(params_, item.block);
      // The kernel's scratch memory, and two states.
      const int64_t bytes = scratch_bytes(params_, item.block);
      char* scratch = kept_scratch.at_least(bytes + 2 * size * 4);
      float* total = reinterpret_cast<float*>(scratch + bytes);
      if (task.split >= 0) {
        float* partial = states + item.states + task.split * size;
        split(params_, item.block, split_start(item, task.split), split_start(item, task.split + 1), partial, scratch);
        // The task that finishes the last split merges all of them.
        if (remaining[item.remaining].fetch_sub(1, std::memory_order_acq_rel) > 1) return;
      }
      empty(params_, item.block, total);
      for (int i = 0; i < item.splits; ++i) {
        float* partial = item.sequential ? total + size : states + item.states + i * size;
        if (item.sequential)
          split(params_, item.block, split_start(item, i), split_start(item, i + 1), partial, scratch);
        merge(params_, item.block, total, partial);
      }
      finish(params_, item.block, total);
    });
    kept_states.trim(kMaxRetainedBytes);
  }

 private:
  int split_keys(const PagedBlock& block) const {
    return block.rows * params_.group > kPagedMaxSmallM ? kPagedLargeMSplit : kPagedSmallMSplit;
  }

  int split_start(const WorkItem& item, int split) const {
    return static_cast<int>(std::min<int64_t>(item.first_key + int64_t{split} * split_keys(item.block), item.last_key));
  }

  // Keys times rows, plus a constant for the cost of reading a key.
  int64_t work(const WorkItem& item, int64_t keys) const {
    return keys * item.block.heads * params_.head_dim * (2 + int64_t{item.block.rows} * params_.group);
  }

  void add_blocks(int64_t sequence, int heads) {
    const int64_t rows = cache_.rows(sequence), max_rows = std::max(1, kPagedMaxRows / params_.group);
    const int64_t blocks = (rows + max_rows - 1) / max_rows;
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t first = rows * i / blocks, last = rows * (i + 1) / blocks;
      WorkItem item{};
      item.block.table = cache_.table + sequence * cache_.table_stride;
      item.block.first_row = cache_.first_row(sequence) + first;
      item.block.rows = static_cast<int>(last - first);
      item.block.position = static_cast<int>(cache_.lengths[sequence] - rows + first);
      item.block.heads = heads;
      const int split = split_keys(item.block);
      item.last_key = std::max(0, item.block.position + item.block.rows);
      if (params_.window_left >= 0) {
        item.first_key = static_cast<int>(std::max<int64_t>(0, int64_t{item.block.position} - params_.window_left));
        item.first_key = item.first_key / split * split;
      }
      item.splits = (item.last_key - item.first_key + split - 1) / split;
      work_items_.push_back(item);
    }
  }

  void make_work_items(int64_t num_rows) {
    work_items_.reserve(std::max<int64_t>(cache_.sequences, num_rows * params_.group / kPagedMaxRows));
    const int heads = static_cast<int>(cache_.heads);
    for (int64_t b = 0; b < cache_.sequences; ++b) add_blocks(b, heads);
    // One item has all heads of its keys, because they are adjacent in memory. It has fewer heads if there would be too
    // few tasks, and one head if the kernel is compute-bound. The result of a head does not depend on this.
    int64_t splits = 0;
    for (const WorkItem& item : work_items_) splits += std::max(1, item.splits);
    int heads_per_item = heads;
    while (heads_per_item > 1 &&
           splits * ((heads + heads_per_item - 1) / heads_per_item) < kTasksPerThread * threads_) {
      heads_per_item = (heads_per_item + 1) / 2;
    }
    const size_t num_blocks = work_items_.size();
    for (size_t i = 0; i < num_blocks; ++i) {
      const int each = work_items_[i].block.rows * params_.group > kPagedMaxSmallM ? 1 : heads_per_item;
      work_items_[i].block.heads = std::min(each, heads);
      for (int head = each; head < heads; head += each) {
        WorkItem item = work_items_[i];
        item.block.first_head = head;
        item.block.heads = std::min(each, heads - head);
        work_items_.push_back(item);
      }
    }
  }

  void make_tasks() {
    int64_t total_work = 0;
    for (const WorkItem& item : work_items_) total_work += work(item, item.last_key - item.first_key);
    const auto floats = REFRAG_KERNEL(paged_state_floats);
    for (size_t i = 0; i < work_items_.size(); ++i) {
      WorkItem& item = work_items_[i];
      const int64_t item_work = work(item, item.last_key - item.first_key);
      item.sequential = item.splits <= 1 || threads_ == 1 || item_work * kTasksPerThread * threads_ <= total_work;
      if (item.sequential) {
        tasks_.push_back({static_cast<int64_t>(i), -1, item_work});
        continue;
      }
      item.states = state_floats_;
      state_floats_ += item.splits * floats(params_, item.block);
      item.remaining = static_cast<int64_t>(counters_.size());
      counters_.push_back(item.splits);
      for (int split = 0; split < item.splits; ++split) {
        tasks_.push_back(
            {static_cast<int64_t>(i), split, work(item, split_start(item, split + 1) - split_start(item, split))});
      }
    }
    const auto more_expensive = [](const Task& a, const Task& b) { return a.work > b.work; };
    if (!std::is_sorted(tasks_.begin(), tasks_.end(), more_expensive)) {
      std::stable_sort(tasks_.begin(), tasks_.end(), more_expensive);
    }
    const int64_t count = std::max<int64_t>(1, static_cast<int64_t>(tasks_.size()));
    grain_ = std::clamp<int64_t>(kMinTaskWork / (total_work / count + 1), 1, count);
  }

  PagedParams params_;
  const Cache& cache_;
  int64_t threads_, grain_ = 1, state_floats_ = 0;
  std::vector<WorkItem> work_items_;
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
          static_cast<const char*>(lse.const_data_ptr()), lse.stride(0) * 4,     lse.stride(1) * 4};
}

Tensor empty_out(const Tensor& like) {
  return torch::stable::new_empty(like, {like.size(0), like.size(1), like.size(2)});
}

Tensor empty_lse(const Tensor& like) {
  return torch::stable::new_empty(like, {like.size(0), like.size(1)}, ScalarType::Float);
}

// Calls rows(first, last) for all rows of [T, H, D], in chunks of about kMinTaskWork.
template <class F>
void run_rows(const Tensor& like, const F& rows) {
  const int64_t count = like.size(0);
  const int64_t each = std::max<int64_t>(1, kMinTaskWork / std::max<int64_t>(1, like.size(1) * like.size(2)));
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
  STD_TORCH_CHECK(q.size(2) == cache.head_dim && heads % cache.heads == 0,
                  "q: needs the head_dim of k_pages and a multiple of its heads");
  cache.check_values(rows, false);
  PagedParams p{};
  p.element = cache.element;
  p.q = static_cast<const char*>(q.const_data_ptr());
  p.q_row_bytes = q.stride(0) * bytes;
  p.q_head_bytes = q.stride(1) * bytes;
  p.k = cache.k;
  p.v = cache.v;
  p.page_size = static_cast<int>(std::min<int64_t>(cache.page_size, std::numeric_limits<int>::max()));
  p.group = static_cast<int>(heads / cache.heads);
  p.head_dim = static_cast<int>(cache.head_dim);
  if (visible_indptr) {
    STD_TORCH_CHECK(visible_ranges && visible_indptr->size(0) == rows + 1,
                    "visible: needs indptr [T_q + 1] and ranges");
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
    STD_TORCH_CHECK(source->size(0) == k.size(0) && source->size(1) == cache.heads && source->size(2) == cache.head_dim,
                    "k, v: need the same number of rows, and the heads and head_dim of k_pages");
  }
  cache.check_values(k.size(0), true);
  const PagedPages* targets[] = {&cache.k, &cache.v};
  char* to_data[] = {static_cast<char*>(k_pages.mutable_data_ptr()), static_cast<char*>(v_pages.mutable_data_ptr())};
  const int64_t bytes = bytes_of(cache.element), head_bytes = cache.head_dim * bytes;
  // A task appends up to kRows rows of one sequence. New rows have distinct destinations unless sequences share a page,
  // and shared pages must not be written.
  constexpr int64_t kRows = 64;
  std::vector<std::pair<int64_t, int64_t>> pieces;  // sequence, first row among its new rows
  for (int64_t b = 0; b < cache.sequences; ++b) {
    for (int64_t row = 0; row < cache.rows(b); row += kRows) pieces.emplace_back(b, row);
  }
  const int64_t work = std::max<int64_t>(1, std::min(kRows, k.size(0)) * cache.heads * cache.head_dim);
  run_tasks(static_cast<int64_t>(pieces.size()), std::max<int64_t>(1, kMinTaskWork / work), [&](int64_t index) {
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
        const int64_t page_id = cache.table[b * cache.table_stride + position / cache.page_size];
        const char* from = from_data + (cache.first_row(b) + row) * from_row;
        char* to = to_data[which] + page_id * target.page_bytes + position % cache.page_size * target.row_bytes;
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
  p.head_dim = static_cast<int>(out_a.size(2));
  Tensor out = empty_out(out_a);
  Tensor lse = empty_lse(out_a);
  p.out = static_cast<char*>(out.mutable_data_ptr());
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  run_rows(out_a,
           [&, merge = REFRAG_KERNEL(merge_states_rows)](int64_t first, int64_t last) { merge(p, first, last); });
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
  p.head_dim = static_cast<int>(out_a.size(2));
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
