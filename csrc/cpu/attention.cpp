// mixed_attention and attention_received on the CPU: checks arguments, allocates memory and runs the kernels of
// csrc/cpu/kernels/attention_*.cpp on torch's threads.
#include "cpu/attention_kernels.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>

#include "cpu/ops.h"
#include "cpu/tasks.h"
#include "cpu/tensors.h"
#include "plan_fields.h"

namespace refrag::cpu {
namespace {

using torch::headeronly::ScalarType;

// Packed keys and values, and gradient accumulators, up to this size are kept for the next call.
constexpr int64_t kMaxRetainedBytes = int64_t{64} << 20;

// Share of a core's L2 cache for keys and values: half of the common 1 MiB.
constexpr int64_t kCacheBytes = int64_t{512} << 10;

// Least work per task, in MACs (multiply-accumulate operations): less is not worth handing to another thread.
constexpr int64_t kMinTaskMacs = int64_t{1} << 19;

HeadRows head_rows(const char* name, const Tensor& tensor, Element element) {
  STD_TORCH_CHECK(tensor.dim() == 3 && element_of(tensor) == element, name, ": needs 3 dimensions and the dtype of q");
  STD_TORCH_CHECK(tensor.stride(2) == 1 || tensor.numel() == 0, name, ": needs a contiguous last dimension");
  const int64_t bytes = bytes_of(element);
  return {static_cast<const char*>(tensor.const_data_ptr()), tensor.stride(0) * bytes, tensor.stride(1) * bytes};
}

// Numbers of rows and blocks in use; a plan made for a capacity has tensors for more.
struct Sizes {
  int32_t q_rows, kv_rows, q_blocks, kv_blocks;
};

const int32_t* field(const std::vector<Tensor>& plan, PlanField which) {
  const Tensor& tensor = plan[which];
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Int && tensor.is_contiguous(),
                  "plan: needs contiguous int32 tensors");
  return static_cast<const int32_t*>(tensor.const_data_ptr());
}

PlanView view(const std::vector<Tensor>& plan, Sizes& sizes) {
  STD_TORCH_CHECK(plan.size() == kNumPlanFields, "plan: got ", plan.size(), " tensors, needs ", int{kNumPlanFields});
  const int32_t* counts = field(plan, kSizes);
  sizes = {counts[kNumQRows], counts[kNumKvRows], counts[kNumQBlocks], counts[kNumKvBlocks]};
  return {sizes.q_blocks,
          sizes.kv_blocks,
          field(plan, kQBlocks),
          field(plan, kFullOffsets),
          field(plan, kFullRanges),
          field(plan, kPartialOffsets),
          field(plan, kPartialKeys),
          reinterpret_cast<const uint32_t*>(field(plan, kPartialBits)),
          field(plan, kKvBlocks),
          field(plan, kKvRowBlock)};
}

// Number of keys that each query block computes scores for, counting whole tiles.
std::vector<int64_t> keys_per_block(const PlanView& plan) {
  std::vector<int64_t> keys(plan.num_blocks);
  for (int32_t block = 0; block < plan.num_blocks; ++block) {
    int64_t visible = kTile * int64_t{plan.partial_offsets[block + 1] - plan.partial_offsets[block]};
    for (int32_t range = plan.full_offsets[block]; range < plan.full_offsets[block + 1]; ++range) {
      visible += plan.full_ranges[2 * range + 1] - plan.full_ranges[2 * range];
    }
    keys[block] = visible;
  }
  return keys;
}

// Number of tasks to hand out at a time, for `macs` MACs in total: all of them where a second thread would not help,
// otherwise few enough to balance the threads, and enough to amortize the cost of handing them out.
int64_t grain_of(int64_t tasks, int64_t macs) {
  if (macs <= kMinTaskMacs) return std::max<int64_t>(1, tasks);
  const int64_t pieces = 8 * int64_t{torch::stable::get_num_threads()};
  return std::max<int64_t>(1, std::min(8 * kMinTaskMacs * tasks / macs, tasks / pieces));
}

// Decides whether kernels read a tensor itself or a packed copy, and makes the copies.
class OperandCopies {
 public:
  OperandCopies(AttentionParams& params, int64_t visits) : params_(params) {
    // Tiles that are visited about once are packed by the kernel on the fly, into its cache.
    copy_ = visits > 2 * int64_t{params.plan.num_tiles};
  }

