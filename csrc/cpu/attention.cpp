// mixed_attention on the CPU: checks, memory and threads around the kernels of csrc/cpu/kernels/attention_*.cpp.
#include "cpu/attention_kernels.h"

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

// Copies of keys and values, and partial gradients, up to this size are kept for the next call.
constexpr int64_t kKeptBytes = int64_t{64} << 20;

// Of a core's second-level cache, what keys and values may take: half of the common 1 MiB.
constexpr int64_t kCacheBytes = int64_t{512} << 10;

// Work that is worth a trip to another thread and back, in multiplications.
constexpr int64_t kTaskWork = int64_t{1} << 19;

HeadRows head_rows(const char* name, const Tensor& tensor, Element element) {
  STD_TORCH_CHECK(tensor.dim() == 3 && element_of(tensor) == element, name, ": needs three dimensions and q's dtype");
  STD_TORCH_CHECK(tensor.stride(2) == 1 || tensor.numel() == 0, name, ": needs a contiguous last dimension");
  const int64_t bytes = bytes_of(element);
  return {static_cast<const char*>(tensor.const_data_ptr()), tensor.stride(0) * bytes, tensor.stride(1) * bytes};
}

// Query rows, query blocks and so on that a plan really has.
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

// Keys that each block sees, by the tiles it has to compute.
std::vector<int64_t> keys_of_blocks(const PlanView& plan) {
  std::vector<int64_t> keys(plan.num_blocks);
  for (int32_t block = 0; block < plan.num_blocks; ++block) {
    int64_t seen = kTile * int64_t{plan.partial_offsets[block + 1] - plan.partial_offsets[block]};
    for (int32_t range = plan.full_offsets[block]; range < plan.full_offsets[block + 1]; ++range) {
      seen += plan.full_ranges[2 * range + 1] - plan.full_ranges[2 * range];
    }
    keys[block] = seen;
  }
  return keys;
}

// Tasks to hand out at a time, if all of them are `work` multiplications: all of them where another thread would not
// help, few enough that threads finish together, and not so few that the handing out counts.
int64_t grain_of(int64_t tasks, int64_t work) {
  if (work <= kTaskWork) return std::max<int64_t>(1, tasks);
  const int64_t pieces = 8 * int64_t{torch::stable::get_num_threads()};
  return std::max<int64_t>(1, std::min(8 * kTaskWork * tasks / work, tasks / pieces));
}

// Decides how kernels read a tensor, and makes the copy if that takes one. `memory` is where copies go.
class Copies {
 public:
  Copies(AttentionParams& params, int64_t visits) : params_(params) {
    // A tile that hardly anyone visits twice is packed by its visitors, in the cache.
    copy_ = visits > 2 * int64_t{params.plan.num_tiles};
  }

  void add(Operand& operand, const HeadRows& tensor, Form form) {
    if (form == Form::tensor) {
      operand = {tensor.data, tensor.row_bytes, tensor.head_bytes, false};
      return;
    }
    for (const Wanted& other : wanted_) {
      if (other.task.source == tensor && other.task.form == form) {
        wanted_.push_back({&operand, other.task, true});
        return;
      }
    }
    const int64_t row_bytes = int64_t{params_.padded_width()} * (form == Form::pairs ? 2 : 4);
    wanted_.push_back({&operand, {tensor, form, nullptr, kTile * row_bytes}, false});
  }

  void make(Workspace& workspace) {
    const int64_t tiles = params_.plan.num_tiles;
    int64_t bytes = 0;
    if (copy_) {
      for (const Wanted& w : wanted_) bytes += w.shared ? 0 : w.task.tile_bytes * tiles * params_.kv_heads;
    }
    char* next = copy_ ? workspace.at_least(bytes) : nullptr;
    const auto pack = REFRAG_KERNEL(attention_pack);
    std::vector<PackTask> tasks;
    for (Wanted& w : wanted_) {
      if (w.shared) {
        for (const PackTask& task : tasks) {
          if (task.source == w.task.source && task.form == w.task.form) w.task.copy = task.copy;
        }
      } else if (copy_) {
        w.task.copy = next;
        next += w.task.tile_bytes * tiles * params_.kv_heads;
        tasks.push_back(w.task);
      }
      const int64_t row_bytes = w.task.tile_bytes / kTile;
      *w.operand = {w.task.copy, row_bytes, w.task.tile_bytes * tiles, true};
    }
    if (tasks.empty()) return;
    const int64_t grain = 1 + kTaskWork / 4 / (kTile * params_.kv_heads * int64_t{params_.width});
    const int64_t pieces = (tiles + grain - 1) / grain;
    run_tasks(pieces, 1, [&](int64_t piece) {
      for (const PackTask& task : tasks) {
        pack(params_, task, static_cast<int32_t>(piece * grain),
             static_cast<int32_t>(std::min(tiles, (piece + 1) * grain)));
      }
    });
  }

