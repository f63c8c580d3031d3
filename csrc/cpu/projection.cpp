// project_chunks and embed_mixed on the CPU: checks arguments, allocates memory and runs
// csrc/cpu/kernels/projection.cpp on torch's threads.
#include "cpu/projection_kernels.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <numeric>

#include "cpu/ops.h"
#include "cpu/tasks.h"
#include "cpu/tensors.h"

namespace refrag::cpu {
namespace {

using torch::headeronly::ScalarType;

// Rows of text that one task gathers: fewer are not worth handing to another thread.
constexpr int64_t kRowsPerTask = 64;
// Rows of a weight matrix that one task copies.
constexpr int64_t kWeightRowsPerTask = 64;

thread_local Workspace copies_workspace;   // of the thread that calls an op
thread_local Workspace scratch_workspace;  // of every thread that runs tasks

Matrix matrix(const char* name, const Tensor& tensor, Element element) {
  STD_TORCH_CHECK(tensor.dim() == 2 && element_of(tensor) == element, name, ": needs 2 dimensions and the dtype of w1");
  STD_TORCH_CHECK(tensor.stride(1) == 1 || tensor.size(1) <= 1, name, ": needs a contiguous last dimension");
  return {static_cast<const char*>(tensor.const_data_ptr()), tensor.stride(0) * bytes_of(element)};
}

Activation activation_of(const std::string& name) {
  constexpr const char* kNames[] = {"gelu", "gelu_tanh", "silu", "relu", "tanh", "none"};
  for (int i = 0; i < 6; ++i) {
    if (name == kNames[i]) return static_cast<Activation>(i);
  }
  STD_TORCH_CHECK(false, "activation: got ", name, ", needs gelu, gelu_tanh, silu, relu, tanh or none");
}

const char* bias(const char* name, const std::optional<Tensor>& tensor, int64_t size, Element element) {
  if (!tensor) return nullptr;
  STD_TORCH_CHECK(tensor->dim() == 1 && tensor->size(0) == size && element_of(*tensor) == element, name,
                  ": needs one element per row of its weight, in the dtype of w1");
  STD_TORCH_CHECK(tensor->stride(0) == 1 || size <= 1, name, ": needs to be contiguous");
  return static_cast<const char*>(tensor->const_data_ptr());
}

// Bytes of the packed copies of the two weights; 0 where the kernels read the tensors themselves.
struct CopySizes {
  int64_t first, second;
};

CopySizes copy_sizes(Element element, const Tensor& w1, const Tensor& w2) {
  const auto copies = REFRAG_KERNEL(projection_copies_weights);
  const auto row_bytes = REFRAG_KERNEL(projection_row_bytes);
  auto size = [&](const Tensor& weight) {
    const int32_t cols = static_cast<int32_t>(weight.size(1));
    return copies(element, cols) ? weight.size(0) * row_bytes(element, cols) : 0;
  };
  return {size(w1), size(w2)};
}

void copy_weight(Element element, const Matrix& source, const Tensor& weight, char* copy) {
  const int64_t rows = weight.size(0);
  const auto kernel = REFRAG_KERNEL(projection_copy);
  const int64_t pieces = (rows + kWeightRowsPerTask - 1) / kWeightRowsPerTask;
  run_tasks(pieces, 1, [&](int64_t piece) {
    kernel(element, source, static_cast<int32_t>(weight.size(1)), static_cast<int32_t>(piece * kWeightRowsPerTask),
           static_cast<int32_t>(std::min(rows, (piece + 1) * kWeightRowsPerTask)), copy);
  });
}

ProjectionParams params_of(const Tensor& chunks, const Tensor& w1, const std::optional<Tensor>& b1, const Tensor& w2,
                           const std::optional<Tensor>& b2, const std::string& activation,
                           const std::optional<Tensor>& packed) {
  ProjectionParams p{};
  p.element = element_of(w1);
  p.activation = activation_of(activation);
  p.chunks = matrix("chunks", chunks, p.element);
  p.w1 = matrix("w1", w1, p.element);
  p.w2 = matrix("w2", w2, p.element);
  p.d_enc = static_cast<int32_t>(w1.size(1));
  p.hidden = static_cast<int32_t>(w1.size(0));
  p.d_dec = static_cast<int32_t>(w2.size(0));
  STD_TORCH_CHECK(chunks.size(1) == p.d_enc && w2.size(1) == p.hidden,
                  "w1, w2: need shapes [hidden, d_enc] and [d_dec, hidden], for chunks [C, d_enc]");
  p.b1 = bias("b1", b1, p.hidden, p.element);
  p.b2 = bias("b2", b2, p.d_dec, p.element);

  const CopySizes sizes = copy_sizes(p.element, w1, w2);
  char* copies = nullptr;
  if (packed) {
    STD_TORCH_CHECK(packed->scalar_type() == ScalarType::Byte && packed->is_contiguous() &&
                        packed->numel() == sizes.first + sizes.second,
                    "packed: needs the result of pack_projection(w1, w2)");
    copies = static_cast<char*>(const_cast<void*>(packed->const_data_ptr()));
  } else if (sizes.first + sizes.second > 0) {
    copies = copies_workspace.at_least(sizes.first + sizes.second);
    if (sizes.first) copy_weight(p.element, p.w1, w1, copies);
    if (sizes.second) copy_weight(p.element, p.w2, w2, copies + sizes.first);
  }
  const auto row_bytes = REFRAG_KERNEL(projection_row_bytes);
  if (sizes.first) p.w1 = {copies, row_bytes(p.element, p.d_enc)};
  if (sizes.second) p.w2 = {copies + sizes.first, row_bytes(p.element, p.hidden)};
  return p;
}

void run(const ProjectionParams& p, int64_t count) {
  if (count == 0) return;
  const int64_t threads = torch::stable::get_num_threads(), chunk_tiles = (count + 15) / 16;
  const int64_t chunks_per_task =
      16 * std::clamp<int64_t>((chunk_tiles + threads - 1) / threads, 1, kProjectionChunkTiles);
  const int64_t tasks = (count + chunks_per_task - 1) / chunks_per_task;
  const int64_t scratch = REFRAG_KERNEL(projection_scratch)(p);
  const auto kernel = REFRAG_KERNEL(project);
  run_tasks(tasks, 1, [&](int64_t task) {
    kernel(p, static_cast<int32_t>(task * chunks_per_task),
           static_cast<int32_t>(std::min(chunks_per_task, count - task * chunks_per_task)),
           scratch_workspace.at_least(scratch));
  });
}

}  // namespace

Tensor pack_projection(const Tensor& w1, const Tensor& w2) {
  const Element element = element_of(w1);
  const CopySizes sizes = copy_sizes(element, w1, w2);
  Tensor packed = torch::stable::new_empty(w1, {sizes.first + sizes.second}, ScalarType::Byte);
  char* copies = static_cast<char*>(packed.mutable_data_ptr());
  if (sizes.first) copy_weight(element, matrix("w1", w1, element), w1, copies);
  if (sizes.second) copy_weight(element, matrix("w2", w2, element), w2, copies + sizes.first);
  return packed;
}

Tensor project_chunks(const Tensor& chunks, const Tensor& w1, const std::optional<Tensor>& b1, const Tensor& w2,
                      const std::optional<Tensor>& b2, std::string activation, const std::optional<Tensor>& packed) {
  ProjectionParams p = params_of(chunks, w1, b1, w2, b2, activation, packed);
  Tensor out = torch::stable::new_empty(chunks, {chunks.size(0), p.d_dec});
  p.out = static_cast<char*>(out.mutable_data_ptr());
  p.out_row_bytes = p.d_dec * bytes_of(p.element);
  run(p, chunks.size(0));
  return out;
}

Tensor embed_mixed(const Tensor& token_ids, const Tensor& token_table, const Tensor& chunks, const Tensor& slot_of_row,
                   const Tensor& w1, const std::optional<Tensor>& b1, const Tensor& w2, const std::optional<Tensor>& b2,
                   std::string activation, double token_scale, const std::optional<Tensor>& packed) {
  ProjectionParams p = params_of(chunks, w1, b1, w2, b2, activation, packed);
  const int64_t rows = token_ids.size(0), count = chunks.size(0);
  STD_TORCH_CHECK(token_ids.scalar_type() == ScalarType::Long && slot_of_row.scalar_type() == ScalarType::Int &&
                      slot_of_row.size(0) == rows && token_ids.is_contiguous() && slot_of_row.is_contiguous(),
                  "token_ids, slot_of_row: need contiguous int64 and int32 tensors of equal length");
  STD_TORCH_CHECK(token_table.size(1) == p.d_dec, "token_table: needs as many columns as w2 has rows");
  const int64_t* ids = static_cast<const int64_t*>(token_ids.const_data_ptr());
  const int32_t* slots = static_cast<const int32_t*>(slot_of_row.const_data_ptr());
  const int64_t vocabulary = token_table.size(0);

  // One pass finds bad indices (Python makes the error message that names them) and counts the rows of each chunk.
  std::vector<int32_t> offsets(count + 1);
  for (int64_t row = 0; row < rows; ++row) {
    const int32_t slot = slots[row];
    STD_TORCH_CHECK(slot >= 0 ? slot < count : slot == -1 && ids[row] >= 0 && ids[row] < vocabulary,
                    "token_ids, slot_of_row: got an index out of range in row ", row);
    if (slot >= 0) ++offsets[slot + 1];
  }
  // Project only the chunks that some row uses.
  std::vector<int32_t> used, first{0};
  for (int64_t chunk = 0; chunk < count; ++chunk) {
    const int32_t uses = offsets[chunk + 1];
    offsets[chunk + 1] = offsets[chunk] + uses;
    if (uses == 0) continue;
    used.push_back(static_cast<int32_t>(chunk));
    first.push_back(offsets[chunk + 1]);
  }
  std::vector<int32_t> targets(offsets[count]);
  for (int64_t row = 0; row < rows; ++row) {
    if (slots[row] >= 0) targets[offsets[slots[row]]++] = static_cast<int32_t>(row);
  }
  p.targets = {used.data(), first.data(), targets.data()};

  Tensor out = torch::stable::new_empty(token_table, {rows, p.d_dec});
  p.out = static_cast<char*>(out.mutable_data_ptr());
  p.out_row_bytes = p.d_dec * bytes_of(p.element);
  const GatherParams text{p.element, ids,
                          slots,     matrix("token_table", token_table, p.element),
                          p.d_dec,   static_cast<float>(token_scale),
                          p.out,     p.out_row_bytes};
  const auto gather = REFRAG_KERNEL(gather_text);
  run_tasks((rows + kRowsPerTask - 1) / kRowsPerTask, 1, [&](int64_t piece) {
    gather(text, static_cast<int32_t>(piece * kRowsPerTask),
           static_cast<int32_t>(std::min(rows, (piece + 1) * kRowsPerTask)));
  });
  run(p, static_cast<int64_t>(used.size()));
  return out;
}

}  // namespace refrag::cpu