  void add(Operand& operand, const HeadRows& tensor, Layout layout) {
    if (layout == Layout::in_place) {
      operand = {tensor.data, tensor.row_bytes, tensor.head_bytes, false};
      return;
    }
    for (const CopyRequest& other : requests_) {
      if (other.task.source == tensor && other.task.layout == layout) {
        requests_.push_back({&operand, other.task, true});
        return;
      }
    }
    const int64_t row_bytes = int64_t{params_.padded_head_dim()} * (layout == Layout::bf16_pairs ? 2 : 4);
    requests_.push_back({&operand, {tensor, layout, nullptr, kTile * row_bytes}, false});
  }

  void make(Workspace& workspace) {
    const int64_t tiles = params_.plan.num_tiles;
    int64_t bytes = 0;
    if (copy_) {
      for (const CopyRequest& request : requests_) {
        bytes += request.shared ? 0 : request.task.tile_bytes * tiles * params_.kv_heads;
      }
    }
    char* next = copy_ ? workspace.at_least(bytes) : nullptr;
    const auto pack = REFRAG_KERNEL(attention_pack);
    std::vector<PackTask> tasks;
    for (CopyRequest& request : requests_) {
      if (request.shared) {
        for (const PackTask& task : tasks) {
          if (task.source == request.task.source && task.layout == request.task.layout) request.task.copy = task.copy;
        }
      } else if (copy_) {
        request.task.copy = next;
        next += request.task.tile_bytes * tiles * params_.kv_heads;
        tasks.push_back(request.task);
      }
      const int64_t row_bytes = request.task.tile_bytes / kTile;
      *request.operand = {request.task.copy, row_bytes, request.task.tile_bytes * tiles, true};
    }
    if (tasks.empty()) return;
    const int64_t grain = 1 + kMinTaskMacs / 4 / (kTile * params_.kv_heads * int64_t{params_.head_dim});
    const int64_t pieces = (tiles + grain - 1) / grain;
    run_tasks(pieces, 1, [&](int64_t piece) {
      for (const PackTask& task : tasks) {
        pack(params_, task, static_cast<int32_t>(piece * grain),
             static_cast<int32_t>(std::min(tiles, (piece + 1) * grain)));
      }
    });
  }