 private:
  struct Wanted {
    Operand* operand;
    PackTask task;
    bool shared;
  };
  AttentionParams& params_;
  bool copy_;
  std::vector<Wanted> wanted_;
};

thread_local Workspace copies_memory;   // of the thread that calls an op
thread_local Workspace sums_memory;     // likewise
thread_local Workspace scratch_memory;  // of every thread that runs tasks

AttentionParams params_of(const Tensor& q, const Tensor& k, const Tensor& v, const std::vector<Tensor>& plan,
                          double scale, double softcap, const std::optional<Tensor>& sinks, Sizes& sizes) {
  AttentionParams p{};
  p.element = element_of(q);
  p.q = head_rows("q", q, p.element);
  p.k = head_rows("k", k, p.element);
  p.v = head_rows("v", v, p.element);
  p.heads = static_cast<int32_t>(q.size(1));
  p.kv_heads = static_cast<int32_t>(k.size(1));
  p.width = static_cast<int32_t>(q.size(2));
  STD_TORCH_CHECK(p.width % 8 == 0 && p.width > 0 && p.width <= 256,
                  "q: needs a head width that is a multiple of 8 up to 256");
  STD_TORCH_CHECK(p.kv_heads > 0 && p.heads % p.kv_heads == 0, "q: needs a multiple of k's heads");
  STD_TORCH_CHECK(k.size(2) == p.width && v.size(2) == p.width && v.size(1) == p.kv_heads && v.size(0) == k.size(0),
                  "k and v: need the same shape, and q's head width");
  p.scale = static_cast<float>(scale);
  p.softcap = static_cast<float>(softcap);
  if (sinks) {
    STD_TORCH_CHECK(sinks->scalar_type() == ScalarType::Float && sinks->is_contiguous() && sinks->numel() == p.heads,
                    "sinks: needs float32, one a head");
    p.sinks = static_cast<const float*>(sinks->const_data_ptr());
  }
  p.plan = view(plan, sizes);
  STD_TORCH_CHECK(plan[kQRowBlock].numel() == q.size(0) && plan[kKvRowBlock].numel() == k.size(0),
                  "plan: needs one made for the row counts of q and k");
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
      name, ": needs contiguous float32 [T_q, H_q]");
  return static_cast<const float*>(tensor.const_data_ptr());
}

// Zeros in the rows that a capacity leaves over.
void clear_rows(const Tensor& tensor, int64_t used) {
  if (tensor.size(0) <= used || tensor.numel() == 0) return;
  const int64_t row_bytes = tensor.numel() / tensor.size(0) * static_cast<int64_t>(tensor.element_size());
  std::memset(static_cast<char*>(tensor.mutable_data_ptr()) + used * row_bytes, 0, (tensor.size(0) - used) * row_bytes);
}

// Parts in which a backward pass is done, at least: enough that threads finish together, as long as one holds many
// blocks.
constexpr int64_t kBackwardTasks = 64;

struct Strips {
  std::vector<Strip> strips;
  std::vector<int64_t> cost;
  std::vector<std::vector<int32_t>> slots;
  std::vector<int32_t> slot_offsets, slot_lists;
  int64_t num_slots = 0;

  Strips(const PlanView& plan, const std::vector<int64_t>& keys, int32_t kv_heads) {
    const int64_t all_keys = std::accumulate(keys.begin(), keys.end(), int64_t{0});
    const int64_t share = std::max<int64_t>(1, all_keys * kv_heads / kBackwardTasks);
    for (int32_t block = 0; block < plan.num_blocks; ++block) {
      const bool new_sequence = block > 0 && plan.q_blocks[4 * block + 2] != plan.q_blocks[4 * block - 2];
      if (block == 0 || new_sequence || cost.back() >= share) {
        strips.push_back({block, block, 0, nullptr, 0, 0});
        cost.push_back(0);
      }
      cost.back() += keys[block];
      strips.back().last_block = block + 1;
    }
    for (Strip& strip : strips) number_slots(plan, strip);
    for (size_t i = 0; i < strips.size(); ++i) strips[i].slots = slots[i].data();
    list_slots(plan);
  }