 private:
  struct CopyRequest {
    Operand* operand;
    PackTask task;
    bool shared;
  };
  AttentionParams& params_;
  bool copy_;
  std::vector<CopyRequest> requests_;
};

thread_local Workspace copies_workspace;   // of the thread that calls an op
thread_local Workspace accum_workspace;    // likewise
thread_local Workspace scratch_workspace;  // of every thread that runs tasks

AttentionParams params_of(const Tensor& q, const Tensor& k, const Tensor& v, const std::vector<Tensor>& plan,
                          double scale, double softcap, const std::optional<Tensor>& sinks, Sizes& sizes) {
  AttentionParams p{};
  p.element = element_of(q);
  p.q = head_rows("q", q, p.element);
  p.k = head_rows("k", k, p.element);
  p.v = head_rows("v", v, p.element);
  p.heads = static_cast<int32_t>(q.size(1));
  p.kv_heads = static_cast<int32_t>(k.size(1));
  p.head_dim = static_cast<int32_t>(q.size(2));
  STD_TORCH_CHECK(p.head_dim % 8 == 0 && p.head_dim > 0 && p.head_dim <= 256, "q: got head_dim ", p.head_dim,
                  ", needs a multiple of 8 up to 256");
  STD_TORCH_CHECK(p.kv_heads > 0 && p.heads % p.kv_heads == 0, "q: got ", p.heads, " heads, needs a multiple of the ",
                  p.kv_heads, " heads of k");
  STD_TORCH_CHECK(
      k.size(2) == p.head_dim && v.size(2) == p.head_dim && v.size(1) == p.kv_heads && v.size(0) == k.size(0),
      "k, v: need the same shape, and the head_dim of q");
  p.scale = static_cast<float>(scale);
  p.softcap = static_cast<float>(softcap);
  if (sinks) {
    STD_TORCH_CHECK(sinks->scalar_type() == ScalarType::Float && sinks->is_contiguous() && sinks->numel() == p.heads,
                    "sinks: needs a contiguous float32 tensor [H_q]");
    p.sinks = static_cast<const float*>(sinks->const_data_ptr());
  }
  p.plan = view(plan, sizes);
  STD_TORCH_CHECK(plan[kQRowBlock].numel() == q.size(0) && plan[kKvRowBlock].numel() == k.size(0),
                  "plan: was made for other numbers of rows than those of q and k");
  return p;
}

HeadRows rows_like(const char* name, const Tensor& tensor, const Tensor& like) {
  const bool same = tensor.dim() == 3 && tensor.size(0) == like.size(0) && tensor.size(1) == like.size(1) &&
                    tensor.size(2) == like.size(2);
  STD_TORCH_CHECK(same, name, ": needs the shape of q");
  return head_rows(name, tensor, element_of(like));
}

const float* lse_data(const char* name, const Tensor& tensor, const Tensor& q) {
  STD_TORCH_CHECK(
      tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous() && tensor.numel() == q.size(0) * q.size(1),
      name, ": needs a contiguous float32 tensor [T_q, H_q]");
  return static_cast<const float*>(tensor.const_data_ptr());
}

// Clears the rows beyond those in use, which exist under a capacity.
void clear_rows(const Tensor& tensor, int64_t used) {
  if (tensor.size(0) <= used || tensor.numel() == 0) return;
  const int64_t row_bytes = tensor.numel() / tensor.size(0) * static_cast<int64_t>(tensor.element_size());
  std::memset(static_cast<char*>(tensor.mutable_data_ptr()) + used * row_bytes, 0, (tensor.size(0) - used) * row_bytes);
}

// Least number of tasks in a backward pass, as long as a range holds many blocks: enough to balance the threads.
constexpr int64_t kBackwardTasks = 64;

// The ranges of a backward pass, and their accumulator tiles.
struct BlockRanges {
  std::vector<BlockRange> items;
  std::vector<int64_t> cost;
  std::vector<std::vector<int32_t>> accum_tiles;
  std::vector<int32_t> accum_offsets, accum_lists;
  int64_t num_accum_tiles = 0;

  BlockRanges(const PlanView& plan, const std::vector<int64_t>& keys, int32_t kv_heads) {
    const int64_t all_keys = std::accumulate(keys.begin(), keys.end(), int64_t{0});
    const int64_t target_cost = std::max<int64_t>(1, all_keys * kv_heads / kBackwardTasks);
    for (int32_t block = 0; block < plan.num_blocks; ++block) {
      const bool new_sequence = block > 0 && plan.q_blocks[4 * block + 2] != plan.q_blocks[4 * block - 2];
      if (block == 0 || new_sequence || cost.back() >= target_cost) {
        items.push_back({block, block, 0, nullptr, 0, 0});
        cost.push_back(0);
      }
      cost.back() += keys[block];
      items.back().last_block = block + 1;
    }
    for (BlockRange& range : items) number_accum_tiles(plan, range);
    for (size_t i = 0; i < items.size(); ++i) items[i].accum_tiles = accum_tiles[i].data();
    list_accum_tiles(plan);
  }

 private:
  void number_accum_tiles(const PlanView& plan, BlockRange& range) {
    const int32_t* q_block = plan.q_blocks + 4 * int64_t{range.first_block};
    range.first_tile = q_block[3] > 0 ? plan.kv_row_block[q_block[2]] : 0;
    std::vector<int32_t> accum_of_tile((q_block[3] + kTile - 1) / kTile, -1);
    const auto mark = [&](int32_t start, int32_t end) {
      const int32_t first = plan.kv_row_block[start] - range.first_tile;
      std::fill(accum_of_tile.begin() + first, accum_of_tile.begin() + first + (end - start + kTile - 1) / kTile, 0);
    };
    const int32_t first = range.first_block, last = range.last_block;
    for (int32_t r = plan.full_offsets[first]; r < plan.full_offsets[last]; ++r) {
      mark(plan.full_ranges[2 * int64_t{r}], plan.full_ranges[2 * int64_t{r} + 1]);
    }
    for (int32_t i = plan.partial_offsets[first]; i < plan.partial_offsets[last]; ++i) {
      mark(plan.partial_keys[i], plan.partial_keys[i] + 1);
    }
    range.first_accum_tile = static_cast<int32_t>(num_accum_tiles);
    for (int32_t& accum_tile : accum_of_tile) {
      if (accum_tile == 0) accum_tile = range.num_accum_tiles++;
    }
    num_accum_tiles += range.num_accum_tiles;
    accum_tiles.push_back(std::move(accum_of_tile));
  }