 private:
  void number_slots(const PlanView& plan, Strip& strip) {
    const int32_t* q_block = plan.q_blocks + 4 * int64_t{strip.first_block};
    strip.first_tile = q_block[3] > 0 ? plan.kv_row_block[q_block[2]] : 0;
    std::vector<int32_t> mine((q_block[3] + kTile - 1) / kTile, -1);
    const auto mark = [&](int32_t start, int32_t end) {
      const int32_t first = plan.kv_row_block[start] - strip.first_tile;
      std::fill(mine.begin() + first, mine.begin() + first + (end - start + kTile - 1) / kTile, 0);
    };
    const int32_t first = strip.first_block, last = strip.last_block;
    for (int32_t r = plan.full_offsets[first]; r < plan.full_offsets[last]; ++r) {
      mark(plan.full_ranges[2 * int64_t{r}], plan.full_ranges[2 * int64_t{r} + 1]);
    }
    for (int32_t i = plan.partial_offsets[first]; i < plan.partial_offsets[last]; ++i) {
      mark(plan.partial_keys[i], plan.partial_keys[i] + 1);
    }
    strip.first_slot = static_cast<int32_t>(num_slots);
    for (int32_t& slot : mine) {
      if (slot == 0) slot = strip.num_slots++;
    }
    num_slots += strip.num_slots;
    slots.push_back(std::move(mine));
  }

  void list_slots(const PlanView& plan) {
    slot_offsets.assign(plan.num_tiles + 1, 0);
    slot_lists.resize(num_slots);
    const auto each = [&](auto visit) {
      for (const Strip& strip : strips) {
        const std::vector<int32_t>& mine = slots[&strip - strips.data()];
        for (size_t tile = 0; tile < mine.size(); ++tile) {
          if (mine[tile] >= 0) visit(strip.first_tile + tile, strip.first_slot + mine[tile]);
        }
      }
    };
    each([&](size_t tile, int32_t) { ++slot_offsets[tile + 1]; });
    std::partial_sum(slot_offsets.begin(), slot_offsets.end(), slot_offsets.begin());
    std::vector<int32_t> next(slot_offsets.begin(), slot_offsets.end() - 1);
    each([&](size_t tile, int32_t slot) { slot_lists[next[tile]++] = slot; });
  }
};