  void list_accum_tiles(const PlanView& plan) {
    accum_offsets.assign(plan.num_tiles + 1, 0);
    accum_lists.resize(num_accum_tiles);
    const auto for_each = [&](auto visit) {
      for (const BlockRange& range : items) {
        const std::vector<int32_t>& accum_of_tile = accum_tiles[&range - items.data()];
        for (size_t tile = 0; tile < accum_of_tile.size(); ++tile) {
          if (accum_of_tile[tile] >= 0) visit(range.first_tile + tile, range.first_accum_tile + accum_of_tile[tile]);
        }
      }
    };
    for_each([&](size_t tile, int32_t) { ++accum_offsets[tile + 1]; });
    std::partial_sum(accum_offsets.begin(), accum_offsets.end(), accum_offsets.begin());
    std::vector<int32_t> next(accum_offsets.begin(), accum_offsets.end() - 1);
    for_each([&](size_t tile, int32_t accum_tile) { accum_lists[next[tile]++] = accum_tile; });
  }
};

// Returns the order in which to hand out tasks, most expensive first, so that threads finish together. Where there are
// so many tasks that only the most expensive ones matter, the others keep their order, because neighbours read the same
// keys; they start from the more expensive end, which is the last one under a causal mask.
std::vector<int32_t> order_by_cost(const std::vector<int64_t>& cost, int64_t passes) {
  const int64_t count = static_cast<int64_t>(cost.size());
  std::vector<int32_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  const auto half = cost.begin() + count / 2;
  if (std::accumulate(cost.begin(), half, int64_t{0}) < std::accumulate(half, cost.end(), int64_t{0})) {
    std::reverse(order.begin(), order.end());
  }
  const bool many = count * passes >= 64 * int64_t{torch::stable::get_num_threads()};
  const int64_t high = many ? 2 * std::accumulate(cost.begin(), cost.end(), int64_t{0}) / count : 0;
  const auto rank = [&](int32_t task) { return cost[task] > high ? cost[task] : 0; };
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return rank(a) > rank(b); });
  return order;
}

}  // namespace