// Parts in the order in which to hand them out, so that threads finish together: the costly ones first. Where there are
// so many that only the very costly ones matter, the others stay in their order, as neighbours read the same keys: from
// the end at which they cost more, which under a causal mask is the last.
std::vector<int32_t> by_cost(const std::vector<int64_t>& cost, int64_t passes) {
  const int64_t count = static_cast<int64_t>(cost.size());
  std::vector<int32_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  const auto half = cost.begin() + count / 2;
  if (std::accumulate(cost.begin(), half, int64_t{0}) < std::accumulate(half, cost.end(), int64_t{0})) {
    std::reverse(order.begin(), order.end());
  }
  const bool many = count * passes >= 64 * int64_t{torch::stable::get_num_threads()};
  const int64_t high = many ? 2 * std::accumulate(cost.begin(), cost.end(), int64_t{0}) / count : 0;
  const auto rank = [&](int32_t part) { return cost[part] > high ? cost[part] : 0; };
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
  Tensor out = torch::stable::new_empty(q, {rows, p.heads, p.width});
  Tensor lse = torch::stable::new_empty(q, {rows, p.heads}, ScalarType::Float);
  p.out = static_cast<char*>(out.mutable_data_ptr());
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  clear_rows(out, sizes.q_rows);
  std::fill(p.lse + int64_t{sizes.q_rows} * p.heads, p.lse + rows * p.heads, -std::numeric_limits<float>::infinity());

  const std::vector<int64_t> keys = keys_of_blocks(p.plan);
  const int64_t all_keys = std::accumulate(keys.begin(), keys.end(), int64_t{0});
  const int32_t groups = p.panel_groups();
  Copies copies(p, all_keys * groups / kTile);
  const Forms forms = REFRAG_KERNEL(attention_forms)(p.element, p.width);
  copies.add(p.k_rows, p.k, forms.rows);
  copies.add(p.v_cols, p.v, forms.cols);
  copies.make(copies_memory);

  const int64_t passes = int64_t{p.kv_heads} * groups;
  const std::vector<int32_t> order = by_cost(keys, passes);
  const int64_t blocks = p.plan.num_blocks, scratch = REFRAG_KERNEL(attention_forward_scratch)(p);
  const auto kernel = REFRAG_KERNEL(attention_forward);
  // One block's heads follow each other, as their rows lie side by side; unless the keys of all heads are too many for
  // the cache, and one head's are better kept there for the next block.
  const int64_t tasks = blocks * passes;
  const int64_t key_bytes = 2 * int64_t{p.kv_heads} * p.width * bytes_of(p.element);
  const bool head_first =
      blocks >= 8 * int64_t{torch::stable::get_num_threads()} && all_keys * key_bytes > kCacheBytes * blocks;
  const int64_t work = 2 * (all_keys + kTile * blocks) * kTile * p.heads * p.width;
  const auto task_at = [&](int64_t index) {
    const int64_t block = head_first ? index % blocks : index / passes;
    const int64_t pass = head_first ? index / blocks : index % passes;
    return AttentionTask{order[block], static_cast<int32_t>(pass / groups), static_cast<int32_t>(pass % groups)};
  };
  run_tasks(tasks, grain_of(tasks, work),
            [&](int64_t task) { kernel(p, task_at(task), scratch_memory.at_least(scratch)); });
  copies_memory.trim(kKeptBytes);
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
  Tensor dq = torch::stable::new_empty(q, {q.size(0), p.heads, p.width});
  Tensor dk = torch::stable::new_empty(k, {k.size(0), p.kv_heads, p.width});
  Tensor dv = torch::stable::new_empty(v, {v.size(0), p.kv_heads, p.width});
  Tensor dsinks = torch::stable::new_empty(q, {sinks ? p.heads : 0}, ScalarType::Float);
  clear_rows(dq, sizes.q_rows);
  clear_rows(dk, sizes.kv_rows);
  clear_rows(dv, sizes.kv_rows);
  b.dq = static_cast<char*>(dq.mutable_data_ptr());
  b.dk = static_cast<char*>(dk.mutable_data_ptr());
  b.dv = static_cast<char*>(dv.mutable_data_ptr());

  const std::vector<int64_t> keys = keys_of_blocks(p.plan);
  const int64_t all_keys = std::accumulate(keys.begin(), keys.end(), int64_t{0});
  Copies copies(p, all_keys * p.panel_groups() / kTile);
  const Forms forms = REFRAG_KERNEL(attention_forms)(p.element, p.width);
  copies.add(p.k_rows, p.k, forms.rows);
  copies.add(p.v_rows, p.v, forms.rows);
  copies.add(p.k_cols, p.k, forms.cols);
  copies.make(copies_memory);

  const Strips strips(p.plan, keys, p.kv_heads);
  b.num_slots = strips.num_slots;
  b.slot_offsets = strips.slot_offsets.data();
  b.slot_lists = strips.slot_lists.data();
  const int64_t sums = p.kv_heads * b.num_slots * kTile * p.padded_width();
  b.dk_sums = reinterpret_cast<float*>(sums_memory.at_least(2 * sums * static_cast<int64_t>(sizeof(float))));
  b.dv_sums = b.dk_sums + sums;
  std::vector<float> sink_parts(sinks ? int64_t{p.plan.num_blocks} * p.heads : 0);
  b.dsinks = sinks ? sink_parts.data() : nullptr;

  const std::vector<int32_t> order = by_cost(strips.cost, p.kv_heads);
  const int64_t scratch = REFRAG_KERNEL(attention_backward_scratch)(b);
  const auto kernel = REFRAG_KERNEL(attention_backward);
  const int64_t work = 5 * (all_keys + kTile * p.plan.num_blocks) * kTile * p.heads * p.width;
  const int64_t tasks = static_cast<int64_t>(order.size()) * p.kv_heads;
  run_tasks(tasks, grain_of(tasks, work), [&](int64_t task) {
    kernel(b, strips.strips[order[task / p.kv_heads]], static_cast<int32_t>(task % p.kv_heads),
           scratch_memory.at_least(scratch));
  });
  const auto sum = REFRAG_KERNEL(attention_backward_sum);
  const int64_t tiles = p.plan.num_tiles;
  run_tasks(tiles, grain_of(tiles, 16 * sums),
            [&](int64_t tile) { sum(b, static_cast<int32_t>(tile), static_cast<int32_t>(tile) + 1); });
  if (sinks) {
    float* total = static_cast<float*>(dsinks.mutable_data_ptr());
    std::fill(total, total + p.heads, 0.0f);
    for (size_t i = 0; i < sink_parts.size(); ++i) total[i % p.heads] += sink_parts[i];
  }
  copies_memory.trim(kKeptBytes);
  sums_memory.trim(kKeptBytes);
  return {dq, dk, dv, dsinks};
}

}  // namespace refrag::cpu