std::tuple<Tensor, Tensor> mixed_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                           const std::vector<Tensor>& plan, double scale, double softcap,
                                           const std::optional<Tensor>& sinks) {
  Sizes sizes{};
  AttentionParams p = params_of(q, k, v, plan, scale, softcap, sinks, sizes);
  const int64_t rows = q.size(0);
  Tensor out = torch::stable::new_empty(q, {rows, p.heads, p.head_dim});
  Tensor lse = torch::stable::new_empty(q, {rows, p.heads}, ScalarType::Float);
  p.out = static_cast<char*>(out.mutable_data_ptr());
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  clear_rows(out, sizes.q_rows);
  std::fill(p.lse + int64_t{sizes.q_rows} * p.heads, p.lse + rows * p.heads, -std::numeric_limits<float>::infinity());

  const std::vector<int64_t> keys = keys_per_block(p.plan);
  const int64_t all_keys = std::accumulate(keys.begin(), keys.end(), int64_t{0});
  const int32_t groups = p.row_tile_groups();
  OperandCopies copies(p, all_keys * groups / kTile);
  const Layouts layouts = REFRAG_KERNEL(attention_layouts)(p.element, p.head_dim);
  copies.add(p.k_rows, p.k, layouts.rows);
  copies.add(p.v_cols, p.v, layouts.cols);
  copies.make(copies_workspace);

  const int64_t passes = int64_t{p.kv_heads} * groups;
  const std::vector<int32_t> order = order_by_cost(keys, passes);
  const int64_t blocks = p.plan.num_blocks, scratch = REFRAG_KERNEL(attention_forward_scratch)(p);
  const auto kernel = REFRAG_KERNEL(attention_forward);
  // The heads of a block run one after another, because their rows are adjacent in memory. The exception is when the
  // keys of all heads exceed the cache: then all blocks of one head run before the next head, so that its keys stay
  // cached.
  const int64_t tasks = blocks * passes;
  const int64_t key_bytes = 2 * int64_t{p.kv_heads} * p.head_dim * bytes_of(p.element);
  const bool head_first =
      blocks >= 8 * int64_t{torch::stable::get_num_threads()} && all_keys * key_bytes > kCacheBytes * blocks;
  const int64_t macs = 2 * (all_keys + kTile * blocks) * kTile * p.heads * p.head_dim;
  const auto task_at = [&](int64_t index) {
    const int64_t block = head_first ? index % blocks : index / passes;
    const int64_t pass = head_first ? index / blocks : index % passes;
    return AttentionTask{order[block], static_cast<int32_t>(pass / groups), static_cast<int32_t>(pass % groups)};
  };
  run_tasks(tasks, grain_of(tasks, macs),
            [&](int64_t task) { kernel(p, task_at(task), scratch_workspace.at_least(scratch)); });
  copies_workspace.trim(kMaxRetainedBytes);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mixed_attention_backward(const Tensor& grad_out, const Tensor& grad_lse,
                                                                    const Tensor& q, const Tensor& k, const Tensor& v,
                                                                    const Tensor& out, const Tensor& lse,
                                                                    const std::vector<Tensor>& plan, double scale,
                                                                    double softcap,
                                                                    const std::optional<Tensor>& sinks) {
  Sizes sizes{};
  AttentionBackwardParams b{};
  AttentionParams& p = b.forward;
  p = params_of(q, k, v, plan, scale, softcap, sinks, sizes);
  b.grad_out = rows_like("grad_out", grad_out, q);
  b.out = rows_like("out", out, q);
  b.lse = lse_data("lse", lse, q);
  b.grad_lse = lse_data("grad_lse", grad_lse, q);
  Tensor dq = torch::stable::new_empty(q, {q.size(0), p.heads, p.head_dim});
  Tensor dk = torch::stable::new_empty(k, {k.size(0), p.kv_heads, p.head_dim});
  Tensor dv = torch::stable::new_empty(v, {v.size(0), p.kv_heads, p.head_dim});
  Tensor dsinks = torch::stable::new_empty(q, {sinks ? p.heads : 0}, ScalarType::Float);
  clear_rows(dq, sizes.q_rows);
  clear_rows(dk, sizes.kv_rows);
  clear_rows(dv, sizes.kv_rows);
  b.dq = static_cast<char*>(dq.mutable_data_ptr());
  b.dk = static_cast<char*>(dk.mutable_data_ptr());
  b.dv = static_cast<char*>(dv.mutable_data_ptr());

  const std::vector<int64_t> keys = keys_per_block(p.plan);
  const int64_t all_keys = std::accumulate(keys.begin(), keys.end(), int64_t{0});
  OperandCopies copies(p, all_keys * p.row_tile_groups() / kTile);
  const Layouts layouts = REFRAG_KERNEL(attention_layouts)(p.element, p.head_dim);
  copies.add(p.k_rows, p.k, layouts.rows);
  copies.add(p.v_rows, p.v, layouts.rows);
  copies.add(p.k_cols, p.k, layouts.cols);
  copies.make(copies_workspace);

  const BlockRanges ranges(p.plan, keys, p.kv_heads);
  b.num_accum_tiles = ranges.num_accum_tiles;
  b.accum_offsets = ranges.accum_offsets.data();
  b.accum_lists = ranges.accum_lists.data();
  const int64_t accum_floats = p.kv_heads * b.num_accum_tiles * kTile * p.padded_head_dim();
  b.dk_accum =
      reinterpret_cast<float*>(accum_workspace.at_least(2 * accum_floats * static_cast<int64_t>(sizeof(float))));
  b.dv_accum = b.dk_accum + accum_floats;
  std::vector<float> dsinks_partials(sinks ? int64_t{p.plan.num_blocks} * p.heads : 0);
  b.dsinks = sinks ? dsinks_partials.data() : nullptr;

  const std::vector<int32_t> order = order_by_cost(ranges.cost, p.kv_heads);
  const int64_t scratch = REFRAG_KERNEL(attention_backward_scratch)(b);
  const auto kernel = REFRAG_KERNEL(attention_backward);
  const int64_t macs = 5 * (all_keys + kTile * p.plan.num_blocks) * kTile * p.heads * p.head_dim;
  const int64_t tasks = static_cast<int64_t>(order.size()) * p.kv_heads;
  run_tasks(tasks, grain_of(tasks, macs), [&](int64_t task) {
    kernel(b, ranges.items[order[task / p.kv_heads]], static_cast<int32_t>(task % p.kv_heads),
           scratch_workspace.at_least(scratch));
  });
  const auto sum = REFRAG_KERNEL(attention_backward_reduce);
  const int64_t tiles = p.plan.num_tiles;
  run_tasks(tiles, grain_of(tiles, 16 * accum_floats),
            [&](int64_t tile) { sum(b, static_cast<int32_t>(tile), static_cast<int32_t>(tile) + 1); });
  if (sinks) {
    float* total = static_cast<float*>(dsinks.mutable_data_ptr());
    std::fill(total, total + p.heads, 0.0f);
    for (size_t i = 0; i < dsinks_partials.size(); ++i) total[i % p.heads] += dsinks_partials[i];
  }
  copies_workspace.trim(kMaxRetainedBytes);
  accum_workspace.trim(kMaxRetainedBytes);
  return {dq, dk, dv, dsinks};
}

namespace {

Tensor attention_received(const Tensor& q, const Tensor& k, const Tensor& lse, const std::vector<Tensor>& plan,
                          double scale, double softcap) {
  Sizes sizes{};
  AttentionReceivedParams r{};
  AttentionParams& p = r.forward;
  p = params_of(q, k, k, plan, scale, softcap, std::nullopt, sizes);
  r.lse = lse_data("lse", lse, q);
  Tensor received = torch::stable::new_empty(k, {k.size(0), p.kv_heads}, ScalarType::Float);
  r.received = static_cast<float*>(received.mutable_data_ptr());
  clear_rows(received, sizes.kv_rows);

  const std::vector<int64_t> keys = keys_per_block(p.plan);
  const int64_t all_keys = std::accumulate(keys.begin(), keys.end(), int64_t{0});
  OperandCopies copies(p, all_keys * p.row_tile_groups() / kTile);
  copies.add(p.k_rows, p.k, REFRAG_KERNEL(attention_layouts)(p.element, p.head_dim).rows);
  copies.make(copies_workspace);
  const BlockRanges ranges(p.plan, keys, p.kv_heads);
  r.num_accum_tiles = ranges.num_accum_tiles;
  r.accum_offsets = ranges.accum_offsets.data();
  r.accum_lists = ranges.accum_lists.data();
  const int64_t accum_floats = p.kv_heads * r.num_accum_tiles * kTile * kTile;
  r.accum = reinterpret_cast<float*>(accum_workspace.at_least(accum_floats * static_cast<int64_t>(sizeof(float))));

  const std::vector<int32_t> order = order_by_cost(ranges.cost, p.kv_heads);
  const int64_t scratch = REFRAG_KERNEL(attention_received_scratch)(r);
  const auto kernel = REFRAG_KERNEL(attention_received);
  const int64_t macs = (all_keys + kTile * p.plan.num_blocks) * kTile * p.heads * p.head_dim;
  const int64_t tasks = static_cast<int64_t>(order.size()) * p.kv_heads, tiles = p.plan.num_tiles;
  run_tasks(tasks, grain_of(tasks, macs), [&](int64_t task) {
    kernel(r, ranges.items[order[task / p.kv_heads]], static_cast<int32_t>(task % p.kv_heads),
           scratch_workspace.at_least(scratch));
  });
  const auto sum = REFRAG_KERNEL(attention_received_reduce);
  run_tasks(tiles, grain_of(tiles, accum_floats), [&](int64_t tile) { sum(r, static_cast<int32_t>(tile)); });
  copies_workspace.trim(kMaxRetainedBytes);
  accum_workspace.trim(kMaxRetainedBytes);
  return received;
}

}  // namespace
}  // namespace refrag::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(refrag_cpu, m) {
  m.def("attention_received(Tensor q, Tensor k, Tensor lse, Tensor[] plan, float scale, float softcap) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(refrag_cpu, CPU, m) {
  m.impl("attention_received", TORCH_BOX(&refrag::cpu::attention_received));
}
